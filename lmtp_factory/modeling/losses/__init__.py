"""Leap-MTP loss: cross-entropy of every head against its own target (L-MTP, arXiv 2505.17505, equations 4 and 5).

    stage 1:  L = sum_{i>=1} w_i CE_i                          w_i = head_decay ** (i - 1)
    stage 2:  L = CE_0 + head_weight * sum_{i>=1} w_i CE_i

Head ``i`` at position ``s`` is trained on ``labels[s + offsets[i]]`` (:mod:`.targets`); each head is averaged over its own
valid targets. Two implementations give the same numbers; callers choose one, neither falls back to the other:

============= ================================ ===================================================
module        peak memory of the logits        gradients
============= ================================ ===================================================
eager         heads x rows x vocabulary        autograd, in the backward
chunked       one chunk x vocabulary           of each chunk while its logits exist, in the forward
============= ================================ ===================================================

The chunked one turns logits into their gradient in place. :mod:`.rows` says what a row costs, :mod:`.implementation` which
implementation runs, :mod:`.head_spec` what a loss knows of a head.
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
    """Loss of all heads by the implementation asked for: ``torch``, ``triton`` or ``eager``.

    Args and returns are those of :func:`.eager.eager_loss`.
    """
    if implementation == "eager":
        return eager_loss(hidden, targets, scales, heads, softcap=softcap)
    row_loss = in_place_cross_entropy(implementation)
    return chunked_loss(hidden, targets, scales, heads, row_loss=row_loss, softcap=softcap)
