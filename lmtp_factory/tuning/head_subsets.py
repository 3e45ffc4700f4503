"""Choosing heads: the subset of trained heads that decodes fastest with its best tree, by replay.

Stage 1 trains each head by itself, so a run with many offsets holds the heads of every subset of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from torch import nn
from tqdm import tqdm

from .. import geometry
from ..config import LMTPConfig
from ..decoding.tree_config import DEFAULT_WIDTH
from ..errors import LMTPError
from ..evaluation.scoring import Row
from .costs import StepCosts, measure_drafts
from .replay import Observed, observe_answers
from .tree_search import Option, rank_trees


Pair = tuple[int, int]  # (head, back), see `geometry.lookback`


@dataclass(frozen=True)
class RankedSubset:
    """A subset of the trained heads, with the trees that it could draft.

    Attributes:
        offsets: Offsets of its heads, with the LM head's 1 first.
        answers: The observed answers, with the levels of all subsets.
        columns: Which of these levels are the subset's.
        costs: Durations on the device.
        options: Every kind and size of tree, see `rank_trees`.
    """

    offsets: tuple[int, ...]
    answers: list[Observed] = field(repr=False)
    columns: list[int]
    costs: StepCosts
    options: list[Option]

    @property
    def observed(self) -> list[Observed]:
        """The answers with the subset's levels. Not stored, because there may be thousands of subsets."""
        return [answer.columns(self.columns) for answer in self.answers]

    @property
    def best(self) -> Option:
        """The tree with the most tokens per second."""
        return max(self.options, key=lambda option: option.tokens_per_second)

    @property
    def merit(self) -> tuple[float, float]:
        """Tokens per second of the best tree, then the largest tau: where no draft pays, all subsets are as fast."""
        return self.best.tokens_per_second, max(option.tau for option in self.options)


def subsets(trained: LMTPConfig, num_heads: int) -> list[tuple[int, ...]]:
    """Return the offsets of every subset of `num_heads` heads, all with the LM head's 1 first.

    Heads that read the newest token look back no further than they were trained for (`head_backs`).

    >>> subsets(LMTPConfig(offsets=(2, 3, 5)), 2)
    [(1, 2, 3), (1, 2, 5), (1, 3, 5)]

    Raises:
        LMTPError: There is no such subset.
    """
    found, refusal = [], None
    for extra in combinations(trained.offsets[1:], num_heads):
        try:
            found.append(trained.subset((1, *extra)).offsets)
        except LMTPError as error:
            refusal = error
    if not found:
        raise refusal
    return found


def pairs_within(trained: Sequence[int], offsets: Sequence[int]) -> list[Pair]:
    """Return the pairs of a subset's levels. Heads are counted among the trained heads."""
    return [(trained.index(offsets[head]), back) for head, back in geometry.lookback_pairs(offsets)]


def rank_subsets(
    model: nn.Module, rows: Iterable[Row], num_heads: int, width: int = DEFAULT_WIDTH, **timing
) -> list[RankedSubset]:
    """Evaluate every subset of `num_heads` heads with every tree, fastest first.

    The backbone reads each answer once, and the candidates of a `(head, back)` pair are computed once for all subsets.
    A draft is timed once for each reach. It is assumed to depend only on the number of heads, which all subsets share,
    and on the number of levels, not on which heads draft them.

    Args:
        model: A model with all trained heads.
        rows: Token ids of prompts and of the model's greedy answers.
        num_heads: Number of heads of a subset, not counting the LM head.
        width: Number of candidates per level.
        timing: Options of `measure_drafts`.

    Raises:
        LMTPError: No answer has a step, or there is no such subset.
    """
    trained = model.leap_heads.config.offsets
    by_offsets = {offsets: pairs_within(trained, offsets) for offsets in subsets(model.leap_heads.config, num_heads)}
    # In the order of `candidates_of`: by head, and from the state that is furthest back to the last.
    pairs = sorted({pair for one in by_offsets.values() for pair in one}, key=lambda pair: (pair[0], -pair[1]))
    observed = observe_answers(model, rows, width, pairs)

    one_of_reach = {geometry.reach(offsets): one for offsets, one in by_offsets.items()}
    costs = dict(zip(one_of_reach, measure_drafts(model, list(one_of_reach.values()), **timing)))
    ranked = []
    for offsets, own in tqdm(by_offsets.items(), desc="replaying", unit="subset"):
        columns, cost = [pairs.index(pair) for pair in own], costs[geometry.reach(offsets)]
        options = rank_trees([answer.columns(columns) for answer in observed], cost)
        ranked.append(RankedSubset(offsets, observed, columns, cost, options))
    return sorted(ranked, key=lambda subset: subset.merit, reverse=True)


def subset_table(ranked: Sequence[RankedSubset], limit: int = 20) -> str:
    """Format one line per subset, at most `limit`, with its best tree."""
    width = max(len("offsets"), *(len(_written(subset.offsets)) for subset in ranked))
    lines = [f"{'offsets':<{width}} {'tau':>6} {'tokens/s':>9}  tree"]
    for subset in ranked[:limit]:
        tree = subset.best
        mark = "  <- chosen" if subset is ranked[0] else ""
        lines.append(
            f"{_written(subset.offsets):<{width}} {tree.tau:>6.2f} {tree.tokens_per_second:>9.1f}  {tree.kind}, "
            f"{tree.nodes} node{'s' * (tree.nodes > 1)}{mark}"
        )
    if len(ranked) > limit:
        lines.append(f"and {len(ranked) - limit} more, none of them faster")
    return "\n".join(lines)


def measured_subsets(ranked: Sequence[RankedSubset], limit: int = 20) -> list[dict]:
    """Return the fastest subsets, at most `limit`, for `tree.json`, which every `generate` reads."""
    return [
        {"offsets": subset.offsets[1:], "tau": subset.best.tau, "tokens_per_second": subset.best.tokens_per_second}
        for subset in ranked[:limit]
    ]


def _written(offsets: Sequence[int]) -> str:
    return ",".join(map(str, offsets[1:]))
