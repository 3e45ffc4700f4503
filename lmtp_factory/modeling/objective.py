"""What a training run optimises: which heads, how much each counts, and what is frozen (L-MTP, equations 4 and 5)."""

from dataclasses import dataclass

from ..errors import LMTPError
from ..options import HEAD_DECAY, HEAD_WEIGHT


@dataclass(frozen=True)
class Objective:
    """Weights of the trained heads' losses.

    Attributes:
        first_head: number of the first head whose loss counts: 0 is the LM head, 1 the first leap head.
        weights: of the losses of heads `first_head`, `first_head + 1`, ...
        trains_backbone: whether gradients flow into the backbone; otherwise only leap heads are trained and saved.
    """

    first_head: int
    weights: tuple[float, ...]
    trains_backbone: bool

    @classmethod
    def of_stage(
        cls, stage: int, num_heads: int, head_weight: float = HEAD_WEIGHT, head_decay: float = HEAD_DECAY
    ) -> "Objective":
        """Stage 1: `sum_i w_i CE_i` of the leap heads alone. Stage 2: `CE_0 + head_weight * sum_i w_i CE_i`.

        Args:
            stage: 1 or 2.
            num_heads: leap heads, the LM head not counted.
            head_weight: beta of stage 2.
            head_decay: w_i = head_decay ** (i - 1).

        Raises:
            LMTPError: another stage.
        """
        leap = [head_decay**i for i in range(num_heads)]
        if stage == 1:
            return cls(1, tuple(leap), trains_backbone=False)
        if stage == 2:
            return cls(0, (1.0, *(head_weight * weight for weight in leap)), trains_backbone=True)
        raise LMTPError(f"stage is {stage!r}, but it has to be 1 (head warm-up) or 2 (full-model tuning).")

    @classmethod
    def of_evaluation(cls, num_heads: int) -> "Objective":
        """Every head's loss, the LM head's first, each with weight 1."""
        return cls(0, (1.0,) * (num_heads + 1), trains_backbone=True)

    def offsets(self, all_offsets: tuple[int, ...]) -> tuple[int, ...]:
        """Offsets of the heads whose losses count, in the order of the losses.

        Args:
            all_offsets: of every head, the LM head's 1 first.
        """
        return all_offsets[self.first_head :]
