"""Tau against the number of training tokens: how much text do heads need?

Each run trains the same heads on N tokens of the rows, for --passes passes and at least --least-steps steps. Trees are then
replayed as in heads_ablation.py. Finished runs are kept: the same command continues.

    python experiments/training_tokens.py demo_run/model --rows data/self_distilled_smollm2_train.jsonl \\
        --test general=data/general_prompts.jsonl --tokens 10000 30000 100000 300000 --output-dir tokens
"""

import argparse
import math
from pathlib import Path

from heads_runs import HEADS, MOST_NODES, add_options, in_words, measure, report, train
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmtp_factory.evaluation.scoring import read_rows


BATCH = 4  # rows, as in heads_stage1.yaml


def first_rows(files: list[Path], tokens: int, path: Path) -> tuple[int, int]:
    """Write rows of the files, mixed, until their answers have `tokens` tokens.

    Returns:
        Numbers of rows and of tokens.
    """
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    sizes = [len(output) for file in files for _, output in read_rows(file)]
    order = sorted(range(len(lines)), key=lambda index: (index * 2654435761) % 2**32)  # mixed, and the same every time
    chosen, total = [], 0
    for index in order:
        if total >= tokens:
            break
        chosen.append(lines[index])
        total += sizes[index]
    if total < tokens:
        raise SystemExit(f"The rows have {total} tokens: write --tokens {total} or less.")
    path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return len(chosen), total


def draw(curve: list[dict], path: Path) -> None:
    """Draw tau by number of tokens, one colour a kind of text; the chain is dashed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    tokens = [point["tokens"] for point in curve]
    for number, label in enumerate(curve[0]["text"]):
        for kind, style in (("dynamic", "-"), ("chain", "--")):
            taus = [point["text"][label][kind] for point in curve]
            name = f"{label}, {f'dynamic tree of {MOST_NODES}' if kind == 'dynamic' else kind}"
            panel.plot(tokens, taus, style, color=f"C{number}", marker="o", label=name)
    panel.set(xscale="log", xlabel="training tokens", ylabel="tokens per forward (tau)")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--tokens", type=int, nargs="+", required=True, help="numbers of training tokens")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--least-steps", type=int, default=200)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    curve = []
    for wanted in sorted(args.tokens):
        rows = args.output_dir / f"first_{wanted}.jsonl"
        count, tokens = first_rows(args.rows, wanted, rows)
        steps = max(args.least_steps, args.passes * math.ceil(count / BATCH))
        seconds = train(args, f"tokens-{wanted}", [rows], {"max_steps": steps, **HEADS})
        curve.append({"tokens": tokens, "rows": count, "steps": steps, "train seconds": seconds})
        curve[-1] |= measure(args, f"tokens-{wanted}")
        report(args, {"heads": HEADS, "curve": curve}, args.output_dir / "training_tokens.json")
        draw(curve, args.output_dir / "training_tokens.png")
    print(f"\n{'tokens':>9} {'steps':>6} {'train s':>8}  text: chain, dynamic {MOST_NODES}, x plain (tree)")
    for point in curve:
        print(f"{point['tokens']:>9} {point['steps']:>6} {point['train seconds']:>8.0f}  {in_words(point['text'])}")


if __name__ == "__main__":
    main()
