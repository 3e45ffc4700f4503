"""Cross-entropy that overwrites the logits with their gradient, in plain torch.

With `p = softmax(logits)` the loss of a row is `-log p[target]` and its gradient is `p - onehot(target)`. The gradient has
the shape of the logits and is written over them. `softmax_triton.py` does the same in one CUDA kernel.
"""

import torch
from torch import Tensor


# Bytes of logits in one block. On a CPU five passes read each block, and a block of 4 MB stays in the L2 and L3 caches
# between them: 6 rows of 152,064 fp32 logits. On a GPU each pass is a kernel launch, so blocks are larger.
_BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return `softcap * tanh(logits / softcap)`, or `logits` unchanged if the model has no soft cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def softmax_gradient_(logits: Tensor, targets: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Compute losses and top-1 hits; overwrite `logits` with the gradient of the summed loss.

    Args:
        logits: (rows, vocabulary) raw logits in fp32, bf16, fp16 or fp64. Arithmetic is fp32 or fp64.
        targets: (rows,) token ids inside the vocabulary.
        softcap: The model's `final_logit_softcapping`. The gradient is with respect to the logits before the soft cap.

    Returns:
        losses: (rows,) fp32.
        hits: (rows,) bool, True if no logit is larger than the target's.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    block = max(1, _BLOCK_BYTES.get(logits.device.type, _BLOCK_BYTES["cuda"]) // (logits.shape[1] * dtype.itemsize))
    losses, hits = [], []
    for rows, row_targets in zip(logits.split(block), targets.unsqueeze(-1).split(block)):
        x = rows.to(dtype)  # (block, vocabulary); shares memory with `rows` if the dtype is unchanged
        capped = x.div_(softcap).tanh_().clone() if softcap else None  # (block, vocabulary) tanh(x / softcap)
        if softcap:
            x.mul_(softcap)
        target = x.gather(-1, row_targets)  # (block, 1)
        top = x.amax(-1, keepdim=True)  # (block, 1); subtracted so that exp cannot overflow
        total = x.sub_(top).exp_().sum(-1, keepdim=True)  # (block, 1)
        losses.append((total.log() + top - target).squeeze(-1))
        hits.append((target >= top).squeeze(-1))
        # x becomes p - onehot(target).
        x.div_(total).scatter_add_(-1, row_targets, x.new_full((), -1.0).expand(row_targets.shape))
        if softcap:
            x.mul_(capped.square_().neg_().add_(1))  # tanh' = 1 - tanh^2
        if x is not rows:
            rows.copy_(x)
    return torch.cat(losses).float(), torch.cat(hits)
