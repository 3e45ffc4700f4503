"""`lmtp-cli select`: keep those of the trained heads that decode fastest on this device."""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LMTPError
from ..files import HEADS_FOLDER, TREE_PLOT_FILE
from .arguments import add_replay_options, count
from .heads_output import check_output, holds_model
from .output import writing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", metavar="STAGE1", help="output directory of stage 1 with more heads than are kept")
    parser.add_argument(
        "--num-heads", type=count, required=True, metavar="N", help="heads to keep, without the LM head"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help=f"directory for {HEADS_FOLDER}/ and the tokenizer"
    )
    add_replay_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generate answers, replay and rank every subset of the heads, and write the fastest with its tree.

    Raises:
        LMTPError: The heads cannot be chosen from, nothing can be measured, or the output cannot be written.
    """
    from ..decoding.tree_choice import Conditions, write_tree
    from ..evaluation.report import load_for_scoring
    from ..evaluation.self_generated import read_prompts, self_generated_rows
    from ..modeling.checkpoint import load_heads, save_heads, validate_checkpoint
    from ..modeling.model import base_of
    from ..tuning.head_subsets import measured_subsets, rank_subsets, subset_table, subsets
    from ..tuning.plots import draw_tree
    from ..tuning.replay import accuracies
    from ..tuning.tree_search import measured, tree_config_of

    output = Path(args.output)
    config = validate_checkpoint(_heads_folder(Path(args.model)))
    trained = config.num_heads
    if args.num_heads > trained:
        raise LMTPError(
            f"--num-heads is {args.num_heads}, but {args.model} has {trained} heads: write --num-heads {trained} or less."
        )
    subsets(config, args.num_heads)  # raises before anything is loaded
    check_output(output)
    tokenizer, prompts = read_prompts(args.model, args.prompts, args.limit)
    model = base_of(load_for_scoring(args.model))
    rows = self_generated_rows(model, prompts, args.max_new_tokens)
    ranked = rank_subsets(model, rows, args.num_heads, context=args.context)
    best = ranked[0]
    observed = best.observed
    print(f"\nWays to keep {args.num_heads} of {trained} heads: {len(ranked)}, each with its fastest tree.")
    print(f"{subset_table(ranked)}\n")

    folder = output / HEADS_FOLDER
    tree_config = tree_config_of(best.best, observed, best.costs)
    facts = measured(best.options, observed, best.costs) | {"subsets": measured_subsets(ranked)}
    with writing(output), _removed_on_error(folder):  # or the same command would refuse the folder
        tokenizer.save_pretrained(output)
        # From the file: the loaded model's heads may have been cast.
        save_heads(load_heads(args.model).subset(best.offsets), folder)
        path = write_tree(tree_config, folder, Conditions.of(model), facts)
        seconds = best.costs.verify.seconds
        draw_tree(tree_config, accuracies(observed), seconds, best.options, folder / TREE_PLOT_FILE)
    print(f"Written: {folder}, {path} and {folder / TREE_PLOT_FILE}")
    return 0


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """Remove a new folder if an exception is raised inside."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _heads_folder(stage1: Path) -> Path:
    """Return the `lmtp/` folder of a directory that holds heads and no backbone.

    Raises:
        LMTPError: There are no heads, or a model or an adapter lies beside them.
    """
    folder = stage1 / HEADS_FOLDER
    if not folder.is_dir():
        raise LMTPError(
            f"{stage1} is no directory with an {HEADS_FOLDER}/ folder, so it has no heads: name the output directory of "
            "stage 1."
        )
    if holds_model(stage1):
        raise LMTPError(
            f"{stage1} holds a model or an adapter that was tuned with its heads, and heads alone would lose it: name "
            "the output directory of stage 1."
        )
    return folder
