"""Training objective: which heads are trained, their loss weights, and what is frozen (L-MTP, equations 4 and 5)."""

from dataclasses import dataclass

from ..errors import LMTPError
from ..options import HEAD_DECAY, HEAD_WEIGHT


@dataclass(frozen=True)
class Objective:
    """Heads whose losses are summed, and their weights.

    Attributes:
        first_head: Index of the first head in the loss: 0 is the LM head, 1 the first leap head.
        weights: Loss weights of heads `first_head`, `first_head + 1`, ...
        trains_backbone: Whether gradients flow into the backbone. If not, only the leap heads are trained and saved.
    """

    first_head: int
    weights: tuple[float, ...]
    trains_backbone: bool

    @classmethod
    def of_stage(
        cls, stage: int, num_heads: int, head_weight: float = HEAD_WEIGHT, head_decay: float = HEAD_DECAY
    ) -> "Objective":
        """Return the objective of a stage.

        Stage 1 trains `sum_i w_i CE_i` over the leap heads, stage 2 `CE_0 + head_weight * sum_i w_i CE_i`.

        Args:
            stage: 1 or 2.
            num_heads: Number of leap heads, not counting the LM head.
            head_weight: The paper's beta, used in stage 2.
            head_decay: `w_i = head_decay ** (i - 1)`.

        Raises:
            LMTPError: `stage` is neither 1 nor 2.
        """
        leap = [head_decay**i for i in range(num_heads)]
        if stage == 1:
            return cls(1, tuple(leap), trains_backbone=False)
        if stage == 2:
            return cls(0, (1.0, *(head_weight * weight for weight in leap)), trains_backbone=True)
        raise LMTPError(f"stage is {stage!r}, but it has to be 1 (head warm-up) or 2 (full-model tuning).")

    @classmethod
    def of_evaluation(cls, num_heads: int) -> "Objective":
        """Return the objective that sums the losses of all heads, the LM head included, with weight 1."""
        return cls(0, (1.0,) * (num_heads + 1), trains_backbone=True)

    def offsets(self, all_offsets: tuple[int, ...]) -> tuple[int, ...]:
        """Return the offsets of the heads in the loss, in the order of `weights`.

        Args:
            all_offsets: Offsets of all heads, with the LM head's 1 first.
        """
        return all_offsets[self.first_head :]
