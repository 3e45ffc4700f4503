"""Per-head loss and accuracy, summed on the device and averaged over ranks only when they are logged."""

import torch
from torch import Tensor


class HeadMetrics:
    """Running sums of the heads' losses, hits and targets.

    Args:
        first: number of the first head trained: 1 in stage 1, 0 (the LM head) in stage 2.
        heads: how many are trained.
    """

    def __init__(self, first: int, heads: int):
        self._names = range(first, first + heads)
        self._sums: Tensor | None = None  # (3, heads): loss sums, hits, targets
        self._reduced: Tensor | None = None

    def add(self, outputs) -> None:
        """Add one forward's :class:`~lmtp_factory.modeling.LeapOutput`; does not wait for the device."""
        wide = torch.float32 if outputs.loss_sums.device.type == "mps" else torch.float64  # MPS has no fp64
        sums = torch.stack([outputs.loss_sums.to(wide), outputs.hits.to(wide), outputs.counts.to(wide)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._reduced = None

    def _reduce(self, accelerator) -> Tensor | None:
        if self._reduced is None and self._sums is not None:
            self._reduced = accelerator.reduce(self._sums, reduction="sum").cpu()
        return self._reduced

    def losses(self, accelerator) -> list[float] | None:
        """Mean loss of every head over all ranks; None where nothing was added. A collective operation."""
        sums = self._reduce(accelerator)
        return None if sums is None else (sums[0] / sums[2].clamp(min=1)).tolist()

    def pop(self, accelerator, prefix: str = "") -> dict[str, float]:
        """``loss_head_i`` and ``acc_head_i`` since the last call, over all ranks. A collective operation."""
        sums = self._reduce(accelerator)
        self._sums = self._reduced = None
        if sums is None:
            return {}
        means = sums[:2] / sums[2].clamp(min=1)
        metrics = {f"{prefix}loss_head_{i}": loss for i, loss in zip(self._names, means[0].tolist())}
        return metrics | {f"{prefix}acc_head_{i}": hits for i, hits in zip(self._names, means[1].tolist())}
