"""Ablation of the heads: what they read, their block, their unembedding and their vocabulary, at equal steps.

Each arm trains stage 1 from the same cached hidden states. Trees are then replayed on the model's own answers to prompts
that nobody trained on, by kind of text. `x plain` is the expected speed of the best tree of at most 16 nodes with this
device's costs, over plain steps. Finished arms are kept: the same command continues.

    python experiments/heads_ablation.py demo_run/model --rows data/self_distilled_smollm2_train.jsonl \\
        --test general=data/general_prompts.jsonl --steps 400 --output-dir ablation
"""

import argparse
import itertools
import time

from heads_runs import MOST_NODES, add_options, in_words, measure, report, train


AXES = {
    "head_inputs": ("state", "state_token"),
    "head_block": ("linear", "mlp"),
    "head_kind": ("shared", "own"),
    "draft_vocab_size": (8192, None),
}


def arms_of(chosen: list[str] | None) -> dict[str, dict]:
    """Return the keys of every combination by name, or of those that are chosen."""
    arms = {}
    for values in itertools.product(*AXES.values()):
        keys = dict(zip(AXES, values))
        name = "-".join("all" if value is None else str(value) for value in values)
        arms[name] = {key: value for key, value in keys.items() if value is not None}
    if unknown := set(chosen or ()) - arms.keys():
        raise SystemExit(f"No arm {', '.join(sorted(unknown))}: choose from {', '.join(arms)}.")
    return {name: keys for name, keys in arms.items() if not chosen or name in chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--arms", nargs="*", metavar="NAME", help="e.g. state_token-mlp-shared-8192 (default: all 16)")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()

    results, started = {}, time.time()
    for name, keys in arms_of(args.arms).items():
        seconds = train(args, name, args.rows, {"max_steps": args.steps, **keys})
        results[name] = {"train seconds": seconds, **measure(args, name)}
        report(args, {"steps": args.steps, "arms": results}, args.output_dir / "ablation.json")
        print(f"{name} done after {time.time() - started:.0f} s", flush=True)
    print(f"\n{'arm':<36} {'train s':>8} {'draft':>6}  text: chain, dynamic {MOST_NODES}, x plain (tree)")
    for name, result in results.items():
        print(f"{name:<36} {result['train seconds']:>8.0f} {result['draft']:>6.2f}  {in_words(result['text'])}")


if __name__ == "__main__":
    main()
