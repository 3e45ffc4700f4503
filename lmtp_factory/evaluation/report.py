"""Report that compares the scores of several models: table, JSON, plot."""

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
    """Load a model with its heads, or with untrained heads (identity blocks on the LM head) if it has none.

    Args:
        path: Directory or hub id.
        offsets: Offsets of untrained heads.
        dtype: Dtype of the weights. Default: fp32 on a CPU, where bf16 is slow, else as saved.
    """
    has_gpu = torch.cuda.is_available()
    kwargs = {"dtype": dtype or ("auto" if has_gpu else torch.float32), "device_map": "cuda" if has_gpu else None}
    if find_heads(path) is not None:
        return load_model(path, **kwargs)
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    attach_heads(model, LMTPConfig(offsets=offsets, head_kind="shared"))
    return model.requires_grad_(False).eval()


def table(scores: Mapping[str, HeadScores]) -> str:
    """Format loss and top-1 accuracy of every head, one line per model."""
    width = max(len(label) for label in scores)
    offsets = next(iter(scores.values())).offsets
    header = " ".join(f"{f'+{offset}':>13}" for offset in offsets)
    lines = [f"{'':<{width}} {header}   perplexity", f"{'':<{width}} " + " ".join(["  loss    acc"] * len(offsets))]
    for label, score in scores.items():
        cells = " ".join(f"{loss:6.3f} {100 * acc:5.1f}%" for loss, acc in zip(score.losses, score.accuracies))
        lines.append(f"{label:<{width}} {cells}   {score.perplexity:10.3f}")
    return "\n".join(lines)


def describe_heads(config: LMTPConfig) -> str:
    """Return what a set of heads reads, computes and drafts, for the reader of a report."""
    unembeddings = {"own": "unembeddings of their own", "shared": "the LM head's unembedding"}[config.head_kind]
    inputs = "the final hidden state" + (" and the newest token" if config.reads_token else "")
    blocks = f"{config.head_layers} {config.head_block} block{'s' * (config.head_layers > 1)}"
    size = config.draft_vocab_size
    vocabulary = "every token" if size is None else f"{size:,} of {config.vocab_size:,} tokens"
    offsets = ", ".join(f"+{offset}" for offset in config.offsets[1:])
    return f"heads {offsets} read {inputs}, have {blocks} and {unembeddings}, draft {vocabulary}"


def print_table(scores: Mapping[str, HeadScores]) -> None:
    """Print the table and a note about models without heads."""
    print(table(scores))
    print("Models without heads are scored with untrained heads: identity blocks on their LM head.")


def write_report(scores: Mapping[str, HeadScores], output_dir: Path) -> None:
    """Write `report.json` and `report.png` to `output_dir`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(output_dir / REPORT_FILE) as file:
        json.dump({label: score.to_dict() for label, score in scores.items()}, file, indent=2)
    draw_head_bars(scores, output_dir / PLOT_FILE)
    print(f"Written: {output_dir / REPORT_FILE} and {output_dir / PLOT_FILE}")
