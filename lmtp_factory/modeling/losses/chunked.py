"""Cross-entropy of all heads in one autograd function, one chunk of tokens at a time.

Rows with masked targets are dropped first. The forward computes the gradients of each chunk while its logits exist. So
a head costs three matmuls with its unembedding: logits, gradient of the features, gradient of the weight (two if the
weight is frozen). Recomputing the logits in the backward would cost four. Weights are used in the forward only, where
ZeRO-3 has gathered them. The price is memory: the gradient of every trained weight exists from the forward to the
backward.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .. import onednn
from ..dtypes import accumulation_dtype, cast_like, compute_dtype
from .head_spec import HeadSpec
from .implementation import as_plain_linear
from .rows import RowLoss
from .targets import IGNORE_INDEX


# Bytes of logits in one chunk. For each element of the unembedding a chunk does 6 * rows operations and moves 16 bytes
# in fp32 (12 in bf16): it reads the element twice, and reads and writes its fp32 gradient. A chunk is bound by
# arithmetic from about 30 rows on a CPU (200 GFLOP/s, 20 GB/s) and 400 rows on an H200 (990 TFLOP/s in bf16, 4.8 TB/s).
# Vocabulary 152,064: 256 MiB hold 441 fp32 rows and 1 GiB 3,530 bf16 rows. Vocabulary 262,144: 256 and 2,048 rows.
LOGIT_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}

# Temporary memory of a weight's gradient where the matmul cannot add in place (oneDNN's, or of another dtype): a block of
# the product, and of the logits, which oneDNN makes contiguous.
_PRODUCT_BYTES = 64 * 2**20


def chunk_rows(vocab_size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    """Return the number of rows of logits that fit into `LOGIT_BYTES`, at least 1."""
    return max(1, LOGIT_BYTES.get(device.type, LOGIT_BYTES["cpu"]) // (dtype.itemsize * vocab_size))


@torch.compiler.disable  # graph break: the number of chunks changes from step to step
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
    """Compute the loss of all heads, one chunk of valid rows at a time; same numbers as `eager_loss`.

    A head without valid targets has zero loss and zero gradients, but stays in the graph, because distributed gradient
    reduction waits for every parameter.

    Args:
        hidden: (rows, hidden) hidden states, for each distinct `first_row` of the heads.
        targets: (heads, rows) indices of the heads' logits, -100 where masked.
        scales: (heads,) factors of the heads' loss sums.
        heads: Heads in the order of `targets`.
        row_loss: In-place form of the row loss, see `rows.py`.
        softcap: The model's `final_logit_softcapping`.
        rows_per_chunk: Rows of logits in one chunk. Default `chunk_rows`.

    Returns:
        Scalar fp32 loss with gradient; (heads,) unscaled fp32 loss sums; (heads,) int64 top-1 hits.
    """
    runs = [_HeadRun(head, row_loss, softcap, rows_per_chunk) for head in heads]
    trained = {parameter: None for run in runs for parameter in run.parameters() if parameter.requires_grad}
    if not torch.is_grad_enabled():  # evaluation: without differentiable inputs the function computes no gradients
        hidden, trained = hidden.detach(), {}
    return _ChunkedLoss.apply(hidden, targets, scales, runs, *trained)


class _ChunkedLoss(torch.autograd.Function):
    """Autograd function whose forward also computes the gradients; the backward only multiplies them by `grad_loss`."""

    @staticmethod
    def forward(ctx, hidden, targets, scales, heads, *parameters):
        # Accumulated over all heads: (rows, hidden).
        hidden_gradient = (
            torch.zeros_like(hidden, dtype=accumulation_dtype(hidden)) if ctx.needs_input_grad[0] else None
        )
        sums = torch.zeros(len(heads), dtype=torch.float32, device=hidden.device)
        hits = torch.zeros(len(heads), dtype=torch.long, device=hidden.device)
        # After the last head that uses a parameter, its gradient can be cast down to the parameter's dtype.
        last_use = {parameter: i for i, head in enumerate(heads) for parameter in head.parameters()}
        gradients: dict[nn.Parameter, Tensor] = {}
        for i, (head, rows) in enumerate(zip(heads, _valid_rows(targets), strict=True)):
            # Gradients are accumulated in fp32: bf16 additions would lose the low bits at every chunk.
            trained = [p for p in head.parameters() if p.requires_grad and parameters]
            gradients |= {p: torch.zeros_like(p, dtype=accumulation_dtype(p)) for p in trained if p not in gradients}
            for chunk in head.chunks(rows):  # (rows of the chunk,)
                losses, right = head.run(hidden, chunk, targets[i, chunk], scales[i], hidden_gradient, gradients)
                sums[i] += losses.sum()
                hits[i] += right.sum()
            head.release()
            gradients |= {p: _stored(gradients[p], p.dtype) for p in trained if last_use[p] == i}
        ctx.dtypes = [t.dtype for t in (hidden, *parameters)]
        ctx.gradients = [hidden_gradient, *(gradients[p] for p in parameters)]
        if hidden_gradient is not None:
            ctx.gradients[0] = _stored(hidden_gradient, hidden.dtype)
        ctx.mark_non_differentiable(sums, hits)
        return (sums * scales).sum(), sums, hits

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "The leap loss frees its gradients after one backward: call backward once for each forward."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In place, because the gradients are as large as the unembeddings; autograd may adopt them without a copy.
        scaled = [
            None if gradient is None else gradient.mul_(grad_loss.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return scaled[0], None, None, None, *scaled[1:]


def _stored(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast an accumulated gradient to `dtype`, except fp16, which would underflow before the loss scale is applied."""
    return total if dtype == torch.float16 else total.to(dtype)


