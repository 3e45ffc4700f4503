"""Cross-entropy of a block of logits, which turns into its own gradient in place.

With ``p = softmax(logits)`` the loss of a row is ``-log p[target]`` and its gradient is ``p - onehot(target)``: as large as
the logits, and written over them. Two implementations with the same contract: this one in plain torch, and
:mod:`.softmax_triton` in one kernel for CUDA.
"""

import torch
from torch import Tensor


# Logits that one pass works on. On a CPU the block goes through five passes, and 4 MB of it stay in the caches between
# them: 6 rows of 152,064 fp32 logits. On a GPU each pass is a kernel launch, so the blocks are larger.
_BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits squeezed into -softcap .. softcap, as the base model's own are; unchanged if the model has no soft cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def softmax_gradient_(logits: Tensor, targets: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Losses and top-1 hits of every row; ``logits`` then holds the gradient of the summed loss by the raw logits.

    Args:
        logits: (rows, vocabulary) in fp32, bf16, fp16 or fp64, overwritten; arithmetic is fp32 or wider.
        targets: (rows,) token ids inside the vocabulary.
        softcap: where the model squeezes raw logits into ``softcap * tanh(logits / softcap)`` first.

    Returns:
        losses: (rows,) fp32.
        hits: (rows,) bool, whether no logit is above the target's.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    block = max(1, _BLOCK_BYTES.get(logits.device.type, _BLOCK_BYTES["cuda"]) // (logits.shape[1] * wide.itemsize))
    losses, hits = [], []
    for rows, row_targets in zip(logits.split(block), targets.unsqueeze(-1).split(block)):
        x = rows.to(wide)  # the logits themselves where they are as wide
        capped = x.div_(softcap).tanh_().clone() if softcap else None
        if softcap:
            x.mul_(softcap)
        target = x.gather(-1, row_targets)
        top = x.amax(-1, keepdim=True)
        total = x.sub_(top).exp_().sum(-1, keepdim=True)
        losses.append((total.log() + top - target).squeeze(-1))
        hits.append((target >= top).squeeze(-1))
        x.div_(total).scatter_add_(-1, row_targets, x.new_full((), -1.0).expand(row_targets.shape))
        if softcap:
            x.mul_(capped.square_().neg_().add_(1))  # the derivative of tanh
        if x is not rows:
            rows.copy_(x)
    return torch.cat(losses).float(), torch.cat(hits)
