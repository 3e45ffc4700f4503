"""`lmtp-cli tree`: find the draft tree with the most tokens per second for a model on this device."""

import argparse
from pathlib import Path

from ..errors import LMTPError
from .arguments import add_replay_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", metavar="MODEL", help="export, adapter or stage-1 directory with heads")
    add_replay_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generate answers, time the device, rank the trees, and write `lmtp/tree.json` and `lmtp/tree.png`."""
    from ..decoding.tree_config import DEFAULT_WIDTH, Conditions, write_tree
    from ..evaluation.report import load_for_scoring
    from ..evaluation.self_generated import read_prompts, self_generated_rows
    from ..modeling.checkpoint import find_heads
    from ..modeling.model import base_of
    from ..tuning.costs import measure_costs
    from ..tuning.plots import draw_tree
    from ..tuning.replay import accuracies, observe_answers
    from ..tuning.tree_search import measured, rank_trees, table, tree_config_of

    folder = find_heads(args.model) if Path(args.model).is_dir() else None
    if folder is None:
        raise LMTPError(
            f"{args.model} is no directory with an lmtp/ folder: name one, since tree.json is written into it."
        )
    _, prompts = read_prompts(args.model, args.prompts, args.limit)
    model = base_of(load_for_scoring(args.model))
    rows = self_generated_rows(model, prompts, args.max_new_tokens)
    observed = observe_answers(model, rows, DEFAULT_WIDTH)
    costs = measure_costs(model, context=args.context)
    options = rank_trees(observed, costs)
    best = max(options, key=lambda option: option.tokens_per_second)
    tree_config = tree_config_of(best, observed, costs)
    facts = measured(options, observed, costs)
    path = write_tree(tree_config, folder, Conditions.of(model), facts)
    draw_tree(tree_config, accuracies(observed), costs.verify.seconds, options, folder / "tree.png")

    print(f"\nms of a forward by tokens: {_milliseconds(costs.verify.seconds)}; ms of a draft: {1e3 * costs.draft:.1f}")
    print("Accuracy of the first candidates of each level, %:")
    for level, rates in enumerate(accuracies(observed), 1):
        print(f"  level {level}: {' '.join(f'{100 * rate:5.1f}' for rate in rates[:5])}")
    print(f"\n{table(options)}\n\nWritten: {path} and {folder / 'tree.png'}")
    return 0


def _milliseconds(seconds: dict[int, float]) -> str:
    return ", ".join(f"{size}: {1e3 * cost:.1f}" for size, cost in seconds.items())
