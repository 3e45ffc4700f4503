"""Loss of a block of rows of logits. Another loss, such as a divergence, would be added here.

A row loss has two forms. The reference form uses autograd. The in-place form returns the same numbers and overwrites the
logits with their gradient; `softmax.py` implements it in torch and `softmax_triton.py` in Triton. Both forms take
`(logits, targets, softcap)` and return `(losses, hits)`:

    logits    (rows, vocabulary) raw, before the soft cap
    targets   (rows,) int64 token ids inside the vocabulary
    softcap   the model's `final_logit_softcapping`, or None
    losses    (rows,) fp32
    hits      (rows,) bool, True if no logit is larger than the target's
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .softmax import softcapped, softmax_gradient_


RowLoss = Callable[[Tensor, Tensor, float | None], tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, targets: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Compute `-log softmax(softcapped logits)[target]` of every row with autograd; see the module's docstring."""
    logits = softcapped(logits, softcap).float()  # (rows, vocabulary)
    target = logits.detach().gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (rows,)
    return F.cross_entropy(logits, targets, reduction="none"), target >= logits.detach().amax(-1)


def in_place_cross_entropy(implementation: str) -> RowLoss:
    """Return the in-place form of `cross_entropy`.

    Args:
        implementation: `torch` or `triton`.
    """
    if implementation == "triton":
        from . import softmax_triton  # imports Triton, which torch installs on Linux only

        return softmax_triton.softmax_gradient_
    return softmax_gradient_
