"""`lmtp-cli report`: compare loss, accuracy and perplexity of several models on held-out rows."""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LMTPError
from ..options import MARGINAL_LARGEST_K, MARGINAL_POSITIONS
from .arguments import count, labelled_models
from .output import check_output_dir, writing


if TYPE_CHECKING:
    from ..config import LMTPConfig
    from ..evaluation.marginal_scores import MarginalReport
    from ..evaluation.scoring import HeadScores, Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[LABEL=]MODEL",
        help="stage-1 output, adapter or export with heads, or a plain model",
    )
    parser.add_argument("--rows", required=True, metavar="FILE", help="rows written by lmtp-cli distill")
    parser.add_argument("--limit", type=count, metavar="N", help="score the first N rows only")
    parser.add_argument("--batch-size", type=count, default=4, metavar="N")
    parser.add_argument("--output-dir", metavar="DIR", help="also write report.json and report.png there")
    parser.add_argument(
        "--marginal",
        nargs="+",
        type=_paths,
        metavar="K",
        help="also what the model itself knows at +2 and +3: numerical marginalisation over the K most probable paths, "
        f"for each of these K (1 to {MARGINAL_LARGEST_K})",
    )
    parser.add_argument(
        "--marginal-positions",
        type=count,
        metavar="N",
        help=f"positions that --marginal scores, evenly spread (default: {MARGINAL_POSITIONS})",
    )


def _paths(text: str) -> int:
    """Parse a K of `--marginal`, as an `argparse` type."""
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MARGINAL_LARGEST_K):
        raise argparse.ArgumentTypeError(
            f"{text} is no whole number from 1 to {MARGINAL_LARGEST_K} (models come before --marginal)"
        )
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Score each model, print the table and write the files.

    Raises:
        LMTPError: The options do not fit or a model is not there, which is checked before the first is scored; or a model
            fails, after which the scores of those before it are printed.
    """
    from ..evaluation.marginal_scores import scorable_positions
    from ..evaluation.report import write_report
    from ..evaluation.scoring import read_rows

    if args.marginal_positions and not args.marginal:
        raise LMTPError("--marginal-positions is for --marginal: write for instance --marginal 1 4 16 as well.")
    if not Path(args.rows).is_file():
        raise LMTPError(f"--rows {args.rows} is no file: name the JSONL file that lmtp-cli distill wrote.")
    rows = read_rows(args.rows, args.limit)
    available = scorable_positions(rows) if args.marginal else []
    models = labelled_models(args.models)
    configs = _heads_of(models)
    if args.output_dir:
        check_output_dir(args.output_dir)
    # Models without heads are scored at the offsets of the models with heads.
    offsets = next((config.offsets for config in configs.values()), None)
    if args.marginal and len(models) > 1:  # a single model is checked before it is scored anyway
        for path in models.values():
            _check_marginal(path, offsets, rows)
            _free_models()
    scores, marginal = {}, {}
    try:
        for label, path in models.items():
            scores[label], report = _score(args, label, path, offsets, rows, available, label in configs)
            if report:
                marginal[label] = report
            _free_models()
    finally:  # whatever happens to a model, the scores of those before it are not lost
        if scores:
            _print(
                scores,
                {label: config for label, config in configs.items() if label in scores},
                marginal,
                len(available),
            )
    if args.output_dir:
        with writing(args.output_dir):
            write_report(scores, Path(args.output_dir), marginal)
    return 0


def _print(
    scores: "dict[str, HeadScores]",
    configs: "dict[str, LMTPConfig]",
    marginal: "dict[str, MarginalReport]",
    available: int,
) -> None:
    from ..evaluation.report import describe_heads, print_marginal, print_table

    print_table(scores)
    for label, config in configs.items():
        print(f"{label}: {describe_heads(config)}.")
    if len({config.draft_vocab_size for config in configs.values()}) > 1:
        print("Their draft vocabularies differ, so their losses are over different tokens: compare the accuracies.")
    if marginal:
        print_marginal(marginal, available)


def _heads_of(models: dict[str, str]) -> "dict[str, LMTPConfig]":
    """Return label -> heads' configuration of the models that have heads.

    Raises:
        LMTPError: A model is not there, or the heads of two have different offsets.
    """
    from ..evaluation.report import check_model

    configs = {}
    for label, path in models.items():
        if (config := check_model(path)) is None:
            continue
        if configs and config.offsets != next(iter(configs.values())).offsets:
            raise LMTPError(
                f"{path} has heads at other offsets than the models before it: compare them in separate reports."
            )
        configs[label] = config
    return configs


def _check_marginal(path: str, offsets: tuple[int, ...] | None, rows: "Sequence[Row]") -> None:
    """Load a model only to try whether it can be scored with `--marginal`; see `check_marginal`."""
    from ..evaluation.marginal_scores import check_marginal
    from ..evaluation.report import load_for_scoring

    check_marginal(load_for_scoring(path, offsets), rows)


def _score(
    args: argparse.Namespace,
    label: str,
    path: str,
    offsets: tuple[int, ...] | None,
    rows: "Sequence[Row]",
    available: Sequence[tuple[int, int]],
    with_heads: bool,
) -> "tuple[HeadScores, MarginalReport | None]":
    """Load and score one model. The second result is None without `--marginal`."""
    from ..evaluation.marginal_scores import check_marginal, score_marginal, spread_evenly
    from ..evaluation.report import load_for_scoring
    from ..evaluation.scoring import score_heads

    model = load_for_scoring(path, offsets)
    if args.marginal:
        check_marginal(model, rows)
    scores = score_heads(model, rows, args.batch_size, label)
    if not args.marginal:
        return scores, None
    positions = spread_evenly(available, args.marginal_positions or MARGINAL_POSITIONS)
    ks = sorted(set(args.marginal))
    return scores, score_marginal(model, rows, positions, ks, with_heads=with_heads, label=label)


def _free_models() -> None:
    """Free the memory of models that nothing refers to any more, before the next one loads."""
    import torch

    gc.collect()  # a model and its heads refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
