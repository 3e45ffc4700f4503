"""`lmtp-cli report`: compare loss, accuracy and perplexity of several models on held-out rows."""

import argparse
from pathlib import Path

from ..errors import LMTPError
from ..options import MARGINAL_LARGEST_K, MARGINAL_POSITIONS
from .arguments import count, labelled_models


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
    """Score each model, print the table and write the files."""
    from ..evaluation.marginal_scores import check_marginal, scorable_positions, score_marginal, spread_evenly
    from ..evaluation.report import describe_heads, load_for_scoring, print_marginal, print_table, write_report
    from ..evaluation.scoring import read_rows, score_heads
    from ..modeling.checkpoint import find_heads, read_config

    if args.marginal_positions and not args.marginal:
        raise LMTPError("--marginal-positions is for --marginal: write for instance --marginal 1 4 16 as well.")
    if not Path(args.rows).is_file():
        raise LMTPError(f"--rows {args.rows} is no file: name the JSONL file that lmtp-cli distill wrote.")
    rows = read_rows(args.rows, args.limit)
    available = scorable_positions(rows) if args.marginal else []
    models = labelled_models(args.models)
    # Models without heads are scored at the offsets of the first model with heads.
    configs = {label: read_config(folder) for label, path in models.items() if (folder := find_heads(path))}
    offsets = next((config.offsets for config in configs.values()), None)
    scores, marginal = {}, {}
    for label, path in models.items():
        model = load_for_scoring(path, offsets)
        if args.marginal:
            check_marginal(model, rows)
        scores[label] = score_heads(model, rows, args.batch_size, label)
        if scores[label].offsets != next(iter(scores.values())).offsets:
            raise LMTPError(
                f"{path} has heads at other offsets than the models before it: compare them in separate reports."
            )
        if args.marginal:
            positions = spread_evenly(available, args.marginal_positions or MARGINAL_POSITIONS)
            ks = sorted(set(args.marginal))
            marginal[label] = score_marginal(model, rows, positions, ks, with_heads=label in configs, label=label)
    print_table(scores)
    for label, config in configs.items():
        print(f"{label}: {describe_heads(config)}.")
    if len({config.draft_vocab_size for config in configs.values()}) > 1:
        print("Their draft vocabularies differ, so their losses are over different tokens: compare the accuracies.")
    if marginal:
        print_marginal(marginal, len(available))
    if args.output_dir:
        write_report(scores, Path(args.output_dir), marginal)
    return 0
