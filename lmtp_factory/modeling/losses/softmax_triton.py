"""Cross-entropy that overwrites the logits with their gradient, in one Triton kernel for CUDA.

`softmax.py` does the same in plain torch. Both are bound by memory traffic. Passes over the logits without a soft cap:

=================== =========================== ===========================
                    reads                       writes
=================== =========================== ===========================
this kernel         2, in the logits' dtype     1, in the logits' dtype
plain torch, fp32   5                           3
plain torch, bf16   1 in bf16, 6 in fp32        1 in bf16, 4 in fp32
=================== =========================== ===========================

A soft cap adds nine reads and eight writes to plain torch and none to the kernel. The maximum and the sum of exponentials
share one pass: the sum is rescaled when a larger maximum is found (online softmax, Milakov and Gimelshein, arXiv
1805.02867). The gradient needs the final sum, hence the second pass.

Import this module only if implementation `triton` was chosen: torch installs Triton on Linux only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


# One load of a block is 16 KB in bf16. By Little's law an H100 (3.35 TB/s, latency 0.6 us) needs 2 MB in flight, 15 KB for
# each of its 132 multiprocessors; an A100 needs less. With 16 elements per thread ptxas uses 64 registers for bf16, so two
# programs of 16 warps fill a multiprocessor: one reads while the other waits for its reduction. Smaller blocks would mean
# more programs at once, and the L2 cache would hold less of each row for the second pass. (Derived, not measured.)
_BLOCK = 8192
_PER_THREAD = 16


def softmax_gradient_(logits: Tensor, targets: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Compute losses and top-1 hits; overwrite `logits` with the gradient of the summed loss.

    Args:
        logits: (rows, vocabulary) raw logits in fp32, bf16 or fp16. Rows may have any stride. Arithmetic is fp32.
        targets: (rows,) token ids inside the vocabulary.
        softcap: The model's `final_logit_softcapping`. The gradient is with respect to the logits before the soft cap.

    Returns:
        losses: (rows,) fp32.
        hits: (rows,) bool, True if no logit is larger than the target's.

    Raises:
        TypeError: The logits have another dtype.
        ValueError: The logits of a row are not contiguous.
    """
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"The logits are {logits.dtype}, but the kernel takes fp32, bf16 and fp16: use the torch implementation."
        )
    rows, vocabulary = logits.shape
    if vocabulary > 1 and logits.stride(1) != 1:
        raise ValueError(f"The logits of a row are {logits.stride(1)} elements apart: make the rows contiguous.")
    losses = logits.new_empty(rows, dtype=torch.float32)
    hits = logits.new_empty(rows, dtype=torch.bool)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        with torch.cuda.device_of(logits):  # Triton launches on the current device, not on the tensors' device
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
    # VOCABULARY is a constexpr because loops of Triton 3.6's interpreter cannot end at an argument under numpy 2.4. This
    # costs one compilation per model.
    row = tl.program_id(0).to(tl.int64)  # offsets of a few thousand rows of 262,144 logits exceed 32 bits
    logits += row * stride
    target = tl.load(targets + row).to(tl.int32)
    target_logit = _capped(tl.load(logits + target).to(tl.float32), softcap)
    columns = tl.arange(0, BLOCK)

    # Each lane keeps its own maximum and sum, so the loop has no reduction. The initial maximum is the lowest finite fp32
    # number, because (-inf) - (-inf) is NaN; the lane's first logit then rescales an empty sum.
    top = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + columns < VOCABULARY
        x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, _capped(x, softcap), float("-inf"))
        # With new_top = max(top, x), one of exp(top - new_top) and exp(x - new_top) is 1 and the other is this:
        smaller = tl.exp(-tl.abs(x - top))
        total = tl.where(x > top, total * smaller + 1, total + smaller)
        top = tl.maximum(top, x)
    row_top = tl.max(top, 0)
    row_total = tl.sum(total * tl.exp(top - row_top), 0)
    tl.store(losses + row, tl.log(row_total) + (row_top - target_logit))
    tl.store(hits + row, target_logit >= row_top)

    tl.debug_barrier()  # every thread must have read the target's logit before it is overwritten
    # From the last block to the first: the caches still hold the blocks that were read last.
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
        decay = tl.exp(tl.abs(x) * (-2 / softcap))  # at most 1; exp(2 x) would overflow
        tanh = (1 - decay) * (1 / (1 + decay))
        return tl.where(x < 0, -tanh, tanh) * softcap


@triton.jit
def _slope(x, softcap):
    """Return the derivative of `_capped`."""
    if softcap is None:
        return 1.0
    else:
        decay = tl.exp(tl.abs(x) * (-2 / softcap))
        inverse = 1 / (1 + decay)
        return 4 * decay * inverse * inverse
