"""What one block of rows of logits costs, and the gradient of that: the place for another loss.

A row loss has two forms. The plain one goes through autograd and is the one to read. The in-place one returns the same
numbers and overwrites the logits with their gradient; it exists once in plain torch (:mod:`.softmax`) and once for CUDA
(:mod:`.softmax_triton`). Both take ``(logits, targets, softcap)`` and return ``(losses, hits)``:

    logits    (rows, vocabulary) raw, before the soft cap
    targets   (rows,) int64 token ids inside the vocabulary
    softcap   the model's ``final_logit_softcapping``, or None
    losses    (rows,) fp32
    hits      (rows,) bool, whether no logit is above the target's
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .softmax import softcapped, softmax_gradient_


RowLoss = Callable[[Tensor, Tensor, float | None], tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, targets: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """``-log softmax(softcapped logits)[target]`` of every row, by autograd; see the module's docstring."""
    logits = softcapped(logits, softcap).float()
    target = logits.detach().gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (rows,)
    return F.cross_entropy(logits, targets, reduction="none"), target >= logits.detach().amax(-1)


def in_place_cross_entropy(implementation: str) -> RowLoss:
    """The in-place form of :func:`cross_entropy`.

    Args:
        implementation: ``torch`` or ``triton``.
    """
    if implementation == "triton":
        from . import softmax_triton  # needs Triton, which is there on Linux alone

        return softmax_triton.softmax_gradient_
    return softmax_gradient_
