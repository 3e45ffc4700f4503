"""Reference implementation of the leap loss: each head's logits for all rows, gradients by autograd."""

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
    """Compute the loss of all heads.

    Args:
        hidden: (rows, hidden) hidden states, for each distinct `first_row` of the heads.
        targets: (heads, rows) indices of the heads' logits, -100 where masked.
        scales: (heads,) factors of the heads' loss sums.
        heads: Heads in the order of `targets`.
        softcap: The model's `final_logit_softcapping`.

    Returns:
        Scalar fp32 loss with gradient; (heads,) unscaled fp32 loss sums; (heads,) int64 top-1 hits.
    """
    sums, hits = [], []
    rows = torch.arange(targets.shape[1], device=hidden.device)
    for head, head_targets in zip(heads, targets, strict=True):
        own = hidden[head.first_row : head.first_row + len(rows)]  # (rows, hidden)
        features = head.features(own, rows)  # (rows, hidden)
        logits = head.unembedding(cast_like(features, head.unembedding))  # (rows, vocabulary)
        # Masked targets become token 0, a valid index. `where` then removes their losses and their gradients.
        losses, is_hit = cross_entropy(logits, head_targets.clamp(min=0), softcap)  # (rows,), (rows,)
        is_valid = head_targets != IGNORE_INDEX  # (rows,)
        sums.append(losses.where(is_valid, 0.0).sum())
        hits.append((is_hit & is_valid).sum())
    sums = torch.stack(sums)  # (heads,)
    return (sums * scales).sum(), sums.detach(), torch.stack(hits)
