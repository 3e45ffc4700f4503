"""What all parts of `gpu.py` share: paths, device, sizes, and the model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lmtp_factory.evaluation.scoring import Row, read_rows


@dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Attributes:
        model: Directory of the base model.
        rows: Training rows that the model wrote (`lmtp-cli distill`).
        heldout: Rows that nobody trains on.
        folder: Output directory.
        device: CUDA, or the CPU at toy size.
        toy: Whether sizes are the smallest that run every line.
    """

    model: str
    rows: Path
    heldout: Path
    folder: Path
    device: torch.device
    toy: bool

    @property
    def dtype(self) -> torch.dtype:
        """bf16 on a GPU; on a CPU, where bf16 is slow, fp32."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def base(self) -> nn.Module:
        """Load the base model."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype).to(self.device)

    def training_rows(self) -> list[Row]:
        """Read the training rows."""
        return read_rows(self.rows, 8 if self.toy else None)

    def heldout_rows(self) -> list[Row]:
        """Read the held-out rows."""
        return read_rows(self.heldout, 2 if self.toy else 64)
