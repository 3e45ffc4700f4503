"""Cross-entropy of all heads in one autograd function, a chunk of tokens at a time.

Masked targets are dropped before anything is computed. Of each chunk the gradients are taken while its logits exist, so a
head costs three matmuls with its unembedding (logits, features' gradient, weight's gradient; two where it is frozen)
where recomputing logits in the backward costs four, and weights are needed only in the forward, which is where ZeRO-3 has
them. The price: from forward to backward there is one gradient of every trained weight, shared by all heads that use it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..dtypes import accumulation_dtype, cast_like, computed_in
from .head_spec import HeadSpec
from .implementation import as_plain_linear
from .rows import RowLoss
from .targets import IGNORE_INDEX


# What one chunk's logits may take. For 6 * rows operations on each number of the unembedding a chunk reads it twice and
# reads and writes its fp32 gradient: 16 bytes in fp32, 12 in bf16. So a CPU (200 GFLOP/s, 20 GB/s) is kept busy by some 30
# rows, an H200 (990 TFLOP/s in bf16, 4.8 TB/s) by some 400. With a vocabulary of 152,064, 256 MB admit 441 rows in fp32
# and 1 GB 3,530 rows in bf16; with 262,144 it is 256 and 2,048.
LOGIT_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}

# A weight gradient that cannot be summed up in place by the matmul itself takes a product of this size beside it.
_PRODUCT_BYTES = 64 * 2**20


def chunk_rows(vocab_size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    """Rows of logits that fit into :data:`LOGIT_BYTES`."""
    return max(1, LOGIT_BYTES.get(device.type, LOGIT_BYTES["cpu"]) // (dtype.itemsize * vocab_size))


@torch.compiler.disable  # the number of chunks differs from step to step: torch.compile breaks its graph here
def chunked_loss(
    hidden: Tensor,
    targets: Tensor,
    scales: Tensor,
    heads: Sequence[HeadSpec],
    *,
    row_loss: RowLoss,
    softcap: float | None = None,
    rows_per_chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`.eager.eager_loss`, a chunk of valid rows at a time.

    A head without a valid target has zero loss and zero gradients, but takes part in the graph: distributed gradient
    reduction waits for every parameter.

    Args:
        hidden: (rows, hidden) final hidden states.
        targets: (heads, rows) token ids, -100 where masked.
        scales: (heads,) what each head's loss sum is multiplied by.
        heads: in the order of the targets.
        row_loss: the in-place form of a loss, see :mod:`.rows`.
        softcap: the model's ``final_logit_softcapping``.
        rows_per_chunk: default :func:`chunk_rows`.

    Returns:
        Scalar fp32 loss with gradient; (heads,) fp32 loss sums, not scaled; (heads,) int64 top-1 hits.
    """
    runs = [_HeadRun(head, row_loss, softcap, rows_per_chunk) for head in heads]
    trained = {parameter: None for run in runs for parameter in run.parameters() if parameter.requires_grad}
    if not torch.is_grad_enabled():  # evaluation: nothing asks for gradients
        hidden, trained = hidden.detach(), {}
    return _ChunkedLoss.apply(hidden, targets, scales, runs, *trained)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, scales, heads, *parameters):
        hidden_gradient = (
            torch.zeros_like(hidden, dtype=accumulation_dtype(hidden)) if ctx.needs_input_grad[0] else None
        )
        sums = torch.zeros(len(heads), dtype=torch.float32, device=hidden.device)
        hits = torch.zeros(len(heads), dtype=torch.long, device=hidden.device)
        last_use = {parameter: i for i, head in enumerate(heads) for parameter in head.parameters()}
        gradients: dict[nn.Parameter, Tensor] = {}
        for i, (head, rows) in enumerate(zip(heads, _valid_rows(targets), strict=True)):
            # Sums over chunks and heads in fp32: in bf16 each further one would lose the low bits of the sum before.
            mine = [p for p in head.parameters() if p.requires_grad and parameters]
            gradients |= {p: torch.zeros_like(p, dtype=accumulation_dtype(p)) for p in mine if p not in gradients}
            for chunk in head.chunks(rows):
                losses, right = head.run(hidden, chunk, targets[i, chunk], scales[i], hidden_gradient, gradients)
                sums[i] += losses.sum()
                hits[i] += right.sum()
            head.release()
            gradients |= {p: _kept(gradients[p], p.dtype) for p in mine if last_use[p] == i}
        ctx.dtypes = [t.dtype for t in (hidden, *parameters)]
        ctx.gradients = [hidden_gradient, *(gradients[p] for p in parameters)]
        if hidden_gradient is not None:
            ctx.gradients[0] = _kept(hidden_gradient, hidden.dtype)
        ctx.mark_non_differentiable(sums, hits)
        return (sums * scales).sum(), sums, hits

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("The leap loss hands out its gradients once: call backward once for each forward.")
        gradients, ctx.gradients = ctx.gradients, None
        # In place: the sums are as large as the unembeddings, and autograd may take them over as they are.
        scaled = [
            None if gradient is None else gradient.mul_(grad_loss.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return scaled[0], None, None, None, *scaled[1:]


def _kept(total: Tensor, dtype: torch.dtype) -> Tensor:
    """A finished sum as it waits for the backward: in its tensor's dtype, but fp16 only after the loss scale is in it."""
    return total if dtype == torch.float16 else total.to(dtype)


class _HeadRun:
    """One head's share of the loss."""

    def __init__(self, head: HeadSpec, row_loss: RowLoss, softcap: float | None, rows_per_chunk: int | None):
        self.head, self.row_loss, self.softcap = head, row_loss, softcap
        self.linear = as_plain_linear(head.unembedding)
        self.rows_per_chunk = rows_per_chunk
        self._weight: Tensor | None = None  # (vocabulary, hidden) in the dtype that is computed in
        self._logits: Tensor | None = None  # (rows, vocabulary) storage of one chunk's logits

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.head.parameters
        yield from (self.linear or self.head.unembedding).parameters()

    def chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        """``rows`` in equal parts: a small last one would read the whole unembedding for a few rows."""
        if not len(rows):
            return ()
        dtype = computed_in(self.linear.weight) if self.linear else torch.float32
        most = self.rows_per_chunk or chunk_rows(self.head.vocab_size, rows.device, dtype)
        return rows.tensor_split(-(-len(rows) // most))

    def release(self) -> None:
        self._weight = self._logits = None

    def run(self, hidden, rows, targets, scale, hidden_gradient, gradients) -> tuple[Tensor, Tensor]:
        """Losses and hits of a chunk; its gradients, times ``scale``, are added to those given."""
        blocks = [p for p in self.head.parameters if p in gradients]
        inputs = hidden[rows].requires_grad_(hidden_gradient is not None)
        with torch.set_grad_enabled(bool(blocks) or inputs.requires_grad):
            features = self.head.features(inputs)
        project = self._project_by_autograd if self.linear is None else self._project
        losses, hits, gradient = project(features.detach(), targets, scale, gradients, features.requires_grad)
        if gradient is not None:
            wanted = [inputs] * inputs.requires_grad + blocks
            # Scaled only when they are summed up, in fp32: a scale is about one over all tokens, too small for fp16.
            found = list(torch.autograd.grad(features, wanted, gradient.to(features.dtype)))
            if inputs.requires_grad:
                hidden_gradient.index_add_(0, rows, found.pop(0).to(hidden_gradient.dtype) * scale)
            for parameter, part in zip(blocks, found, strict=True):
                gradients[parameter] += part.to(gradients[parameter].dtype) * scale
        return losses, hits

    def _project(self, features, targets, scale, gradients, features_need):
        """Losses, hits and, where asked for, the features' gradient before ``scale``."""
        weight, bias = self.linear.weight, self.linear.bias
        if self._weight is None:
            self._weight = weight.detach().to(computed_in(weight))
        features = features.to(self._weight.dtype)
        if self._logits is None or len(self._logits) < len(
            features
        ):  # reused: page faults on a new allocation are slow
            self._logits = features.new_empty(len(features), self.head.vocab_size)
        logits = torch.mm(features, self._weight.t(), out=self._logits[: len(features)])
        if bias is not None:
            logits += bias.detach()
        losses, hits = self.row_loss(logits, targets, self.softcap)
        if weight in gradients:
            _add_product_(gradients[weight], logits, features, scale)
        if bias is not None and bias in gradients:
            gradients[bias] += logits.sum(0, dtype=gradients[bias].dtype) * scale
        return losses, hits, logits @ self._weight if features_need else None

    def _project_by_autograd(self, features, targets, scale, gradients, features_need):
        """The same through the unembedding's own backward."""
        trained = [p for p in self.head.unembedding.parameters() if p in gradients]
        features.requires_grad_(features_need)
        with torch.set_grad_enabled(features_need or bool(trained)):
            logits = self.head.unembedding(cast_like(features, self.head.unembedding))
        gradient = logits.detach()  # the same storage, which no linear layer keeps for its backward
        losses, hits = self.row_loss(gradient, targets, self.softcap)
        wanted = [features] * features_need + trained
        found = list(torch.autograd.grad(logits, wanted, gradient, allow_unused=True)) if wanted else []
        feature_gradient = found.pop(0) if features_need else None
        for parameter, part in zip(trained, found, strict=True):
            if part is not None:
                gradients[parameter] += part.to(gradients[parameter].dtype) * scale
        return losses, hits, feature_gradient


def _valid_rows(targets: Tensor) -> tuple[Tensor, ...]:
    """Of each head the rows with a target. The host waits for the device here, for all heads together."""
    heads, rows = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows.split(torch.bincount(heads, minlength=len(targets)).tolist())


def _add_product_(total: Tensor, logits: Tensor, features: Tensor, scale: Tensor) -> None:
    """``total += scale * logits.T @ features`` without a second matrix of total's size."""
    if total.dtype == logits.dtype:
        total.addmm_(logits.t(), features * scale)
        return
    # The product comes unscaled and is scaled in total's dtype, see above.
    rows = max(1, _PRODUCT_BYTES // (total.shape[1] * total.element_size()))
    for part, columns in zip(total.split(rows), logits.split(rows, dim=1)):
        part.addcmul_((columns.t() @ features).to(total.dtype), scale.to(total.dtype))
