"""What a next-token model knows of later tokens: numerical marginalisation (Mehra et al., arXiv 2502.09419).

    p(x_{t+2} | x_<=t) = sum over v of p(v | x_<=t) p(x_{t+2} | x_<=t, v)
    p(x_{t+3} | x_<=t) = sum over v, w of p(v | x_<=t) p(w | x_<=t, v) p(x_{t+3} | x_<=t, v, w)

The sums are cut to the K most probable v, and of the pairs (v, w) below them to the K most probable. What the cut leaves of
the probability is the mass. Each sum takes a forward of K nodes a position; the second one continues the first one's nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..decoding.continuations import CachedText
from ..modeling.heads import lm_logits


# Offsets of the two sums.
MARGINAL_OFFSETS = (2, 3)


@dataclass(frozen=True)
class Marginal:
    """The distributions of one offset at some positions, for several K.

    Attributes:
        probabilities: (positions, ks, vocabulary) fp32, not renormalised: a distribution sums to its mass.
        masses: (positions, ks) fp32 probability of the paths that the sum is over.
        paths: For each K the number of paths: K, or all if there are fewer.
    """

    probabilities: Tensor
    masses: Tensor
    paths: tuple[int, ...]


@torch.no_grad()
def marginals(model: nn.Module, text: CachedText, positions: Tensor, ks: Sequence[int]) -> tuple[Marginal, Marginal]:
    """Compute the distributions at +2 and +3 behind some positions of a text, with two forwards.

    Args:
        model: The model that the text is cached with.
        text: The text. Nodes of earlier calls are discarded.
        positions: (positions,) int64 positions t, none of them before those of earlier calls.
        ks: Every K.
    """
    prefixes = positions + 1  # (positions,)
    text.discard_nodes(shortest=int(prefixes.min()))
    first = _probabilities(model, text.hidden[positions])  # (positions, vocabulary) of v
    width = min(max(ks), first.shape[-1])
    first, tokens = first.topk(width)  # (positions, width)
    ranks = torch.arange(width, device=first.device)
    is_kept = ranks < torch.tensor(ks, device=first.device)[:, None]  # (ks, width)
    weights = first[:, None] * is_kept  # (positions, ks, width)
    hidden, columns = text.extend(tokens.flatten(), prefixes.repeat_interleave(width))
    second = _probabilities(model, hidden).view(len(positions), width, -1)  # (positions, width, vocabulary) of w
    at_2 = Marginal(weights @ second, weights.sum(-1), tuple(min(k, width) for k in ks))

    # The K best pairs have at most K different w below one v, so that `width` of them are enough.
    second, next_tokens = second.topk(width)  # (positions, width, width)
    pairs = (first[:, :, None] * second).flatten(1)  # (positions, width * width); v changes slowest
    is_chosen = torch.zeros(len(positions), len(ks), pairs.shape[1], dtype=torch.bool, device=pairs.device)
    paths = []
    for number, k in enumerate(ks):
        below = pairs[:, : at_2.paths[number] * width]  # pairs below the K best v
        best = below.topk(min(k, below.shape[1])).indices
        is_chosen[:, number].scatter_(1, best, True)
        paths.append(best.shape[1])
    # Most pairs serve several K. A position with fewer pairs than others computes some that have no weight.
    is_used = is_chosen.any(1)  # (positions, width * width)
    nodes = int(is_used.sum(1).max())
    chosen = torch.where(is_used, pairs, -1.0).topk(nodes).indices  # (positions, nodes)
    weights = (pairs[:, None] * is_chosen).gather(2, chosen[:, None].expand(-1, len(ks), -1))  # (positions, ks, nodes)
    above = columns.view(len(positions), width).gather(1, chosen // width)  # (positions, nodes) columns of v
    hidden, _ = text.extend(
        next_tokens.flatten(1).gather(1, chosen).flatten(), prefixes.repeat_interleave(nodes), above.view(-1, 1)
    )
    third = _probabilities(model, hidden).view(len(positions), nodes, -1)  # (positions, nodes, vocabulary)
    return at_2, Marginal(weights @ third, weights.sum(-1), tuple(paths))


def _probabilities(model: nn.Module, hidden: Tensor) -> Tensor:
    """Map (..., hidden) final hidden states to (..., vocabulary) fp32 probabilities of the next token."""
    return lm_logits(model, hidden).float().softmax(-1)
