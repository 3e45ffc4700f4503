"""Leap-MTP loss: cross-entropy of every head against its own target (L-MTP, arXiv 2505.17505, equations 4 and 5).

    stage 1:  L = sum_{i>=1} w_i CE_i                          w_i = head_decay ** (i - 1)
    stage 2:  L = CE_0 + head_weight * sum_{i>=1} w_i CE_i

Head `i` at position `s` is trained on `labels[s + offsets[i]]` (`targets.py`). Each head's loss is averaged over its
own valid targets. Two implementations give the same numbers. The caller chooses one; neither falls back to the other:

============= ================================ ===================================================
module        peak memory of the logits        gradients
============= ================================ ===================================================
eager         heads x rows x vocabulary        autograd, in the backward
chunked       one chunk x vocabulary           per chunk, in the forward, while its logits exist
============= ================================ ===================================================

The chunked loss overwrites logits with their gradient. `rows.py` defines the loss of a row, `implementation.py` chooses
the implementation, and `head_spec.py` describes a head to the loss.
"""

from collections.abc import Sequence

from torch import Tensor

from .chunked import chunked_loss
from .eager import eager_loss
from .head_spec import HeadSpec
from .rows import in_place_cross_entropy


__all__ = ["HeadSpec", "leap_loss"]


def leap_loss(
    hidden: Tensor,
    targets: Tensor,
    scales: Tensor,
    heads: Sequence[HeadSpec],
    *,
    softcap: float | None = None,
    implementation: str = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss of all heads.

    Args:
        hidden: (rows, hidden) hidden states, for each distinct `first_row` of the heads.
        targets: (heads, rows) indices of the heads' logits, -100 where masked.
        scales: (heads,) factors of the heads' loss sums.
        heads: Heads in the order of `targets`.
        softcap: The model's `final_logit_softcapping`.
        implementation: `torch` or `triton` (chunked), or `eager`.

    Returns:
        Scalar fp32 loss with gradient; (heads,) unscaled fp32 loss sums; (heads,) int64 top-1 hits.
    """
    if implementation == "eager":
        return eager_loss(hidden, targets, scales, heads, softcap=softcap)
    row_loss = in_place_cross_entropy(implementation)
    return chunked_loss(hidden, targets, scales, heads, row_loss=row_loss, softcap=softcap)
