"""Target token of each head at each position."""

from collections.abc import Sequence

import torch
from torch import Tensor


IGNORE_INDEX = -100


def leap_targets(labels: Tensor, offset: int, position_ids: Tensor | None = None) -> Tensor:
    """Return the targets of a head that predicts `offset` tokens ahead.

    Args:
        labels: (batch, length), -100 where masked.
        offset: 1 or more.
        position_ids: (batch, length) or (axes, batch, length). They restart at 0 in every packed document. None if each
            row is one document.

    Returns:
        (batch, length) token ids, -100 where the head has no valid target.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    if offset >= labels.shape[-1]:
        return targets
    ahead = labels[:, offset:]
    if position_ids is not None:
        positions = position_ids[0] if position_ids.dim() == 3 else position_ids
        # Within a document of text, positions increase by 1 per token. Across a boundary they cannot differ by `offset`:
        # the later document has restarted at 0, so its position is less than `offset`. Image tokens may repeat a position;
        # targets beyond an image are therefore masked too.
        inside = positions[:, offset:] - positions[:, :-offset] == offset
        ahead = ahead.masked_fill(~inside, IGNORE_INDEX)
    targets[:, :-offset] = ahead
    return targets


def count_targets(labels: Tensor, offsets: Sequence[int], position_ids: Tensor | None = None) -> Tensor:
    """Return the (heads,) number of valid targets of each head."""
    return torch.stack([(leap_targets(labels, o, position_ids) != IGNORE_INDEX).sum() for o in offsets])
