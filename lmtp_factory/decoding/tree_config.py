"""Which tree a model drafts with, and how large: `lmtp/tree.json`, or a default by device."""

import json
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from torch import nn

from ..errors import LMTPError
from ..files import TREE_FILE, atomic_write
from .cpu_prepacked import can_prepack
from .tree import chain_paths


KINDS = ("chain", "static", "dynamic")
DEFAULT_WIDTH = 8


@dataclass(frozen=True)
class CostCurve:
    """How the time of a forward grows with its tokens.

    Attributes:
        seconds: number of tokens -> seconds (or any other unit: only ratios matter).
    """

    seconds: Mapping[int, float]

    def at(self, tokens: int) -> float:
        """Cost of `tokens` tokens, interpolated; beyond the last point the last slope goes on."""
        sizes = sorted(self.seconds)
        if tokens <= sizes[0] or len(sizes) == 1:
            return self.seconds[sizes[0]]
        right = min(bisect_left(sizes, tokens), len(sizes) - 1)
        low, high = sizes[right - 1], sizes[right]
        slope = (self.seconds[high] - self.seconds[low]) / (high - low)
        return self.seconds[low] + slope * (tokens - low)


# Weight, in accepted tokens, of the assumption that the heads' probabilities are right; and how fast old steps fade.
_PRIOR, _FADING = 2.0, 0.97


@dataclass
class AcceptanceCalibration:
    """Moving ratio of accepted to predicted tokens; 1 means that the heads' probabilities are calibrated."""

    predicted: float = 0.0
    accepted: float = 0.0

    @property
    def ratio(self) -> float:
        """Accepted tokens for each one that the probabilities predict."""
        return (self.accepted + _PRIOR) / (self.predicted + _PRIOR)

    def learn(self, predicted: float, accepted: int) -> None:
        """One step: the sum of its drafted nodes' values, and how many of them were accepted."""
        self.predicted = _FADING * self.predicted + predicted
        self.accepted = _FADING * self.accepted + accepted


