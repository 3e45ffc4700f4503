"""Metrics of the heads: their names in logs, and averages of losses and accuracies over steps and ranks."""

import re
from typing import NamedTuple

import torch
from torch import Tensor


LOSS, ACCURACY, TAU = "loss", "acc", "tau"
# Parts of a LeapOutput that are summed.
_ROWS = ("loss_sums", "hits", "counts", "outside")


class HeadMetric(NamedTuple):
    """A metric of one head, or of all heads together. `str` gives its name in logs, for example `eval_loss_head_1`.

    Attributes:
        quantity: `LOSS` or `ACCURACY` of a head, or `TAU`.
        head: Number of the head, 0 for the LM head; None for `TAU`.
        prefix: Empty for training, `eval_` or `eval_<dataset>_` for evaluation.
    """

    quantity: str
    head: int | None
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.prefix}{self.quantity}" + ("" if self.head is None else f"_head_{self.head}")

    @classmethod
    def parse(cls, name: str) -> "HeadMetric | None":
        """The metric of a name in a log; None if the name is that of another entry."""
        found = re.fullmatch(rf"(.+_)?(?:({LOSS}|{ACCURACY})_head_(\d+)|{TAU})", name)
        if found is None:
            return None
        prefix, quantity, head = found.groups(default="")
        return cls(quantity, int(head), prefix) if quantity else cls(TAU, None, prefix)


def heads_metrics(logs: dict[str, float]) -> dict[HeadMetric, float]:
    """The heads' metrics among the entries of a Trainer log."""
    parsed = ((HeadMetric.parse(name), value) for name, value in logs.items())
    return {metric: value for metric, value in parsed if metric is not None}


class HeadMetrics:
    """Sums of the heads' losses, hits and targets, kept on the device until they are logged.

    Args:
        first: Number of the first trained head: 1 in stage 1, 0 (the LM head) in stage 2.
        heads: Number of trained heads.
    """

    def __init__(self, first: int, heads: int):
        self._heads = range(first, first + heads)
        self._sums: Tensor | None = None  # (4, heads), see _ROWS
        self._reduced: Tensor | None = None

    def add(self, outputs) -> None:
        """Add the `LeapOutput` of one forward, without waiting for the device."""
        dtype = torch.float32 if outputs.loss_sums.device.type == "mps" else torch.float64  # MPS has no fp64
        sums = torch.stack([getattr(outputs, name).to(dtype) for name in _ROWS])
        self._sums = sums if self._sums is None else self._sums + sums
        self._reduced = None

    def _reduce(self, accelerator) -> Tensor | None:
        if self._reduced is None and self._sums is not None:
            self._reduced = accelerator.reduce(self._sums, reduction="sum").cpu()
        return self._reduced

    def losses(self, accelerator) -> list[float] | None:
        """Mean loss of every head over all ranks, a collective operation; None if nothing was added."""
        sums = self._reduce(accelerator)
        return None if sums is None else (sums[0] / sums[2].clamp(min=1)).tolist()

    def pop(self, accelerator, prefix: str = "") -> dict[str, float]:
        """Mean metrics since the last call over all ranks, by name; a collective operation."""
        losses, sums = self.losses(accelerator), self._reduce(accelerator)
        self._sums = self._reduced = None
        if sums is None:
            return {}
        accuracies = (sums[1] / (sums[2] + sums[3]).clamp(min=1)).tolist()  # what cannot be drafted is a miss
        return {
            str(HeadMetric(quantity, head, prefix)): value
            for quantity, values in ((LOSS, losses), (ACCURACY, accuracies))
            for head, value in zip(self._heads, values)
        }
