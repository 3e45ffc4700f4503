"""Which tree a model drafts with, and how large: ``lmtp/tree.json``, or a default by device."""

import json
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ..errors import LMTPError
from ..files import TREE_FILE, atomic_write
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
        """Cost of ``tokens`` tokens, interpolated; beyond the last point the last slope goes on."""
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
class Trust:
    """How many accepted tokens have come of one that the heads' probabilities promised, over the last steps."""

    promised: float = 0.0
    kept: float = 0.0

    @property
    def value(self) -> float:
        """1 where the probabilities are right, less where they promise too much."""
        return (self.kept + _PRIOR) / (self.promised + _PRIOR)

    def learn(self, promised: float, kept: int) -> None:
        """One step: the sum of its drafted nodes' values, and how many of them were accepted."""
        self.promised = _FADING * self.promised + promised
        self.kept = _FADING * self.kept + kept


@dataclass(frozen=True)
class TreePlan:
    """How to draft.

    Attributes:
        kind: ``chain``; ``static``, a fixed tree; ``dynamic``, the best tree by each step's own probabilities.
        nodes: of a tree, the root counted; for ``dynamic`` the most it may have. 1 drafts nothing.
        paths: of a static tree, see :func:`lmtp_factory.decoding.tree.fixed`.
        width: candidates a level, for ``dynamic``.
        cost: with it, a dynamic tree is cut in each step where the expected tokens per second are greatest.
        source: where the plan comes from, for the log.
    """

    kind: str
    nodes: int
    paths: tuple[tuple[int, ...], ...] = ()
    width: int = DEFAULT_WIDTH
    cost: CostCurve | None = None
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

    def best_size(self, values: Sequence[Sequence[float]], trust: float) -> int:
        """The number of nodes that gives most expected tokens for its cost.

        Args:
            values: each row's node values, root first.
            trust: see :class:`Trust`.
        """
        if self.cost is None:
            return len(values[0])
        rows, promised, best, best_rate = len(values), 0.0, 1, 0.0
        for nodes in range(1, len(values[0]) + 1):
            promised += sum(row[nodes - 1] for row in values) * (trust if nodes > 1 else 1.0)
            rate = promised / self.cost.at(nodes * rows)
            if rate > best_rate:
                best, best_rate = nodes, rate
        return best


# Relative cost of a forward of n tokens where nothing was measured. Packed: rounded from what lmtp-cli tree measured in
# the demo (benchmarks/README.md). Plain: an estimate on the dear side. A GPU's is taken to be flat as far as trees go.
_PACKED_CPU = CostCurve({1: 1.0, 16: 1.4, 32: 2.0, 64: 3.2})
_PLAIN_CPU = CostCurve({1: 1.0, 2: 1.5, 4: 1.6, 8: 1.6, 16: 1.8, 32: 2.6, 64: 4.6})
_GPU_NODES, _CPU_NODES = 32, 16


def default_plan(device: torch.device, packed: bool) -> TreePlan:
    """A dynamic tree: large on an accelerator, and on a CPU as large as each step's probabilities pay for."""
    if device.type != "cpu":
        return TreePlan("dynamic", _GPU_NODES, source=f"default for {device.type}")
    return TreePlan("dynamic", _CPU_NODES, cost=_PACKED_CPU if packed else _PLAIN_CPU, source="default for cpu")


def write_plan(plan: TreePlan, folder: str | os.PathLike, device: str, measured: Mapping) -> Path:
    """``tree.json`` in an ``lmtp/`` folder.

    Args:
        device: type of device that it was measured on; it is used on that alone.
        measured: what the choice rests on, kept for the reader.
    """
    path = Path(folder, TREE_FILE)
    values = asdict(plan)
    values.pop("source")
    values["cost"] = None if plan.cost is None else {str(n): s for n, s in plan.cost.seconds.items()}
    with atomic_write(path) as file:
        json.dump({"device": device, **values, "measured": measured}, file, indent=1)
    return path


def read_plan(folder: str | os.PathLike, device: torch.device) -> TreePlan | None:
    """The plan in an ``lmtp/`` folder; None where there is none, or one for another type of device.

    Raises:
        LMTPError: the file is damaged.
    """
    path = Path(folder, TREE_FILE)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["device"] != device.type:
            return None
        cost = values["cost"] and CostCurve({int(n): float(s) for n, s in values["cost"].items()})
        plan = TreePlan(
            kind=values["kind"],
            nodes=int(values["nodes"]),
            paths=tuple(tuple(map(int, path)) for path in values["paths"]),
            width=int(values["width"]),
            cost=cost or None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LMTPError(f"{path} is damaged ({error!r}): delete it or run lmtp-cli tree again.") from None
    return replace(plan, source=str(path))
