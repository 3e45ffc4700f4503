"""`lmtp-cli report`: compare loss, accuracy and perplexity of several models on held-out rows."""

import argparse
from pathlib import Path

from ..errors import LMTPError
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


def run(args: argparse.Namespace) -> int:
    """Score each model, print the table and write the files."""
    from ..evaluation.report import describe_heads, load_for_scoring, print_table, write_report
    from ..evaluation.scoring import read_rows, score_heads
    from ..modeling.checkpoint import find_heads, read_config

    if not Path(args.rows).is_file():
        raise LMTPError(f"--rows {args.rows} is no file: name the JSONL file that lmtp-cli distill wrote.")
    rows = read_rows(args.rows, args.limit)
    models = labelled_models(args.models)
    # Models without heads are scored at the offsets of the first model with heads.
    configs = {label: read_config(folder) for label, path in models.items() if (folder := find_heads(path))}
    offsets = next((config.offsets for config in configs.values()), None)
    scores = {}
    for label, path in models.items():
        scores[label] = score_heads(load_for_scoring(path, offsets), rows, args.batch_size, label)
        if scores[label].offsets != next(iter(scores.values())).offsets:
            raise LMTPError(
                f"{path} has heads at other offsets than the models before it: compare them in separate reports."
            )
    print_table(scores)
    for label, config in configs.items():
        print(f"{label}: {describe_heads(config)}.")
    if len({config.draft_vocab_size for config in configs.values()}) > 1:
        print("Their draft vocabularies differ, so their losses are over different tokens: compare the accuracies.")
    if args.output_dir:
        write_report(scores, Path(args.output_dir))
    return 0
