"""The readable twin of :mod:`.chunked`: every head's logits at once, gradients by autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import cast_like
from .head_spec import HeadSpec
from .rows import cross_entropy
from .targets import IGNORE_INDEX


def eager_loss(
    hidden: Tensor, targets: Tensor, scales: Tensor, heads: Sequence[HeadSpec], *, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of all heads.

    Args:
        hidden: (rows, hidden) final hidden states.
        targets: (heads, rows) token ids, -100 where masked.
        scales: (heads,) what each head's loss sum is multiplied by.
        heads: in the order of the targets.
        softcap: the model's ``final_logit_softcapping``.

    Returns:
        Scalar fp32 loss with gradient; (heads,) fp32 loss sums, not scaled; (heads,) int64 top-1 hits.
    """
    sums, hits = [], []
    for head, head_targets in zip(heads, targets, strict=True):
        logits = head.unembedding(cast_like(head.features(hidden), head.unembedding))  # (rows, vocabulary)
        losses, is_hit = cross_entropy(logits, head_targets.clamp(min=0), softcap)  # (rows,), (rows,)
        is_valid = head_targets != IGNORE_INDEX
        sums.append(losses.where(is_valid, 0.0).sum())
        hits.append((is_hit & is_valid).sum())
    sums = torch.stack(sums)
    return (sums * scales).sum(), sums.detach(), torch.stack(hits)
