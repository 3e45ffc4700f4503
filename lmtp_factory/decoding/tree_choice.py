"""Which tree a model drafts with: that of `lmtp/tree.json` under the conditions that it was measured under, or a default."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from ..errors import LMTPError
from ..files import TREE_FILE, atomic_write
from .cpu_prepacked import may_prepack, mostly_prepacked
from .machine import machine_name
from .support import warn_once
from .tree_config import CostCurve, TreeConfig


@dataclass(frozen=True)
class Conditions:
    """Conditions under which a tree was measured. Under other conditions another tree may be the fastest.

    None of them is timed, so that another process on the same machine finds the same if it has as much memory.

    Attributes:
        device: Device type, `cpu` or `cuda`.
        dtype: Dtype of the model, e.g. `float32` or `bfloat16`.
        prepacked: Whether linear layers may use prepacked weights (`cpu_prepacked.may_prepack`).
        machine: Name of the GPU or the processor.
        threads: Number of torch's threads on a CPU, else None.
    """

    device: str
    dtype: str
    prepacked: bool
    machine: str
    threads: int | None

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
    with _naming_damage(path):
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
    with _naming_damage(path):
        levels = json.loads(path.read_text(encoding="utf-8")).get("measured", {}).get("accuracies") or []
        accuracies = [[float(rate) for rate in level] for level in levels]
        if not all(level and all(0 <= rate <= 1 for rate in level) for level in accuracies):
            raise ValueError("an accuracy is no share")
    return accuracies or None


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turn the errors of reading a damaged file into an `LMTPError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LMTPError(f"{path} is damaged ({error!r}): delete it or run lmtp-cli tree again.") from None
