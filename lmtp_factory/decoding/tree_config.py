"""Kind and size of the draft tree: `lmtp/tree.json` or a default for the device."""

import json
import math
import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import nn

from ..errors import LMTPError
from ..files import TREE_FILE, atomic_write
from .cpu_prepacked import may_prepack, mostly_prepacked
from .machine import machine_name, processor_name
from .support import warn_once
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


@dataclass(frozen=True)
class Conditions:
    """Conditions under which a tree was measured. Under other conditions another tree may be the fastest.

    None of them is timed: another process on the same machine finds the same.

    Attributes:
        device: Device type, `cpu` or `cuda`.
        dtype: Dtype of the model, e.g. `float32` or `bfloat16`.
        prepacked: Whether linear layers may use prepacked weights (`cpu_prepacked.may_prepack`).
        machine: Name of the GPU or the processor. Default: this machine's processor.
        threads: Number of torch's threads on a CPU, else None. Default: this process's.
    """

    device: str
    dtype: str
    prepacked: bool
    machine: str = field(default_factory=processor_name)
    threads: int | None = field(default_factory=torch.get_num_threads)

    @classmethod
    def of(cls, model: nn.Module, compiled: bool = False) -> "Conditions":
        """Return the conditions under which `model` decodes on this machine, with a compiled forward or without."""
        device, dtype = model.device, str(model.dtype).removeprefix("torch.")
        threads = torch.get_num_threads() if device.type == "cpu" else None
        return cls(device.type, dtype, may_prepack(model, compiled), machine_name(device), threads)

    def __str__(self) -> str:
        where = self.machine if self.threads is None else f"{self.machine}, threads: {self.threads}"
        return f"{self.device} ({where}), {self.dtype}, {'prepacked' if self.prepacked else 'ordinary'} weights"


# Relative cost of a forward by its number of tokens, used if nothing was measured. Prepacked: rounded from the demo's
# lmtp-cli tree (benchmarks/README.md). Plain: a conservative (high) estimate. On a GPU the cost is assumed to be
# constant.
PREPACKED_CPU = CostCurve({1: 1.0, 16: 1.4, 32: 2.0, 64: 3.2})
PLAIN_CPU = CostCurve({1: 1.0, 2: 1.5, 4: 1.6, 8: 1.6, 16: 1.8, 32: 2.6, 64: 4.6})
_GPU_NODES, _CPU_NODES = 32, 16


def default_tree(model: nn.Module, compiled: bool = False) -> TreeConfig:
    """Return a dynamic tree: large on an accelerator; on a CPU cut by each step's expected tokens per second."""
    source = f"default for {model.device.type}"
    if model.device.type != "cpu":
        return TreeConfig("dynamic", _GPU_NODES, source=source)
    cost = PREPACKED_CPU if mostly_prepacked(model, compiled) else PLAIN_CPU
    return TreeConfig("dynamic", _CPU_NODES, cost=cost, source=source)


def tree_config_for(model: nn.Module, compiled: bool = False) -> TreeConfig:
    """Return the default draft tree of `model`: `lmtp/tree.json` if it was measured under the same conditions.

    A file that was measured under others is passed over. The log says so once.

    Args:
        model: A model with leap heads.
        compiled: Whether its backbone's forward is compiled.

    Raises:
        LMTPError: `tree.json` is damaged.
    """
    folder = model.leap_heads.folder
    found = None if folder is None else read_tree(folder)
    if found is None:
        return default_tree(model, compiled)
    tree_config, measured_under = found
    conditions = Conditions.of(model, compiled)
    if measured_under == conditions:
        return tree_config
    tree_config = default_tree(model, compiled)
    other = f"{Path(folder, TREE_FILE)} was measured on {measured_under or 'an unknown machine'}, this is {conditions}"
    warn_once(f"Drafting with the default tree: {other}. lmtp-cli tree measures one here.")
    return replace(tree_config, source=f"{tree_config.source}; {other}")


def write_tree(tree_config: TreeConfig, folder: str | os.PathLike, conditions: Conditions, measured: Mapping) -> Path:
    """Write `tree.json` into an `lmtp/` folder.

    Args:
        tree_config: The tree.
        folder: The `lmtp/` folder.
        conditions: Conditions of the measurement. The tree is used under the same conditions only.
        measured: Measurements behind the choice, stored for the reader.

    Returns:
        Path of the file.
    """
    path = Path(folder, TREE_FILE)
    values = asdict(tree_config)
    for key in ("source", "always"):
        values.pop(key)
    values["cost"] = None if tree_config.cost is None else {str(n): s for n, s in tree_config.cost.seconds.items()}
    with atomic_write(path) as file:
        json.dump({**asdict(conditions), **values, "measured": measured}, file, indent=1)
    return path


def read_tree(folder: str | os.PathLike) -> tuple[TreeConfig, Conditions | None] | None:
    """Read `tree.json` from an `lmtp/` folder.

    Returns:
        The tree and the conditions of its measurement, or None if there is no file. The conditions are None if an older
        version wrote the file without them.

    Raises:
        LMTPError: The file is damaged: it is no JSON, lacks a value or describes an impossible tree.
    """
    path = Path(folder, TREE_FILE)
    if not path.is_file():
        return None
    with _damage_named(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        cost = values["cost"] and CostCurve({int(n): float(s) for n, s in values["cost"].items()})
        tree_config = TreeConfig(
            kind=values["kind"],
            nodes=int(values["nodes"]),
            paths=tuple(tuple(map(int, path)) for path in values["paths"]),
            width=int(values["width"]),
            cost=cost or None,
            expected_gain=float(values.get("expected_gain", 0.0)),  # older files do not have it
        )
        if cost and not all(seconds > 0 for seconds in cost.seconds.values()):
            raise ValueError("a cost is not positive")
    names = [condition.name for condition in fields(Conditions)]
    known = all(name in values for name in names)
    return replace(tree_config, source=str(path)), Conditions(*(values[name] for name in names)) if known else None


def read_accuracies(folder: str | os.PathLike) -> list[list[float]] | None:
    """Read what `tree.json` in an `lmtp/` folder measured: for each level the accuracy of the candidate of each rank.

    Returns:
        The accuracies, or None if there is no file or none was measured.

    Raises:
        LMTPError: The file is damaged.
    """
    path = Path(folder, TREE_FILE)
    if not path.is_file():
        return None
    with _damage_named(path):
        levels = json.loads(path.read_text(encoding="utf-8")).get("measured", {}).get("accuracies") or []
        accuracies = [[float(rate) for rate in level] for level in levels]
        if not all(level and all(0 <= rate <= 1 for rate in level) for level in accuracies):
            raise ValueError("an accuracy is no share")
    return accuracies or None


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn the errors of reading a damaged file into an `LMTPError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LMTPError(f"{path} is damaged ({error!r}): delete it or run lmtp-cli tree again.") from None
