"""Scores of several models side by side: table, JSON, plot."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ..config import LMTPConfig
from ..decoding import attach_heads, load_model
from ..files import atomic_write
from ..modeling.checkpoint import find_heads
from .plots import draw_head_bars
from .scoring import HeadScores


REPORT_FILE, PLOT_FILE = "report.json", "report.png"


def load_for_scoring(path: str, offsets: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """A model with heads: its own, or untrained ones at `offsets` (identity blocks on the LM head) where it has none.

    Weights are fp32 on a CPU, where bf16 arithmetic is slow, unless `dtype` says otherwise.
    """
    has_gpu = torch.cuda.is_available()
    kwargs = {"dtype": dtype or ("auto" if has_gpu else torch.float32), "device_map": "cuda" if has_gpu else None}
    if find_heads(path) is not None:
        return load_model(path, **kwargs)
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    attach_heads(model, LMTPConfig(offsets=offsets, head_kind="shared"))
    return model.requires_grad_(False).eval()


def table(scores: Mapping[str, HeadScores]) -> str:
    """Loss and top-1 accuracy of every head, a row a model."""
    width = max(len(label) for label in scores)
    offsets = next(iter(scores.values())).offsets
    header = " ".join(f"{f'+{offset}':>13}" for offset in offsets)
    lines = [f"{'':<{width}} {header}   perplexity", f"{'':<{width}} " + " ".join(["  loss    acc"] * len(offsets))]
    for label, score in scores.items():
        cells = " ".join(f"{loss:6.3f} {100 * acc:5.1f}%" for loss, acc in zip(score.losses, score.accuracies))
        lines.append(f"{label:<{width}} {cells}   {score.perplexity:10.3f}")
    return "\n".join(lines)


def print_table(scores: Mapping[str, HeadScores]) -> None:
    """`table` on stdout, with what has to be known to read it."""
    print(table(scores))
    print("Models without heads are scored with untrained ones: identity blocks on their own LM head.")


def write_report(scores: Mapping[str, HeadScores], output_dir: Path) -> None:
    """`report.json` and `report.png` in `output_dir`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(output_dir / REPORT_FILE) as file:
        json.dump({label: score.to_dict() for label, score in scores.items()}, file, indent=2)
    draw_head_bars(scores, output_dir / PLOT_FILE)
    print(f"Written: {output_dir / REPORT_FILE} and {output_dir / PLOT_FILE}")