class _HeadRun:
    """The loss of one head, with buffers that its chunks share."""

    def __init__(self, head: HeadSpec, row_loss: RowLoss, softcap: float | None, rows_per_chunk: int | None):
        self.head, self.row_loss, self.softcap = head, row_loss, softcap
        self.linear = as_plain_linear(head.unembedding)
        self.rows_per_chunk = rows_per_chunk
        self._weight: Tensor | None = None  # (vocabulary, hidden) in the compute dtype
        self._logits: Tensor | None = None  # (rows, vocabulary) buffer of one chunk's logits

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the blocks and of the unembedding, trained or not."""
        yield from self.head.parameters
        yield from (self.linear or self.head.unembedding).parameters()

    def chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split `rows` into chunks of equal size: a small last chunk would read the unembedding for a few rows."""
        if not len(rows):
            return ()
        dtype = compute_dtype(self.linear.weight) if self.linear else torch.float32
        most = self.rows_per_chunk or chunk_rows(self.head.vocab_size, rows.device, dtype)
        return rows.tensor_split(-(-len(rows) // most))

    def release(self) -> None:
        """Free the buffers."""
        self._weight = self._logits = None

    def run(self, hidden, rows, targets, scale, hidden_gradient, gradients) -> tuple[Tensor, Tensor]:
        """Return the losses and hits of a chunk; add its gradients times `scale` to `hidden_gradient` and `gradients`.

        Args:
            hidden: (all rows, hidden) hidden states.
            rows: (rows,) numbers of the chunk's rows in the batch.
            targets: (rows,) token ids.
            scale: Scalar factor of the head's loss sum.
            hidden_gradient: (all rows, hidden) accumulator, or None if the hidden states need no gradient.
            gradients: Accumulators of the trained parameters.
        """
        blocks = [p for p in self.head.parameters if p in gradients]
        own = self.head.first_row + rows  # (rows,) indices into `hidden`
        inputs = hidden[own].requires_grad_(hidden_gradient is not None)  # (rows, hidden)
        with torch.set_grad_enabled(bool(blocks) or inputs.requires_grad):
            features = self.head.features(inputs, rows)  # (rows, hidden), with a graph back to `inputs` and the blocks
        project = self._project_by_autograd if self.linear is None else self._project
        losses, hits, feature_gradient = project(features.detach(), targets, scale, gradients, features.requires_grad)
        if feature_gradient is not None:
            differentiable = [inputs] * inputs.requires_grad + blocks
            # `scale` is about 1 / tokens, too small for fp16, so it is applied to the fp32 accumulators only.
            parts = list(torch.autograd.grad(features, differentiable, feature_gradient.to(features.dtype)))
            if inputs.requires_grad:
                hidden_gradient.index_add_(0, own, parts.pop(0).to(hidden_gradient.dtype) * scale)
            for parameter, part in zip(blocks, parts, strict=True):
                gradients[parameter] += part.to(gradients[parameter].dtype) * scale
        return losses, hits

    def _project(self, features, targets, scale, gradients, features_need):
        """Return losses, hits and, if `features_need`, the unscaled (rows, hidden) gradient of the features."""
        weight, bias = self.linear.weight, self.linear.bias  # (vocabulary, hidden), (vocabulary,)
        if self._weight is None:
            self._weight = weight.detach().to(compute_dtype(weight))
        features = features.to(self._weight.dtype)
        logits = self._multiply(features, self._weight.t())  # (rows, vocabulary)
        if bias is not None:
            logits += bias.detach()
        losses, hits = self.row_loss(logits, targets, self.softcap)
        # From here on `logits` holds the gradient of the loss with respect to the logits.
        if weight in gradients:
            _add_product_(gradients[weight], logits, features, scale)
        if bias is not None and bias in gradients:
            gradients[bias] += logits.sum(0, dtype=gradients[bias].dtype) * scale
        return losses, hits, onednn.mm(logits, self._weight) if features_need else None  # (rows, hidden)

    def _multiply(self, features: Tensor, weight: Tensor) -> Tensor:
        """Multiply (rows, hidden) by (hidden, vocabulary), into a buffer where possible."""
        if onednn.usable(features, weight):
            return onednn.mm(features, weight)
        # Reuse the buffer: page faults on a new allocation are slow.
        if self._logits is None or len(self._logits) < len(features):
            self._logits = features.new_empty(len(features), self.head.vocab_size)
        return torch.mm(features, weight, out=self._logits[: len(features)])

    def _project_by_autograd(self, features, targets, scale, gradients, features_need):
        """Do the same with autograd, for an unembedding that is not a plain linear layer (quantised, LoRA)."""
        trained = [p for p in self.head.unembedding.parameters() if p in gradients]
        features.requires_grad_(features_need)
        with torch.set_grad_enabled(features_need or bool(trained)):
            logits = self.head.unembedding(cast_like(features, self.head.unembedding))  # (rows, vocabulary)
        gradient = logits.detach()  # shares memory with `logits`, which the backward of a linear layer does not read
        losses, hits = self.row_loss(gradient, targets, self.softcap)
        differentiable = [features] * features_need + trained
        parts = list(torch.autograd.grad(logits, differentiable, gradient, allow_unused=True)) if differentiable else []
        feature_gradient = parts.pop(0) if features_need else None  # (rows, hidden)
        for parameter, part in zip(trained, parts, strict=True):
            if part is not None:
                gradients[parameter] += part.to(gradients[parameter].dtype) * scale
        return losses, hits, feature_gradient


def _valid_rows(targets: Tensor) -> tuple[Tensor, ...]:
    """Return each head's indices of rows with a valid target. The host waits for the device once for all heads."""
    heads, rows = (targets != IGNORE_INDEX).nonzero(as_tuple=True)  # two of shape (valid targets,), sorted by head
    return rows.split(torch.bincount(heads, minlength=len(targets)).tolist())


def _add_product_(total: Tensor, logits: Tensor, features: Tensor, scale: Tensor) -> None:
    """Compute `total += scale * logits.T @ features` with at most `_PRODUCT_BYTES` of temporary memory.

    Args:
        total: (vocabulary, hidden) accumulated gradient.
        logits: (rows, vocabulary) gradient of the logits.
        features: (rows, hidden).
        scale: Scalar.
    """
    if total.dtype == logits.dtype and not onednn.usable(logits, features):
        total.addmm_(logits.t(), features * scale)
        return
    # A block of the vocabulary at a time. The product is scaled in fp32: `scale` is too small for fp16.
    rows = max(1, _PRODUCT_BYTES // (total.element_size() * (total.shape[1] + len(features))))
    for part, columns in zip(total.split(rows), logits.split(rows, dim=1)):  # (block, hidden), (rows, block)
        part.addcmul_(onednn.mm(columns.t(), features).to(total.dtype), scale.to(total.dtype))
