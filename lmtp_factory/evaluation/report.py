"""Report that compares the scores of several models: table, JSON, plot."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..config import LMTPConfig
from ..decoding import attach_heads, load_model
from ..errors import LMTPError, first_line
from ..files import atomic_write
from ..modeling.checkpoint import find_heads, validate_checkpoint
from ..modeling.load import base_of_heads
from .marginal import MARGINAL_OFFSETS
from .marginal_scores import MarginalReport
from .plots import draw_head_bars
from .scoring import HeadScores


REPORT_FILE, PLOT_FILE = "report.json", "report.png"
# Next-token accuracy from which the text counts as the model's own greedy answers.
_GREEDY_TEXT = 0.95


def check_model(path: str) -> LMTPConfig | None:
    """Check without loading weights that a model is there; return the configuration of its heads, or None without heads.

    Args:
        path: Directory or hub id.

    Raises:
        LMTPError: There is no such model, its base model is not there, or its heads are damaged.
    """
    folder = find_heads(path)
    heads = None if folder is None else validate_checkpoint(folder)
    if heads is None or os.path.isdir(path):  # of a hub id with heads only lmtp/ is here yet
        try:
            AutoConfig.from_pretrained(path if heads is None else base_of_heads(path, heads))
        except (OSError, ValueError) as error:
            raise _unloadable(path, error) from error
    return heads


def _unloadable(path: str, error: Exception) -> LMTPError:
    return LMTPError(f"No model can be loaded from {path} ({first_line(error)}): name a directory or hub id of one.")


def load_for_scoring(path: str, offsets: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a model with its heads, or with untrained heads (identity blocks on the LM head) if it has none.

    Args:
        path: Directory or hub id.
        offsets: Offsets of untrained heads.
        dtype: Dtype of the weights. Default: fp32 on a CPU, where bf16 is slow, else as saved.

    Raises:
        LMTPError: The model cannot be loaded, or cannot have heads.
    """
    has_gpu = torch.cuda.is_available()
    kwargs = {"dtype": dtype or ("auto" if has_gpu else torch.float32), "device_map": "cuda" if has_gpu else None}
    try:
        if find_heads(path) is not None:
            return load_model(path, **kwargs)
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except (LMTPError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unloadable(path, error) from error
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
    inputs = {
        "state": "the final hidden state",
        "state_token": "the final hidden state and the newest token",
        "layers": "a weighted sum of all layers' states",
    }[config.head_inputs]
    blocks = f"{config.head_layers} {config.head_block} block{'s' * (config.head_layers > 1)}"
    size = config.draft_vocab_size
    vocabulary = "every token" if size is None else f"{size:,} of {config.vocab_size:,} tokens"
    offsets = ", ".join(f"+{offset}" for offset in config.offsets[1:])
    return f"heads {offsets} read {inputs}, have {blocks} and {unembeddings}, draft {vocabulary}"


def print_table(scores: Mapping[str, HeadScores]) -> None:
    """Print the table and a note about models without heads."""
    print(table(scores))
    print("Models without heads are scored with untrained heads: identity blocks on their LM head.")


def marginal_table(reports: Mapping[str, MarginalReport]) -> str:
    """Format what each model knows at +2 and +3: the LM head at +1, every K, and the heads."""
    width = max(len(label) for label in reports)
    columns = f"{'acc':>6} {'mass':>7} {'forwards':>8} {'rows':>4}"
    lines = [
        f"{'':<{width}} {'':<8} {'+1':>6}" + "".join(f"   {f'+{offset}':^28}" for offset in MARGINAL_OFFSETS),
        f"{'':<{width}} {'':<8} {'acc':>6}" + f"   {columns}" * len(MARGINAL_OFFSETS),
    ]
    for label, report in reports.items():
        lines.append(f"{label:<{width}} {'LM head':<8} {_percent(report.next_token)}")
        for score in report.marginal:
            cells = "".join(
                f"   {_percent(accuracy)} {_percent(mass, 7)} {forwards:>8} {rows:>4}"
                for accuracy, mass, forwards, rows in zip(score.accuracies, score.masses, score.forwards, score.rows)
            )
            lines.append(f"{label:<{width}} {f'K = {score.k}':<8} {'':>6}{cells}")
        if report.heads:
            cells = "".join(
                f"   {_percent(report.heads[offset])} {'':>7} {0:>8} {0:>4}"
                if offset in report.heads
                else f"   {'':>28}"
                for offset in MARGINAL_OFFSETS
            )
            lines.append(f"{label:<{width}} {'heads':<8} {'':>6}{cells}".rstrip())
    return "\n".join(lines)


def _percent(share: float, width: int = 6) -> str:
    return f"{100 * share:>{width - 1}.1f}%"


def print_marginal(reports: Mapping[str, MarginalReport], available: int) -> None:
    """Print the table of marginalisation, what its columns are, and what has to be known to read it.

    Args:
        reports: Report of each model, all at the same positions.
        available: Number of positions that could be scored.
    """
    positions = next(iter(reports.values())).positions
    spread = "all" if positions == available else f"{positions:,}, evenly spread, of {available:,}"
    print(f"\nMarginalisation (numerical, K paths) and heads, top-1 at the same positions ({spread}):")
    print(marginal_table(reports))
    print("mass: probability of the K paths. forwards and rows: forwards and token rows that a position adds.")
    for label, report in reports.items():
        print(f"{label}: {report.forwards:,} forwards of {report.rows:,} token rows in {report.seconds:.1f} s.")
        if report.reads_token and report.heads:
            print(f"{label}: its heads also read the token at +1, which marginalisation has to guess.")
        if report.next_token >= _GREEDY_TEXT:
            print(
                f"{label}: the text is nearly its own greedy answer, which K = 1 follows by construction: read K = 1 on "
                "text that it sampled or did not write."
            )


def write_report(
    scores: Mapping[str, HeadScores], output_dir: Path, marginal: Mapping[str, MarginalReport] | None = None
) -> None:
    """Write `report.json` and `report.png` to `output_dir`.

    Args:
        scores: Scores of each model.
        output_dir: Directory, created if missing.
        marginal: Marginalisation of each model, written as its key `marginal`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    content = {label: score.to_dict() for label, score in scores.items()}
    for label, report in (marginal or {}).items():
        content[label]["marginal"] = report.to_dict()
    with atomic_write(output_dir / REPORT_FILE) as file:
        json.dump(content, file, indent=2)
    draw_head_bars(scores, output_dir / PLOT_FILE)
    print(f"Written: {output_dir / REPORT_FILE} and {output_dir / PLOT_FILE}")
