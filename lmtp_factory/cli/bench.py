"""`lmtp-cli bench`: stock decoding, ours without heads, prompt lookup and the heads, side by side."""

import argparse
import json
from pathlib import Path

from .arguments import count


RESULT_FILE, PLOT_FILE = "bench.json", "bench.png"
# Where no tree was measured: falls with the level and with the rank.
_ASSUMED = [[0.3 * 0.6**level * 0.4**rank for rank in range(8)] for level in range(16)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, prompts to answer, and how much of both."""
    parser.add_argument("model", metavar="MODEL", help="export, adapter or stage-1 directory with heads")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSON or JSONL, as lmtp-cli distill reads")
    parser.add_argument("--limit", type=count, default=16, metavar="N", help="use the first N prompts (default: 16)")
    parser.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="an answer (default: 128)")
    parser.add_argument("--nodes", type=count, default=16, metavar="N", help="static and dynamic trees (default: 16)")
    parser.add_argument("--repeats", type=count, default=1, metavar="N", help="times each answer, the best one counts")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: fp32 on a CPU, else as saved"
    )
    parser.add_argument("--output-dir", metavar="DIR", help="also write bench.json and bench.png there")


def run(args: argparse.Namespace) -> int:
    """Decode in turns, print the table, write the files; 1 where fp32 answers differ from stock's."""
    import torch

    from ..evaluation.bench import default_arms, margins, results, run_arms, table
    from ..evaluation.machine import describe
    from ..evaluation.plots import draw_bench
    from ..evaluation.report import load_for_scoring
    from ..evaluation.self_generated import read_prompts
    from ..files import atomic_write
    from ..modeling.model import base_of

    _, prompts = read_prompts(args.model, args.prompts, args.limit)
    model = base_of(load_for_scoring(args.model, dtype=args.dtype and getattr(torch, args.dtype)))
    accuracies = _measured_accuracies(model) or _ASSUMED[: model.leap_heads.config.offsets[-1] - 1]
    arms = default_arms(model, accuracies, args.nodes)
    run_arms(model, arms, prompts, args.max_new_tokens, args.repeats)
    rows, parted = results(arms, prompts), margins(model, arms)

    facts = {
        "machine": describe(model.device),
        "model": args.model,
        "offsets": model.leap_heads.config.offsets,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompts": Path(args.prompts).name,
        "answers": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "tree": f"{model.tree_config().kind}, {model.tree_config().nodes} nodes ({model.tree_config().source})",
    }
    print("\n" + "\n".join(f"{name}: {value}" for name, value in facts.items()) + f"\n\n{table(rows)}")
    print(_equality(rows, parted, len(prompts)))
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / RESULT_FILE) as file:
            json.dump(facts | {"arms": [vars(row) for row in rows], "margins": parted}, file, indent=1)
        draw_bench(rows, folder / PLOT_FILE)
        print(f"Written: {folder / RESULT_FILE} and {folder / PLOT_FILE}")
    # Prompt lookup is transformers' own: not for us to answer for.
    ours_differ = any(row.differing and row.verify_share is not None for row in rows)
    return 1 if ours_differ and model.dtype == torch.float32 else 0


def _measured_accuracies(model) -> list[list[float]] | None:
    from ..files import TREE_FILE

    path = model.leap_heads.folder and model.leap_heads.folder / TREE_FILE
    if not path or not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("measured", {}).get("accuracies")


def _equality(rows, parted: dict[str, list[float]], answers: int) -> str:
    lines = [f"Of {answers} answers, those that are not stock's:"]
    for row in rows:
        if row.differing:
            gaps = ", ".join(f"{gap:.4f}" for gap in parted.get(row.name, []))
            why = f"where they part the two logits are {gaps} apart" if gaps else "they end elsewhere"
            lines.append(f"  {row.name}: {row.differing}; {why}")
    return "\n".join(lines) if len(lines) > 1 else f"All {answers} answers are the same in every row."
