"""The readable twin of :mod:`.chunked`: every head's logits at once, gradients by autograd."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .targets import IGNORE_INDEX


def eager_cross_entropy(
    hidden: Tensor, targets: Tensor, scales: Tensor, heads: Sequence[Callable[[Tensor], Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of all heads.

    Args:
        hidden: (rows, hidden) final hidden states.
        targets: (heads, rows) token ids, -100 where masked.
        scales: (heads,) what each head's loss sum is multiplied by.
        heads: (rows, hidden) -> (rows, vocabulary) logits.

    Returns:
        Scalar fp32 loss with gradient; (heads,) fp32 loss sums, not scaled; (heads,) int64 top-1 hits.
    """
    sums, hits = [], []
    for head, head_targets in zip(heads, targets, strict=True):
        logits = head(hidden).float()
        sums.append(F.cross_entropy(logits, head_targets, ignore_index=IGNORE_INDEX, reduction="sum"))
        target = logits.detach().gather(-1, head_targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        hits.append(((target >= logits.detach().amax(-1)) & (head_targets != IGNORE_INDEX)).sum())
    sums = torch.stack(sums)
    return (sums * scales).sum(), sums.detach(), torch.stack(hits)
