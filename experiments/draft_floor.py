"""Worst case of drafting: speed of each kind of tree relative to our loop without heads, by kind of text.

Baseline: our loop without heads, with the same model, prompts, weights and process. Arms are interleaved per prompt. The
goal is a ratio of at least 0.98 for every kind of text and tree, even if the heads were not trained on such text.

    python experiments/draft_floor.py demo_run/export_heads --output experiments/results/draft_floor_cpu.json
"""

import argparse
import json
from pathlib import Path

from lmtp_factory import resources
from lmtp_factory.decoding.tree import assumed_accuracies, best_first_paths
from lmtp_factory.decoding.tree_config import TreeConfig
from lmtp_factory.evaluation.bench import OWN_LOOP, Arm, run_arms
from lmtp_factory.evaluation.machine import describe
from lmtp_factory.evaluation.report import load_for_scoring
from lmtp_factory.evaluation.self_generated import read_prompts
from lmtp_factory.modeling.model import base_of


# Accuracies from which static trees are built.
ASSUMED = assumed_accuracies(5)


def arms_of(model, always: bool) -> dict[str, Arm]:
    """Return our loop without heads, and the heads with each kind of tree."""
    trees = {
        OWN_LOOP: TreeConfig("chain", 1),
        "chain": TreeConfig("chain", 6),
        "static 8": TreeConfig("static", 8, tuple(best_first_paths(ASSUMED, 8))),
        "dynamic 16": TreeConfig("dynamic", 16),
        "default": model.tree_config(),
    }
    arms = {name: Arm({"lmtp_decode": "backward", "lmtp_tree": tree}) for name, tree in trees.items()}
    if always:
        static = TreeConfig("static", 8, trees["static 8"].paths, always=True)
        arms["static 8, always"] = Arm({"lmtp_decode": "backward", "lmtp_tree": static})
        arms["dynamic 16, always"] = Arm(
            {"lmtp_decode": "backward", "lmtp_tree": TreeConfig("dynamic", 16, always=True)}
        )
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="export, adapter or stage-1 directory with heads")
    parser.add_argument("--prompts", default=str(resources.folder("datasets") / "general_prompts.jsonl"))
    parser.add_argument("--limit", type=int, help="number of prompts of each kind (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--always", action="store_true", help="also run arms that draft in every step")
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()

    rows = [json.loads(line) for line in Path(args.prompts).read_text(encoding="utf-8").splitlines()]
    kinds = [row["kind"] for row in rows]
    _, prompts = read_prompts(args.model, args.prompts, None)
    if args.limit:
        kept = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < args.limit]
        kinds, prompts = [kinds[i] for i in kept], [prompts[i] for i in kept]
    model = base_of(load_for_scoring(args.model))
    arms = arms_of(model, args.always)
    run_arms(model, arms, prompts, args.max_new_tokens, args.repeats)

    names = list(dict.fromkeys(kinds))
    columns = [(name, [i for i, kind in enumerate(kinds) if kind == name]) for name in names]
    columns.append(("all", list(range(len(kinds)))))
    tokens = {name: [len(o[0]) - len(ids) for o, ids in zip(arm.outputs, prompts)] for name, arm in arms.items()}
    rates = {
        name: {kind: sum(tokens[name][i] for i in at) / sum(arm.seconds[i] for i in at) for kind, at in columns}
        for name, arm in arms.items()
    }
    table = {name: {kind: rates[name][kind] / rates[OWN_LOOP][kind] for kind, _ in columns} for name in arms}
    print(f"\n{describe(model.device)}\n{len(prompts)} answers of at most {args.max_new_tokens} tokens, x own loop:")
    print(f"{'':<20} {' '.join(f'{kind:>11}' for kind, _ in columns)}     tau")
    lengths = {kind: sum(tokens[OWN_LOOP][i] for i in at) / len(at) for kind, at in columns}
    print(f"{'tokens an answer':<20} {' '.join(f'{lengths[kind]:>11.0f}' for kind, _ in columns)}")
    for name, row in table.items():
        print(f"{name:<20} {' '.join(f'{row[kind]:>11.3f}' for kind, _ in columns)}  {arms[name].stats.tau:>6.2f}")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "machine": describe(model.device),
            "answers": len(prompts),
            "max_new_tokens": args.max_new_tokens,
            "repeats": args.repeats,
        }
        taus = {name: arm.stats.tau for name, arm in arms.items()}
        Path(args.output).write_text(
            json.dumps(facts | {"tokens_an_answer": lengths, "x_own_loop": table, "tau": taus}, indent=1),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
