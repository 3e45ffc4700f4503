"""Leap-MTP loss: cross-entropy of every head against its own target, without building full logits.

Head ``i`` at position ``s`` is trained on ``labels[s + offsets[i]]`` where that index lies inside the sequence, inside
the same packed document, and is not masked. Each head is averaged over its own valid targets (L-MTP, arXiv 2505.17505,
equations 4 and 5):

    stage 1:  L = sum_{i>=1} w_i CE_i                          w_i = head_decay ** (i - 1)
    stage 2:  L = CE_0 + head_weight * sum_{i>=1} w_i CE_i

Two implementations compute the same sums; callers choose one, neither falls back to the other:

======================= ============================ ===================================================
function                peak memory of the logits    gradients
======================= ============================ ===================================================
eager_cross_entropy     rows x vocabulary            autograd, in the backward
chunked_cross_entropy   chunk x vocabulary           of each chunk while its logits exist, in the forward
======================= ============================ ===================================================

Taking the gradients in the forward costs three matmuls a head where recomputing logits in the backward costs four, and
the weights are needed only there, which is where ZeRO-3 has them. The price: from its forward to its backward each head
holds a gradient of every weight it trains, in fp32.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


IGNORE_INDEX = -100

# One chunk holds its logits three times at the peak: the projection's output, its fp32 copy, and the gradient. With a
# vocabulary of 152,064 a row takes 3 * 4 * 152,064 bytes = 1.8 MB, so 256 MB admit 147 rows; with 49,152, 455 rows.
LOGIT_BYTES = 256 * 2**20


def chunk_rows(vocab_size: int) -> int:
    """Rows of logits that fit into :data:`LOGIT_BYTES`."""
    return max(1, LOGIT_BYTES // (3 * 4 * vocab_size))


def leap_targets(labels: Tensor, offset: int, position_ids: Tensor | None = None) -> Tensor:
    """Targets of a head that predicts ``offset`` tokens ahead.

    Args:
        labels: (batch, length), -100 where masked.
        offset: 1 or more.
        position_ids: (batch, length) or (axes, batch, length), restarting at 0 with every packed document; None where
            each row is one document.

    Returns:
        (batch, length), -100 where the head has no valid target.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    if offset >= labels.shape[-1]:
        return targets
    ahead = labels[:, offset:]
    if position_ids is not None:
        positions = position_ids[0] if position_ids.dim() == 3 else position_ids
        # Inside a text document positions rise with the index. Across a border they cannot: the later document's position
        # is below `offset`, the earlier one's plus `offset` is not. (Positions that stand still inside an image count as
        # a border too, so targets beyond an image are left out.)
        inside = positions[:, offset:] - positions[:, :-offset] == offset
        ahead = ahead.masked_fill(~inside, IGNORE_INDEX)
    targets[:, :-offset] = ahead
    return targets


def count_targets(labels: Tensor, offsets: Sequence[int], position_ids: Tensor | None = None) -> Tensor:
    """Valid targets of every head, (heads,)."""
    return torch.stack([(leap_targets(labels, o, position_ids) != IGNORE_INDEX).sum() for o in offsets])


def head_weights(num_extra: int, stage: int, head_weight: float, head_decay: float) -> list[float]:
    """Weights of the heads trained: the extra ones in stage 1; the LM head first, weight 1, in stage 2."""
    leap = [head_decay**i for i in range(num_extra)]
    return leap if stage == 1 else [1.0, *(head_weight * w for w in leap)]


def eager_cross_entropy(rows: Tensor, targets: Tensor, project: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and count of top-1 hits, all logits at once: the readable twin.

    Args:
        rows: (rows, hidden) inputs of ``project``.
        targets: (rows,), -100 where masked.
        project: (rows, hidden) -> (rows, vocabulary) logits.

    Returns:
        Scalar fp32 loss sum (with gradient) and scalar int64 hits.
    """
    logits = project(rows).float()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, (logits.detach().argmax(-1) == targets).sum()


def chunked_cross_entropy(
    rows: Tensor,
    targets: Tensor,
    project: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    rows_per_chunk: int,
) -> tuple[Tensor, Tensor]:
    """:func:`eager_cross_entropy` over valid rows only, ``rows_per_chunk`` at a time.

    A batch without a valid target still runs one masked row: its loss and gradients are exactly zero, but every
    parameter takes part in the graph, which distributed gradient reduction relies on.

    Args:
        parameters: what ``project`` computes with; those that require gradients get them.
    """
    valid = (targets != IGNORE_INDEX).nonzero().squeeze(-1)
    if valid.numel() == 0:
        valid = valid.new_zeros(1)
    if not torch.is_grad_enabled():  # evaluation: nothing asks for gradients
        rows, parameters = rows.detach(), ()
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    return _ChunkedCrossEntropy.apply(rows[valid], targets[valid], project, rows_per_chunk, *parameters)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, targets, project, rows_per_chunk, *parameters):
        rows_need_gradient = ctx.needs_input_grad[0]
        row_gradient = torch.zeros_like(rows) if rows_need_gradient else None
        # Sums over chunks in fp32: in bf16 each further chunk would lose the low bits of the sum before.
        gradients = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        loss, hits = rows.new_zeros((), dtype=torch.float32), targets.new_zeros(())
        for start in range(0, len(rows), rows_per_chunk):
            part = slice(start, start + rows_per_chunk)
            chunk = rows[part].detach().requires_grad_(rows_need_gradient)
            inputs = [*([chunk] if rows_need_gradient else []), *parameters]
            with torch.set_grad_enabled(bool(inputs)):
                chunk_loss, chunk_hits = eager_cross_entropy(chunk, targets[part], project)
            loss, hits = loss + chunk_loss.detach(), hits + chunk_hits
            if inputs:
                chunk_gradients = list(torch.autograd.grad(chunk_loss, inputs, allow_unused=True))
                if rows_need_gradient:
                    row_gradient[part] = chunk_gradients.pop(0)
                for total, gradient in zip(gradients, chunk_gradients):
                    if gradient is not None:
                        total += gradient
        ctx.gradients = row_gradient, [total.to(p.dtype) for total, p in zip(gradients, parameters)]
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    def backward(ctx, grad_loss, _):
        # In place, once: the sums are as large as the unembeddings, and autograd may take them over as they are.
        (row_gradient, gradients), ctx.gradients = ctx.gradients, None
        scaled = [None if g is None else g.mul_(grad_loss.to(g.dtype)) for g in (row_gradient, *gradients)]
        return scaled[0], None, None, None, *scaled[1:]
