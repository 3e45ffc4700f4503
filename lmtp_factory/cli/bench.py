"""`lmtp-cli bench`: compare stock decoding, our loop without heads, prompt lookup and decoding with heads."""

import argparse
import json
from pathlib import Path

from ..files import HEADS_FOLDER
from .arguments import count, heads_of
from .output import check_output_dir, writing


RESULT_FILE, PLOT_FILE = "bench.json", "bench.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", metavar="MODEL", help="export, adapter or stage-1 directory with heads")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSON or JSONL, as lmtp-cli distill reads")
    parser.add_argument("--limit", type=count, default=16, metavar="N", help="use the first N prompts (default: 16)")
    parser.add_argument(
        "--max-new-tokens", type=count, default=128, metavar="N", help="length of an answer (default: 128)"
    )
    parser.add_argument("--nodes", type=count, default=16, metavar="N", help="nodes of a tree (default: 16)")
    parser.add_argument("--repeats", type=count, default=1, metavar="N", help="runs of each answer; the fastest counts")
    parser.add_argument(
        "--default-only",
        action="store_true",
        help="run the default tree, stock generate and our loop without heads alone: a third of the time",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: fp32 on a CPU, else as saved"
    )
    parser.add_argument("--output-dir", metavar="DIR", help="also write bench.json and bench.png there")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark, print the table and write the files; return 1 if fp32 answers differ from stock decoding.

    Raises:
        LMTPError: The model has no heads, its tree.json is damaged, or the output cannot be written.
    """
    import torch

    from .. import geometry
    from ..decoding.tree import assumed_accuracies
    from ..decoding.tree_choice import read_accuracies, read_tree
    from ..evaluation.bench import DEFAULT_TREE, OWN_LOOP, STOCK, default_arms, margins, results, run_arms, table
    from ..evaluation.machine import describe
    from ..evaluation.plots import draw_bench
    from ..evaluation.report import load_for_scoring
    from ..evaluation.self_generated import read_prompts
    from ..files import atomic_write
    from ..modeling.model import base_of

    # A model without heads could be loaded too, with untrained ones, whose table would look like one of trained heads.
    folder = heads_of(args.model)
    read_tree(folder)  # raises if it is damaged
    measured = read_accuracies(folder)
    if args.output_dir:
        check_output_dir(args.output_dir)
    _, prompts = read_prompts(args.model, args.prompts, args.limit)
    model = base_of(load_for_scoring(args.model, dtype=args.dtype and getattr(torch, args.dtype)))
    accuracies = measured or assumed_accuracies(geometry.reach(model.leap_heads.config.offsets) - 1)
    arms = default_arms(model, accuracies, args.nodes)
    if args.default_only:
        arms = {name: arms[name] for name in (STOCK, OWN_LOOP, DEFAULT_TREE)}
    run_arms(model, arms, prompts, args.max_new_tokens, args.repeats)
    rows, parted = results(arms, prompts), margins(model, arms)

    tree = model.tree_config()
    facts = {
        "machine": describe(model.device),
        "model": args.model,
        "offsets": model.leap_heads.config.offsets,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompts": Path(args.prompts).name,
        "answers": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "tree": f"{tree.kind}, {tree.nodes} nodes ({tree.source.replace(str(folder), HEADS_FOLDER)})",
    }
    print("\n" + "\n".join(f"{name}: {value}" for name, value in facts.items()) + f"\n\n{table(rows)}")
    print(_equality(rows, parted, len(prompts)))
    if args.output_dir:
        output = Path(args.output_dir)
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            with atomic_write(output / RESULT_FILE) as file:
                json.dump(facts | {"arms": [vars(row) for row in rows], "margins": parted}, file, indent=1)
            draw_bench(rows, output / PLOT_FILE)
        print(f"Written: {output / RESULT_FILE} and {output / PLOT_FILE}")
    # Differences of prompt lookup do not count, because it is transformers' own method.
    ours_differ = any(row.differing and row.is_ours for row in rows)
    return 1 if ours_differ and model.dtype == torch.float32 else 0


def _equality(rows, parted: dict[str, list[float]], answers: int) -> str:
    lines = [f"Answers that differ from stock decoding, of {answers}:"]
    for row in rows:
        if row.differing:
            gaps = ", ".join(f"{gap:.4f}" for gap in parted.get(row.name, []))
            why = f"the logits of the first different tokens differ by {gaps}" if gaps else "their lengths differ"
            lines.append(f"  {row.name}: {row.differing}; {why}")
    return "\n".join(lines) if len(lines) > 1 else f"All {answers} answers are the same in every row."
