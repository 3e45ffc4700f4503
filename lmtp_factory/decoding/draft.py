"""Drafting: what the leap heads propose for the places after the root (L-MTP, section 3.3, "looking backward")."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import geometry
from ..modeling.dtypes import cast_like
from ..modeling.heads import softcap_of
from ..modeling.losses.softmax import softcapped
from .cpu_prepacked import int8_linear


@dataclass(frozen=True)
class Candidates:
    """The most probable tokens of every level, each level on its own.

    Attributes:
        tokens: (batch, levels, width) int64; no more than the vocabulary has.
        probabilities: (batch, levels, width) float32, falling along the last dimension.
    """

    tokens: Tensor
    probabilities: Tensor


@dataclass
class Window:
    """The last hidden states of each row, oldest first; it belongs to one generation.

    Attributes:
        states: (batch, size, hidden).
        filled: how many of each row's states are real; a prompt may be shorter than the window.
        real: (batch, size) bool, which ones are; None where all are.
    """

    states: Tensor
    filled: list[int]
    real: Tensor | None = None

    @classmethod
    def of_prompt(cls, hidden: Tensor, lengths: list[int], size: int) -> "Window":
        """From the prompt's (batch, length, hidden) states, padded on the left to the rows' `lengths`."""
        missing = size - hidden.shape[1]
        states = hidden[:, -size:]
        if missing > 0:
            states = torch.cat([states.new_zeros(len(states), missing, states.shape[2]), states], dim=1)
        filled = [min(length, size) for length in lengths]
        real = None
        if min(filled) < size:
            missing = size - torch.tensor(filled, device=hidden.device)
            real = torch.arange(size, device=hidden.device) >= missing[:, None]
        return cls(states.clone(), filled, real)

    @classmethod
    def of_states(cls, states: Tensor, is_real: Tensor) -> "Window":
        """From given (batch, size, hidden) states, of which those at the (batch, size) `is_real` exist."""
        filled = is_real.sum(1).tolist()
        return cls(states, filled, None if bool(is_real.all()) else is_real.to(states.device))

    def places(self, branches: list[list[int]]) -> list[list[int]]:
        """(batch, size) where each state of the next window stands in (window ++ tree).

        Args:
            branches: numbers of each row's accepted nodes, root first; empty for a finished row.
        """
        size = self.states.shape[1]
        return [[*range(size), *(size + node for node in branch)][-size:] for branch in branches]

    def push(self, hidden: Tensor, branches: list[list[int]], places: Tensor) -> None:
        """Append the states of each row's accepted nodes.

        Args:
            hidden: (batch, nodes, hidden) of the step's tree.
            places: what `places` says of `branches`, on a device.
        """
        batch, size = self.states.shape[:2]
        places = places.to(hidden.device)
        states = torch.cat([self.states, hidden], dim=1)
        if batch == 1:
            self.states = states.index_select(1, places[0])
        else:
            self.states = states.gather(1, places[:, :, None].expand(-1, -1, states.shape[2]))
        self.filled = [min(size, filled + len(branch)) for filled, branch in zip(self.filled, branches)]
        if self.real is not None:
            new = self.real.new_ones(batch, hidden.shape[1])
            self.real = torch.cat([self.real, new], dim=1).gather(1, places) if min(self.filled) < size else None


def propose_candidates(model: nn.Module, window: Window, levels: int, width: int) -> Candidates:
    """Candidates for levels 1 to `levels`, from the states that the last step left behind.

    Level `l` is depth `d = l + 1`: head `i`, the first with `offsets[i] >= d`, reads the state
    `offsets[i] - d` places before the last one. A level whose state is missing gets probability 0.
    """
    offsets, heads = model.leap_heads.config.offsets, model.leap_heads.heads
    size = window.states.shape[1]
    by_head: dict[int, slice] = {}
    for head, back in (geometry.lookback(level + 1, offsets) for level in range(1, levels + 1)):
        # A head's levels read neighbouring states, the farthest back first; a slice needs no index on the device.
        first = by_head[head].start if head in by_head else size - 1 - back
        by_head[head] = slice(first, size - back)
    features = [heads[head - 1].features(window.states[:, places]) for head, places in by_head.items()]
    if model.leap_heads.config.head_kind == "shared":  # the matrix is read once for all heads
        logits = _unembed(model, torch.cat(features, dim=1), model.get_output_embeddings())
    else:
        own = [_unembed(model, part, heads[head - 1].unembed) for head, part in zip(by_head, features)]
        logits = torch.cat(own, dim=1)
    best, tokens = logits.topk(min(width, logits.shape[-1]), dim=-1)
    probabilities = (best - logits.logsumexp(-1, keepdim=True)).exp()
    if window.real is not None:
        real = torch.cat([window.real[:, places] for places in by_head.values()], dim=1)
        probabilities = probabilities * real[:, :, None].to(probabilities.device)
    return Candidates(tokens, probabilities)


def _unembed(model: nn.Module, features: Tensor, unembedding: nn.Module) -> Tensor:
    features = cast_like(features, unembedding)
    # A model that was packed once may have moved or been cast since.
    packable = features.dtype == torch.float32 and features.device.type == "cpu"
    layer = int8_linear(unembedding) if packable else unembedding
    return softcapped(layer(features), softcap_of(model)).float()
