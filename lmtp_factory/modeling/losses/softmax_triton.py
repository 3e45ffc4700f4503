"""Cross-entropy of a block of logits, which turns into its own gradient in place: one Triton kernel for CUDA.

The plain twin is :mod:`.softmax`. Sweeps over the logits in memory, which bound both:

=================== =========================== ===========================
                    reads                       writes
=================== =========================== ===========================
this kernel         2, in the logits' dtype     1, in the logits' dtype
plain torch, fp32   5                           3
plain torch, bf16   1 in bf16, 6 in fp32        1 in bf16, 4 in fp32
=================== =========================== ===========================

Without a softcap, that is, which adds nine reads and eight writes to plain torch and none here. The maximum and the sum
of exponentials take one sweep together, since a sum can be rescaled when a larger maximum turns up (Milakov and
Gimelshein, arXiv 1805.02867); the gradient needs the finished sum, hence the second.

Only the caller that chose this path imports this module: it needs Triton, which torch brings on Linux alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


# 16 KB of bf16 a load. By Little's law an H100 (3.35 TB/s, some 0.6 us from memory) is kept busy by 2 MB under way, 15 KB
# for each of its 132 multiprocessors; an A100 by less. At 16 elements a thread ptxas gives bf16 64 registers, so two
# programs of 16 warps fill a multiprocessor, and one reads while the other waits for its sums. Of more programs with
# smaller blocks the L2 cache would hold a smaller part of each row for the second sweep. (Derived, not measured.)
_BLOCK = 8192
_PER_THREAD = 16


def softmax_gradient_(logits: Tensor, targets: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Losses and top-1 hits of every row; ``logits`` then holds the gradient of the summed loss by the raw logits.

    Args:
        logits: (rows, vocabulary) in fp32, bf16 or fp16, overwritten; arithmetic is fp32. Rows may lie any distance apart.
        targets: (rows,) token ids inside the vocabulary.
        softcap: where the model squeezes raw logits into ``softcap * tanh(logits / softcap)`` first.

    Returns:
        losses: (rows,) fp32.
        hits: (rows,) bool, whether no logit is above the target's.

    Raises:
        TypeError: other dtypes.
        ValueError: the logits of a row do not lie side by side.
    """
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"the kernel computes in fp32, not for logits in {logits.dtype}")
    rows, vocabulary = logits.shape
    if vocabulary > 1 and logits.stride(1) != 1:
        raise ValueError(f"the logits of a row lie {logits.stride(1)} elements apart instead of 1")
    losses = logits.new_empty(rows, dtype=torch.float32)
    hits = logits.new_empty(rows, dtype=torch.bool)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        with torch.cuda.device_of(logits):  # Triton launches on the current device, wherever the tensors are
            _softmax_gradient[(rows,)](
                logits,
                targets.contiguous(),
                losses,
                hits,
                logits.stride(0),
                float(softcap) if softcap else None,
                VOCABULARY=vocabulary,
                BLOCK=block,
                num_warps=max(1, block // (32 * _PER_THREAD)),
            )
    return losses, hits


@triton.jit
def _softmax_gradient(logits, targets, losses, hits, stride, softcap, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    # The vocabulary is a constant for the sake of Triton 3.6's interpreter, whose loops cannot end at an argument under
    # numpy 2.4. A model has but one.
    row = tl.program_id(0).to(tl.int64)  # a few thousand rows of 262,144 logits exceed 32 bits
    logits += row * stride
    target = tl.load(targets + row).to(tl.int32)
    target_logit = _capped(tl.load(logits + target).to(tl.float32), softcap)
    columns = tl.arange(0, BLOCK)

    # Each lane keeps a maximum and a sum of its own, so no block waits for a reduction. The start is finite because
    # (-inf) - (-inf) is not a number; the first logit of a lane rescales an empty sum.
    top = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + columns < VOCABULARY
        x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, _capped(x, softcap), float("-inf"))
        # Of exp(top - new top) and exp(x - new top) one is 1, and the other is this.
        smaller = tl.exp(-tl.abs(x - top))
        total = tl.where(x > top, total * smaller + 1, total + smaller)
        top = tl.maximum(top, x)
    row_top = tl.max(top, 0)
    row_total = tl.sum(total * tl.exp(top - row_top), 0)
    tl.store(losses + row, tl.log(row_total) + (row_top - target_logit))
    tl.store(hits + row, target_logit >= row_top)

    tl.debug_barrier()  # every thread has read the target's logit and its own before any is overwritten
    # Backwards: what was read last is what the caches still hold.
    last = (VOCABULARY - 1) // BLOCK * BLOCK
    for done in range(0, VOCABULARY, BLOCK):
        at = last - done + columns
        x = tl.load(logits + at, mask=at < VOCABULARY, other=0.0).to(tl.float32)
        gradient = tl.exp(_capped(x, softcap) - row_top) * (1 / row_total) - tl.where(at == target, 1.0, 0.0)
        gradient *= _slope(x, softcap)
        tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < VOCABULARY)


@triton.jit
def _capped(x, softcap):
    if softcap is None:
        return x
    else:
        decay = tl.exp(tl.abs(x) * (-2 / softcap))  # at most 1, where the usual exp(2 x) overflows
        tanh = (1 - decay) * (1 / (1 + decay))
        return tl.where(x < 0, -tanh, tanh) * softcap


@triton.jit
def _slope(x, softcap):
    """The derivative of :func:`_capped`."""
    if softcap is None:
        return 1.0
    else:
        decay = tl.exp(tl.abs(x) * (-2 / softcap))
        inverse = 1 / (1 + decay)
        return 4 * decay * inverse * inverse
