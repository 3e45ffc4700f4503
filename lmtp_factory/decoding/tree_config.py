"""Kind and size of a draft tree, and the cost of forwards that cuts it."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import LMTPError
from .tree import chain_paths, fixed


KINDS = ("chain", "static", "dynamic")
DEFAULT_WIDTH = 8


@dataclass(frozen=True)
class CostCurve:
    """Duration of a forward as a function of its number of tokens.

    Attributes:
        seconds: Maps numbers of tokens to seconds. Any other unit works too, because only ratios matter.
    """

    seconds: Mapping[int, float]

    def at(self, tokens: int) -> float:
        """Return the cost of `tokens` tokens by linear interpolation; the last slope extrapolates."""
        sizes = sorted(self.seconds)
        if tokens <= sizes[0] or len(sizes) == 1:
            return self.seconds[sizes[0]]
        right = min(bisect_left(sizes, tokens), len(sizes) - 1)
        low, high = sizes[right - 1], sizes[right]
        slope = (self.seconds[high] - self.seconds[low]) / (high - low)
        return self.seconds[low] + slope * (tokens - low)


# Weight, in tokens, of the prior that the heads' probabilities are calibrated; decay of older steps' counts per step.
_PRIOR, _DECAY = 2.0, 0.97


@dataclass
class AcceptanceCalibration:
    """Moving ratio of accepted to predicted tokens; 1 means that the heads' probabilities are calibrated."""

    predicted: float = 0.0
    accepted: float = 0.0

    @property
    def ratio(self) -> float:
        """Accepted tokens per predicted token."""
        return (self.accepted + _PRIOR) / (self.predicted + _PRIOR)

    def learn(self, predicted: float, accepted: int) -> None:
        """Add one step.

        Args:
            predicted: Sum of the drafted nodes' values, which is the expected number of accepted tokens.
            accepted: Number of accepted tokens.
        """
        self.predicted = _DECAY * self.predicted + predicted
        self.accepted = _DECAY * self.accepted + accepted


@dataclass(frozen=True)
class TreeConfig:
    """Kind and size of the draft tree.

    Attributes:
        kind: `chain`; `static`, the same tree in every step; `dynamic`, the best tree for each step's probabilities.
        nodes: Number of nodes, including the root; the maximum for `dynamic`. 1 disables drafting.
        paths: Paths of a static tree's nodes, see `decoding.tree.fixed`.
        width: Number of candidates per level of a dynamic tree.
        cost: Duration of a forward. If given, each dynamic tree is cut to the size with the most expected tokens per
            second.
        expected_gain: Measured gain of a step with this tree over plain steps, in plain steps; 0 if it is unknown. It
            decides how soon a generation drafts.
        always: Draft in every step, even if it is unprofitable. For measurements and tests.
        source: Origin of the configuration, for the log.

    Raises:
        LMTPError: The kind is unknown, there are no nodes or no candidates, or a static tree has too few paths or paths
            that do not form a tree.
    """

    kind: str
    nodes: int
    paths: tuple[tuple[int, ...], ...] = ()
    width: int = DEFAULT_WIDTH
    cost: CostCurve | None = None
    expected_gain: float = 0.0
    always: bool = field(default=False, compare=False)
    source: str = field(default="given", compare=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise LMTPError(f"The tree kind is {self.kind!r}, but it has to be one of {', '.join(KINDS)}.")
        if self.nodes < 1:
            raise LMTPError(f"A tree of {self.nodes} nodes has no root: write 1 or more.")
        if self.kind == "static" and len(self.paths) < self.nodes:
            raise LMTPError(f"A static tree of {self.nodes} nodes needs as many paths: measure it with lmtp-cli tree.")
        if not math.isfinite(self.expected_gain):
            raise LMTPError(f"The expected gain is {self.expected_gain}, but it has to be a finite number.")
        if self.width < 1:
            raise LMTPError(f"A dynamic tree of width {self.width} has no candidates: write 1 or more.")
        if self.paths:
            try:
                fixed(self.paths)
            except ValueError as error:
                raise LMTPError(f"The paths are no tree. {error}") from None

    def fixed_paths(self) -> Sequence[Sequence[int]] | None:
        """Return the paths of the nodes, or None for a dynamic tree."""
        if self.kind == "dynamic" and self.nodes > 1:
            return None
        return self.paths[: self.nodes] if self.kind == "static" else chain_paths(self.nodes)

    def check_ranks(self, vocab_size: int) -> None:
        """Check that a static tree's candidates exist among the `vocab_size` tokens that heads can draft.

        Dynamic trees adapt to the vocabulary.

        Raises:
            LMTPError: A candidate rank is beyond the vocabulary.
        """
        paths = self.fixed_paths() if self.kind == "static" else ()
        deepest = max((path[-1] for path in paths if path), default=0)
        if deepest >= vocab_size:
            raise LMTPError(
                f"The static tree takes candidates down to rank {deepest}, but the heads draft {vocab_size} tokens "
                f"(ranks 0 to {vocab_size - 1}): measure a tree on this model with lmtp-cli tree."
            )

    def best_size(self, values: Sequence[Sequence[float]], calibration: float) -> int:
        """Return the number of nodes with the most expected tokens per unit of cost.

        Args:
            values: (rows, nodes) node values, root first.
            calibration: `AcceptanceCalibration.ratio`, which multiplies the values of drafted nodes.
        """
        if self.cost is None:
            return len(values[0])
        rows, expected, best, best_rate = len(values), 0.0, 1, 0.0
        for nodes in range(1, len(values[0]) + 1):
            expected += sum(row[nodes - 1] for row in values) * (calibration if nodes > 1 else 1.0)
            rate = expected / self.cost.at(nodes * rows)
            if rate > best_rate:
                best, best_rate = nodes, rate
        return best
