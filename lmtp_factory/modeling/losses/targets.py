"""Which token each head is trained on at each position, and how much each head counts."""

from collections.abc import Sequence

import torch
from torch import Tensor


IGNORE_INDEX = -100


def leap_targets(labels: Tensor, offset: int, position_ids: Tensor | None = None) -> Tensor:
    """Targets of a head that predicts ``offset`` tokens ahead.

    Args:
        labels: (batch, length), -100 where masked.
        offset: 1 or more.
        position_ids: (batch, length) or (axes, batch, length), restarting at 0 with every packed document; None where
            each row is one document.

    Returns:
        (batch, length), -100 where the head has no valid target.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    if offset >= labels.shape[-1]:
        return targets
    ahead = labels[:, offset:]
    if position_ids is not None:
        positions = position_ids[0] if position_ids.dim() == 3 else position_ids
        # Inside a text document positions rise with the index. Across a border they cannot: the later document's position
        # is below `offset`, the earlier one's plus `offset` is not. (Positions that stand still inside an image count as
        # a border too, so targets beyond an image are left out.)
        inside = positions[:, offset:] - positions[:, :-offset] == offset
        ahead = ahead.masked_fill(~inside, IGNORE_INDEX)
    targets[:, :-offset] = ahead
    return targets


def count_targets(labels: Tensor, offsets: Sequence[int], position_ids: Tensor | None = None) -> Tensor:
    """Valid targets of every head, (heads,)."""
    return torch.stack([(leap_targets(labels, o, position_ids) != IGNORE_INDEX).sum() for o in offsets])
