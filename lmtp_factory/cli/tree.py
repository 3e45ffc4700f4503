"""`lmtp-cli tree`: find the draft tree with the most tokens per second for a model on this device."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LMTPError
from ..files import TREE_PLOT_FILE
from .arguments import add_replay_options, heads_of
from .output import check_output_dir, writing


if TYPE_CHECKING:
    from ..tuning.replay import Observed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", metavar="MODEL", help="export, adapter or stage-1 directory with heads")
    add_replay_options(parser)
    parser.add_argument(
        "--chain",
        action="store_true",
        help="only say which chain is fastest, for an engine that verifies chains (lmtp-cli serve); writes nothing",
    )
    parser.add_argument(
        "--step-seconds",
        type=seconds_by_length,
        metavar="0:S,1:S,...",
        help="with --chain: seconds of the engine's step by number of drafts, the drafting included (default: this "
        "device with transformers)",
    )


def run(args: argparse.Namespace) -> int:
    """Generate answers, time the device, rank the trees, and write `lmtp/tree.json` and `lmtp/tree.png`.

    Raises:
        LMTPError: The options do not fit, there are no heads, nothing can be measured, or the folder cannot be written.
    """
    from ..decoding.tree_choice import Conditions, write_tree
    from ..decoding.tree_config import DEFAULT_WIDTH
    from ..evaluation.report import load_for_scoring
    from ..evaluation.self_generated import read_prompts, self_generated_rows
    from ..modeling.model import base_of
    from ..tuning.costs import measure_costs
    from ..tuning.plots import draw_tree
    from ..tuning.replay import accuracies, observe_answers
    from ..tuning.tree_search import measured, rank_trees, table, tree_config_of

    if args.step_seconds and not args.chain:
        raise LMTPError("--step-seconds needs --chain: write both, or leave it out.")
    if not args.chain and not Path(args.model).is_dir():
        raise LMTPError(
            f"{args.model} is no directory with an lmtp/ folder: name one, since tree.json is written into it."
        )
    folder = heads_of(args.model)
    if not args.chain:
        check_output_dir(folder, "MODEL")
    _, prompts = read_prompts(args.model, args.prompts, args.limit)
    model = base_of(load_for_scoring(args.model))
    rows = self_generated_rows(model, prompts, args.max_new_tokens)
    observed = observe_answers(model, rows, DEFAULT_WIDTH)
    if args.chain and args.step_seconds:
        print(_chains(observed, args.step_seconds))
        return 0
    costs = measure_costs(model, context=args.context)
    if args.chain:
        lengths = range(observed[0].ranks.shape[1] + 1)
        print(_chains(observed, {n: costs.verify.at(n + 1) + (costs.draft if n else 0) for n in lengths}))
        return 0
    options = rank_trees(observed, costs)
    best = max(options, key=lambda option: option.tokens_per_second)
    tree_config = tree_config_of(best, observed, costs)
    facts = measured(options, observed, costs)
    print(f"\nms of a forward by tokens: {_milliseconds(costs.verify.seconds)}; ms of a draft: {1e3 * costs.draft:.1f}")
    print("Accuracy of the first candidates of each level, %:")
    for level, rates in enumerate(accuracies(observed), 1):
        print(f"  level {level}: {' '.join(f'{100 * rate:5.1f}' for rate in rates[:5])}")
    print(f"\n{table(options)}\n")

    with writing(folder):
        path = write_tree(tree_config, folder, Conditions.of(model), facts)
        draw_tree(tree_config, accuracies(observed), costs.verify.seconds, options, folder / TREE_PLOT_FILE)
    print(f"Written: {path} and {folder / TREE_PLOT_FILE}")
    return 0


def _chains(observed: Sequence["Observed"], seconds: dict[int, float]) -> str:
    """Return the table of chains and the option of the best; see `rank_chains`."""
    from ..tuning.tree_search import rank_chains, table

    chains = rank_chains(observed, seconds)
    drafts = max(chains, key=lambda option: option.tokens_per_second).nodes - 1
    advice = f"--num-speculative-tokens {drafts}" if drafts else "Drafts do not pay: serve without them."
    return f"\n{table(chains)}\n\n{advice}"


def seconds_by_length(text: str) -> dict[int, float]:
    """Parse `0:0.03,1:0.04`, as an `argparse` type.

    Raises:
        argparse.ArgumentTypeError: The text is no such list, or lacks the step without drafts.
    """
    try:
        seconds = {int(length): float(value) for length, value in (part.split(":") for part in text.split(","))}
    except ValueError:
        seconds = {}
    if 0 not in seconds or min(seconds) < 0 or not all(0 < value < float("inf") for value in seconds.values()):
        raise argparse.ArgumentTypeError(
            f"{text} does not give seconds by number of drafts, from 0 on: write for instance 0:0.030,1:0.034,2:0.037"
        )
    return seconds


def _milliseconds(seconds: dict[int, float]) -> str:
    return ", ".join(f"{size}: {1e3 * cost:.1f}" for size, cost in seconds.items())
