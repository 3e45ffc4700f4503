"""Drafting: the leap heads' candidates for the tokens after the root (L-MTP, section 3.3, "looking backward")."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import geometry
from ..modeling.blocks import KnownToken, unchanged
from ..modeling.dtypes import cast_like
from ..modeling.heads import LeapHead, LeapHeads, softcap_of
from ..modeling.losses.softmax import softcapped
from .branches import Branches
from .cpu_prepacked import int8_linear


@dataclass(frozen=True)
class Candidates:
    """The most probable tokens of each level. Levels are independent of each other.

    Attributes:
        tokens: (batch, levels, width) int64 token ids. `width` is at most the vocabulary size.
        probabilities: (batch, levels, width) fp32, decreasing along the last dimension.
    """

    tokens: Tensor
    probabilities: Tensor


@dataclass
class Window:
    """What a draft is made from: the last hidden states of each row, oldest first, and the newest token.

    Attributes:
        states: (batch, size, hidden) final hidden states, or (batch, size, heads, hidden), see `LeapHeads.inputs`.
        filled: Number of valid states of each row. A prompt may be shorter than the window.
        real: (batch, size) bool, True for valid states; None if all are valid.
        roots: (batch,) newest token of each row, the one after the last state. Heads of `head_inputs: state_token` read it.
    """

    states: Tensor
    filled: list[int]
    real: Tensor | None = None
    roots: Tensor | None = None

    @classmethod
    def of_prompt(cls, hidden: Tensor, lengths: list[int], size: int) -> "Window":
        """Build the window from the states of a prompt.

        Args:
            hidden: (batch, length, hidden) or (batch, length, heads, hidden) states, padded on the left.
            lengths: Length of each row without padding.
            size: Number of states in the window.
        """
        missing = size - hidden.shape[1]
        states = hidden[:, -size:]  # (batch, min(size, length), hidden)
        if missing > 0:
            states = torch.cat([states.new_zeros(len(states), missing, *states.shape[2:]), states], dim=1)
        filled = [min(length, size) for length in lengths]
        real = None
        if min(filled) < size:
            missing = size - torch.tensor(filled, device=hidden.device)  # (batch,)
            real = torch.arange(size, device=hidden.device) >= missing[:, None]  # (batch, size)
        return cls(states.clone(memory_format=torch.contiguous_format), filled, real)

    @classmethod
    def of_states(cls, states: Tensor, is_real: Tensor, roots: Tensor) -> "Window":
        """Build the window from (batch, size, ...) states, a (batch, size) mask of the valid ones, (batch,) tokens."""
        filled = is_real.sum(1).tolist()
        return cls(states, filled, None if bool(is_real.all()) else is_real.to(states.device), roots)

    def push(self, hidden: Tensor, branches: Branches) -> None:
        """Append the states of each row's accepted nodes, drop the oldest states and take the new roots.

        Args:
            hidden: (batch, nodes, hidden) or (batch, nodes, heads, hidden) states of the step's tree.
            branches: The accepted branches.
        """
        batch, size = self.states.shape[:2]
        nodes, counts = branches.nodes.to(hidden.device), branches.counts.to(hidden.device)
        # Indices in the concatenation of window and tree: the row's states in their order, of which the last stay.
        own = torch.arange(size, device=hidden.device).expand(batch, -1)  # (batch, size)
        places = own + counts  # (batch, size), which needs no more if there are only roots
        if nodes.shape[1] > 1:
            places = torch.cat([own, size + nodes], dim=1).gather(1, places)  # (batch, size)
        states = torch.cat([self.states, hidden], dim=1)  # (batch, size + nodes, ...)
        if batch == 1:
            self.states = states.index_select(1, places[0])
        else:
            flat = states.flatten(2)  # (batch, size + nodes, hidden), of all heads where each has its own
            chosen = flat.gather(1, places[:, :, None].expand(-1, -1, flat.shape[2]))
            self.states = chosen.unflatten(2, states.shape[2:])
        if self.real is not None:
            new = self.real.new_ones(batch, hidden.shape[1])
            self.real = torch.cat([self.real, new], dim=1).gather(1, places)
        self.roots = branches.roots

    def count(self, branches: list[list[int]]) -> None:
        """Count the states that were appended; the mask is dropped when all are valid.

        Args:
            branches: Indices of each row's accepted nodes. Empty for rows that had ended.
        """
        size = self.states.shape[1]
        self.filled = [min(size, filled + len(branch)) for filled, branch in zip(self.filled, branches)]
        if min(self.filled) == size:
            self.real = None


def propose_candidates(
    model: nn.Module, window: Window, levels: int, width: int, unembeddings: Sequence[nn.Module] | None = None
) -> Candidates:
    """Compute the candidates of levels 1 to `levels` from the window.

    Level `l` has depth `d = l + 1`. Its head is the first head `i` with `offsets[i] >= d`, applied to the state
    `offsets[i] - d` positions before the last one. If this state is missing, the level's probabilities are 0.

    Args:
        model: A model with leap heads.
        window: The last hidden states.
        levels: Number of levels.
        width: Number of candidates per level.
        unembeddings: See `candidates_of`.
    """
    pairs = geometry.lookback_pairs(model.leap_heads.config.offsets, levels)
    return candidates_of(model, window, pairs, width, unembeddings)


def candidates_of(
    model: nn.Module,
    window: Window,
    pairs: Sequence[tuple[int, int]],
    width: int,
    unembeddings: Sequence[nn.Module] | None = None,
) -> Candidates:
    """Compute the candidates of pairs `(head, back)`: the head reads the state `back` positions before the last one.

    Args:
        model: A model with leap heads.
        window: The last hidden states.
        pairs: One pair per level. The pairs of one head are neighbours, and their `back` falls by 1 from pair to pair.
        width: Number of candidates per pair.
        unembeddings: Result of `unembeddings_of`, for torch.compile, which knows no context variables.

    Returns:
        Candidates whose levels are the pairs. If a pair's state is missing, its probabilities are 0.
    """
    heads, size = model.leap_heads.heads, window.states.shape[1]
    by_head: dict[int, slice] = {}
    for head, back in pairs:
        # The pairs of one head read consecutive states, so a slice selects them without an index tensor on the device.
        first = by_head[head].start if head in by_head else size - 1 - back
        by_head[head] = slice(first, size - back)
    root = None
    if model.leap_heads.config.reads_token:
        root = model.get_input_embeddings()(window.roots)[:, None]  # (batch, 1, hidden)
    # (batch, levels of the head, hidden) each; levels are in order when concatenated.
    features = [
        _features(heads[head - 1], _read_by(head, window.states), places, root) for head, places in by_head.items()
    ]
    if model.leap_heads.config.head_kind == "shared":  # one matmul, so the matrix is read only once
        logits = _unembed(model, torch.cat(features, dim=1), 1, unembeddings)
    else:
        own = [_unembed(model, part, head, unembeddings) for head, part in zip(by_head, features)]
        logits = torch.cat(own, dim=1)  # (batch, levels, draft vocabulary)
    best, tokens = logits.topk(min(width, logits.shape[-1]), dim=-1)  # (batch, levels, width)
    if model.leap_heads.d2t is not None:
        tokens = tokens + model.leap_heads.d2t.to(tokens.device)[tokens]
    # Softmax of the top candidates only.
    probabilities = (best - logits.logsumexp(-1, keepdim=True)).exp()
    if window.real is not None:
        real = torch.cat([window.real[:, places] for places in by_head.values()], dim=1)  # (batch, levels)
        probabilities = probabilities * real[:, :, None].to(probabilities.device)
    return Candidates(tokens, probabilities)


def _read_by(head: int, states: Tensor) -> Tensor:
    """Return the (batch, size, hidden) states of a window that a head reads."""
    return states if states.dim() == 3 else states[:, :, head - 1]


def _features(head: LeapHead, states: Tensor, places: slice, root: Tensor | None) -> Tensor:
    """Compute a head's (batch, levels of the head, hidden) features from the states at `places` of the window.

    Args:
        head: The head.
        states: (batch, size, hidden) states of the window.
        places: Indices of consecutive states. The last index looks back least.
        root: (batch, 1, hidden) embedding of the newest token, for heads that read it.
    """
    hidden = states[:, places]
    known = None
    if root is not None:
        newest = states.shape[1] - 1
        back = torch.arange(newest - places.start, newest - places.stop, -1, device=states.device)  # (levels,)
        known = KnownToken(root.to(states.device), back)
    return head.features(hidden, known, _linear if _is_packable(hidden) else unchanged)


# Unembeddings of the heads that decode in this thread: the rows of a draft vocabulary are copied once a generation.
_kept: ContextVar[dict[LeapHeads, list[nn.Module]] | None] = ContextVar("unembeddings", default=None)


@contextmanager
def unembeddings_kept(kept: dict[LeapHeads, list[nn.Module]] | None = None) -> Iterator[None]:
    """Keep the unembeddings that drafts use inside the context, in which weights must not change.

    Args:
        kept: Where to keep them, for contexts that share them; the weights must not change between these either.
    """
    token = _kept.set({} if kept is None else kept)
    try:
        yield
    finally:
        _kept.reset(token)


def unembeddings_of(model: nn.Module) -> list[nn.Module]:
    """Return the unembedding of each head: inside `unembeddings_kept` the same ones in every call."""
    heads, kept = model.leap_heads, _kept.get()
    kept = {} if kept is None else kept
    if heads not in kept:
        kept[heads] = heads.unembeddings(model.get_output_embeddings())
    return kept[heads]


def _unembed(model: nn.Module, features: Tensor, head: int, unembeddings: Sequence[nn.Module] | None) -> Tensor:
    """Map (batch, levels, hidden) features of a head to (batch, levels, draft vocabulary) fp32 logits."""
    layer, own = None, model.leap_heads.heads[head - 1].unembed
    if _is_packable(features) and own is not None:
        layer = int8_linear(own)
    elif _is_packable(features):
        layer = int8_linear(model.get_output_embeddings(), model.leap_heads.draft_tokens)
    if layer is None:
        unembedding = (unembeddings_of(model) if unembeddings is None else unembeddings)[head - 1]
        features, layer = cast_like(features, unembedding), unembedding
    return softcapped(layer(features), softcap_of(model)).float()


def _linear(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return an int8 version of a block's layer, or the layer if there is none."""
    return int8_linear(layer) or layer


def _is_packable(inputs: Tensor) -> bool:
    """Return whether int8 layers can compute these inputs: a prepacked model may have been moved or cast since."""
    return inputs.dtype == torch.float32 and inputs.device.type == "cpu"