@dataclass(frozen=True)
class TreeConfig:
    """How to draft.

    Attributes:
        kind: `chain`; `static`, a fixed tree; `dynamic`, the best tree by each step's own probabilities.
        nodes: of a tree, the root counted; for `dynamic` the most it may have. 1 drafts nothing.
        paths: of a static tree, see `lmtp_factory.decoding.tree.fixed`.
        width: candidates a level, for `dynamic`.
        cost: with it, a dynamic tree is cut in each step where the expected tokens per second are greatest.
        always: draft in every step, also where that does not pay; for measurements and tests.
        source: where the plan comes from, for the log.
    """

    kind: str
    nodes: int
    paths: tuple[tuple[int, ...], ...] = ()
    width: int = DEFAULT_WIDTH
    cost: CostCurve | None = None
    always: bool = field(default=False, compare=False)
    source: str = field(default="given", compare=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise LMTPError(f"The tree kind is {self.kind!r}, but it has to be one of {', '.join(KINDS)}.")
        if self.nodes < 1:
            raise LMTPError(f"A tree of {self.nodes} nodes has no root: write 1 or more.")
        if self.kind == "static" and len(self.paths) < self.nodes:
            raise LMTPError(f"A static tree of {self.nodes} nodes needs as many paths: measure it with lmtp-cli tree.")

    def fixed_paths(self) -> Sequence[Sequence[int]] | None:
        """Paths of the nodes where the shape is known before the step."""
        if self.kind == "dynamic" and self.nodes > 1:
            return None
        return self.paths[: self.nodes] if self.kind == "static" else chain_paths(self.nodes)

    def ranks(self) -> list[int]:
        """Candidate ranks that a fixed tree takes."""
        return [path[-1] for path in self.fixed_paths() if path]

    def check_ranks(self, vocab_size: int) -> None:
        """Refuse a static tree of candidates that do not exist; a dynamic one takes what there is.

        Raises:
            LMTPError: naming the rank and the vocabulary.
        """
        deepest = max(self.ranks(), default=0) if self.kind == "static" else 0
        if deepest >= vocab_size:
            raise LMTPError(
                f"The static tree takes candidates down to rank {deepest}, but the vocabulary has {vocab_size} tokens "
                f"(ranks 0 to {vocab_size - 1}): measure a tree on this model with lmtp-cli tree."
            )

    def best_size(self, values: Sequence[Sequence[float]], calibration: float) -> int:
        """The number of nodes that gives most expected tokens for its cost.

        Args:
            values: each row's node values, root first.
            calibration: the ratio of `AcceptanceCalibration`.
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


@dataclass(frozen=True)
class Conditions:
    """What a tree's size depends on beside the model: with other costs another tree is the fastest.

    Attributes:
        device: type of the device, `cpu` or `cuda`.
        dtype: that forwards compute in, `float32` or `bfloat16`.
        prepacked: whether linear layers compute with prepacked weights (`cpu_prepacked.py`).
    """

    device: str
    dtype: str
    prepacked: bool

    @classmethod
    def of(cls, model: nn.Module) -> "Conditions":
        """Those that `model` decodes under here."""
        return cls(model.device.type, str(model.dtype).removeprefix("torch."), can_prepack(model))

    def __str__(self) -> str:
        return f"{self.device}, {self.dtype}, {'prepacked' if self.prepacked else 'ordinary'} weights"


# Relative cost of a forward of n tokens where nothing was measured. Packed: rounded from what lmtp-cli tree measured in
# the demo (benchmarks/README.md). Plain: a conservative (high) estimate. A GPU's is taken to be flat as far as trees go.
PACKED_CPU = CostCurve({1: 1.0, 16: 1.4, 32: 2.0, 64: 3.2})
PLAIN_CPU = CostCurve({1: 1.0, 2: 1.5, 4: 1.6, 8: 1.6, 16: 1.8, 32: 2.6, 64: 4.6})
_GPU_NODES, _CPU_NODES = 32, 16


def default_tree(conditions: Conditions) -> TreeConfig:
    """A dynamic tree: large on an accelerator, and on a CPU as large as each step's probabilities pay for."""
    source = f"default for {conditions.device}"
    if conditions.device != "cpu":
        return TreeConfig("dynamic", _GPU_NODES, source=source)
    return TreeConfig("dynamic", _CPU_NODES, cost=PACKED_CPU if conditions.prepacked else PLAIN_CPU, source=source)


def tree_config_for(model: nn.Module) -> TreeConfig:
    """The tree that `model.generate` drafts with: `lmtp/tree.json` where it was measured under these conditions.

    Raises:
        LMTPError: the file is damaged.
    """
    conditions, folder = Conditions.of(model), model.leap_heads.folder
    found = None if folder is None else read_tree(folder)
    if found is None:
        return default_tree(conditions)
    plan, measured_under = found
    if measured_under == conditions:
        return plan
    plan = default_tree(conditions)
    other = f"{Path(folder, TREE_FILE)} was measured on {measured_under or 'an unknown machine'}, this is {conditions}"
    return replace(plan, source=f"{plan.source}; {other}")


def write_tree(plan: TreeConfig, folder: str | os.PathLike, conditions: Conditions, measured: Mapping) -> Path:
    """`tree.json` in an `lmtp/` folder.

    Args:
        conditions: that it was measured under; it is used under these alone.
        measured: what the choice rests on, kept for the reader.
    """
    path = Path(folder, TREE_FILE)
    values = asdict(plan)
    for key in ("source", "always"):
        values.pop(key)
    values["cost"] = None if plan.cost is None else {str(n): s for n, s in plan.cost.seconds.items()}
    with atomic_write(path) as file:
        json.dump({**asdict(conditions), **values, "measured": measured}, file, indent=1)
    return path


def read_tree(folder: str | os.PathLike) -> tuple[TreeConfig, Conditions | None] | None:
    """The plan in an `lmtp/` folder and what it was measured under; None where there is no plan.

    Conditions are None in files of versions that did not write all of them.

    Raises:
        LMTPError: the file is damaged.
    """
    path = Path(folder, TREE_FILE)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        cost = values["cost"] and CostCurve({int(n): float(s) for n, s in values["cost"].items()})
        plan = TreeConfig(
            kind=values["kind"],
            nodes=int(values["nodes"]),
            paths=tuple(tuple(map(int, path)) for path in values["paths"]),
            width=int(values["width"]),
            cost=cost or None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LMTPError(f"{path} is damaged ({error!r}): delete it or run lmtp-cli tree again.") from None
    names = [condition.name for condition in fields(Conditions)]
    known = all(name in values for name in names)
    return replace(plan, source=str(path)), Conditions(*(values[name] for name in names)) if known else None
