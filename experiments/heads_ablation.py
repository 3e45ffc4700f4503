"""Ablation of the heads: what they read, their block, their unembedding and their vocabulary, at equal steps.

Each arm trains stage 1 from the same cached hidden states. Trees are then replayed on the model's own answers to prompts
that nobody trained on, by kind of text. `x plain` is the expected speed of the best tree of at most 16 nodes with this
device's costs, over plain steps. Finished arms are kept: the same command continues.

    python experiments/heads_ablation.py demo_run/model --rows data/self_distilled_smollm2_train.jsonl \
        --test general=data/general_prompts.jsonl --steps 400 --output-dir ablation
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from lmtp_factory.decoding.tree import chain_paths
from lmtp_factory.decoding.tree_config import DEFAULT_WIDTH
from lmtp_factory.distill.rows import PROMPT_COLUMN, RESPONSE_COLUMN, dataset_entry, format_ids
from lmtp_factory.evaluation.machine import describe
from lmtp_factory.evaluation.report import load_for_scoring
from lmtp_factory.evaluation.scoring import read_rows
from lmtp_factory.evaluation.self_generated import read_prompts, self_generated_rows
from lmtp_factory.modeling.model import base_of
from lmtp_factory.tuning.costs import measure_costs
from lmtp_factory.tuning.replay import observe, tau_of_dynamic, tau_of_paths
from lmtp_factory.tuning.tree_search import rank_trees


MOST_NODES = 16
AXES = {
    "head_inputs": ("state", "state_token"),
    "head_block": ("linear", "mlp"),
    "head_kind": ("shared", "own"),
    "draft_vocab_size": (None, 8192),
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


def train(args: argparse.Namespace, name: str, keys: dict) -> float:
    """Train an arm unless its output is complete. Returns its seconds."""
    output = args.output_dir / name
    done, made_with = output / "all_results.json", args.output_dir / f"{name}.json"
    facts = {"rows": str(args.rows), "steps": args.steps, "seed": args.seed, "model": args.model, **keys}
    if made_with.is_file() and json.loads(made_with.read_text(encoding="utf-8")) != facts:
        raise SystemExit(f"{output} was trained with other settings ({made_with}): name another --output-dir.")
    if not done.is_file():
        data = args.output_dir / "data"
        data.mkdir(parents=True, exist_ok=True)
        entry = {"rows": dataset_entry(str(args.rows.resolve()))}
        (data / "dataset_info.json").write_text(json.dumps(entry), encoding="utf-8")
        written = {
            "model_name_or_path": args.model, "dataset": "rows", "dataset_dir": data, "output_dir": output,
            "hidden_cache_dir": args.output_dir / "hidden", "max_steps": args.steps, "seed": args.seed, **keys,
        }  # fmt: skip
        command = [Path(sys.executable).with_name("llamafactory-cli"), "train", Path(__file__).with_suffix(".yaml")]
        made_with.write_text(json.dumps(facts), encoding="utf-8")
        subprocess.run([*map(str, command), *(f"{key}={value}" for key, value in written.items())], check=True)
    return json.loads(done.read_text(encoding="utf-8"))["train_runtime"]


def answers_to(args: argparse.Namespace, model, label: str, prompts_file: str) -> list:
    """Return the model's greedy answers to the prompts of a file, written once."""
    path = args.output_dir / f"answers_{label}_{args.limit}x{args.max_new_tokens}.jsonl"
    if not path.is_file():
        _, prompts = read_prompts(args.model, prompts_file, args.limit)
        lines = [
            json.dumps({PROMPT_COLUMN: format_ids(prompt), RESPONSE_COLUMN: format_ids(answer)})
            for prompt, answer in self_generated_rows(model, prompts, args.max_new_tokens)
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_rows(path)


def measure(args: argparse.Namespace, name: str, seconds: float) -> dict:
    """Replay an arm's heads on every kind of text."""
    model = base_of(load_for_scoring(str(args.output_dir / name)))
    costs, kinds = measure_costs(model), {}
    for label, file in args.test:
        observed = [observe(model, row, DEFAULT_WIDTH) for row in answers_to(args, model, label, file)]
        observed = [answer for answer in observed if len(answer)]
        options = [option for option in rank_trees(observed, costs) if option.nodes <= MOST_NODES]
        best = max(options, key=lambda option: option.tokens_per_second)
        kinds[label] = {
            "chain": tau_of_paths(observed, chain_paths(model.leap_heads.config.offsets[-1])),
            "dynamic 16": tau_of_dynamic(observed, [MOST_NODES])[MOST_NODES],
            "x plain": best.tokens_per_second * costs.verify.at(1),
            "tree": f"{best.kind} {best.nodes}",
        }
    parameters = sum(parameter.numel() for parameter in model.leap_heads.parameters())
    draft = costs.draft / costs.verify.at(1)
    return {"train_seconds": seconds, "parameters": parameters, "draft_in_plain_steps": draft, "text": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="base model")
    parser.add_argument("--rows", type=Path, required=True, help="training rows of lmtp-cli distill")
    parser.add_argument(
        "--test", action="append", required=True, metavar="LABEL=FILE", type=lambda text: text.split("=", 1),
        help="prompts that nobody trained on; may be given several times",
    )  # fmt: skip
    parser.add_argument("--arms", nargs="*", metavar="NAME", help="e.g. state_token-mlp-shared-8192 (default: all 16)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--limit", type=int, default=32, help="prompts of each kind of text (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())

    results, started = {}, time.time()
    for name, keys in arms_of(args.arms).items():
        results[name] = measure(args, name, train(args, name, keys))
        report = {
            "machine": describe(torch.device("cpu")),
            "steps": args.steps,
            "seed": args.seed,
            "arms": results,
        }
        (args.output_dir / "ablation.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        print(f"{name} done after {time.time() - started:.0f} s", flush=True)
    print(f"\n{'arm':<36} {'train s':>8} {'draft':>6}  text: chain, dynamic {MOST_NODES}, x plain (tree)")
    for name, result in results.items():
        cells = "; ".join(
            f"{label}: {one['chain']:.2f}, {one[f'dynamic {MOST_NODES}']:.2f}, {one['x plain']:.2f} ({one['tree']})"
            for label, one in result["text"].items()
        )
        print(f"{name:<36} {result['train_seconds']:>8.0f} {result['draft_in_plain_steps']:>6.2f}  {cells}")


if __name__ == "__main__":
    main()
