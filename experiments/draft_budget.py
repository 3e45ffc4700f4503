"""Choice of the draft budget's constants: speed by kind of text for several values, replayed on the model's own answers.

Baseline: 1.0, plain steps only. Answers to prompts of several kinds are generated once. What a draft would have
accepted is replayed at each of their positions; durations are this device's, with 5 % noise. The lowest kind of text is
shown beside all text, because the budget has to limit the loss on every kind, short answers included.

    python experiments/draft_budget.py demo_run/export_heads
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from lmtp_factory import resources
from lmtp_factory.decoding.draft_budget import ALLOWANCE, MOST, PROBE_NODES, STAKE, DraftBudget
from lmtp_factory.decoding.tree import assumed_accuracies, best_first_paths, chain_paths
from lmtp_factory.decoding.tree_config import DEFAULT_WIDTH
from lmtp_factory.evaluation.report import load_for_scoring
from lmtp_factory.evaluation.self_generated import read_prompts, self_generated_rows
from lmtp_factory.modeling.model import base_of
from lmtp_factory.tuning.costs import StepCosts, measure_costs
from lmtp_factory.tuning.replay import accepted_levels, accepted_of_paths, observe


# (initial balance, allowance, largest balance), in plain steps. The constants in use are the first, with a tree whose
# measured gain is at least the stake.
SETTINGS = (
    (STAKE, ALLOWANCE, MOST),
    (0.0, 0.01, 3.0),
    (0.3, 0.02, 3.0),
    (0.3, 0.01, 1.0),
    (0.5, 0.01, 3.0),
    (1.0, 0.01, 3.0),
)


# Number of nodes of a tree -> for each answer and each of its positions, the number of drafted tokens that a step from
# there would accept. The sizes are those of a probe and of a whole tree.
Tree = dict[int, Sequence[Sequence[int]]]


def cost_of(tree: Tree, answer: int, costs: StepCosts, setting: Sequence[float] | None, seed: int) -> float:
    """Simulate one answer.

    Args:
        tree: The tree.
        answer: Index of the answer.
        costs: Durations on this device.
        setting: Initial balance, allowance and largest balance; None drafts whole trees in every step.
        seed: Seed of the noise.

    Returns:
        Duration of the answer, in plain steps.
    """
    noise, budget = random.Random(seed), DraftBudget(0.0, *(setting or SETTINGS[0])[1:])
    budget.balance = setting[0] if setting else 0.0
    total, position, whole = 0.0, 0, max(tree)
    while position < len(tree[whole][answer]):
        step = max(0.2, noise.gauss(1, 0.05))
        nodes = whole if setting is None else budget.affordable(whole)
        if nodes > 1:
            accepted = tree[nodes][answer][position]
            step *= (costs.verify.at(nodes) + costs.draft) / costs.verify.at(1)
            if setting is not None:
                budget.record_draft(step, nodes, accepted)
            position += 1 + accepted
        else:
            budget.record_plain(step)
            position += 1
        total += step
    return total


def print_table(kinds: Sequence[str], trees: dict[str, Tree], costs: StepCosts, repeats: int) -> None:
    """Print, for each tree and setting, the ratio on all text and on the kind with the lowest ratio."""
    print(f"{'':<12} {'always':>24} " + " ".join(f"{'/'.join(f'{v:g}' for v in s):>24}" for s in SETTINGS))
    for name, tree in trees.items():
        lengths, cells = [len(accepted) for accepted in tree[max(tree)]], []
        for setting in (None, *SETTINGS):
            durations = [
                sum(cost_of(tree, answer, costs, setting, seed) for seed in range(repeats)) / repeats
                for answer in range(len(kinds))
            ]
            rates = {
                kind: sum(lengths[i] for i, k in enumerate(kinds) if kind in (k, "all"))
                / sum(durations[i] for i, k in enumerate(kinds) if kind in (k, "all"))
                for kind in (*dict.fromkeys(kinds), "all")
            }
            every = rates.pop("all")
            lowest = min(rates, key=rates.__getitem__)
            cells.append(f"{f'{every:.3f}  {lowest} {rates[lowest]:.3f}':>24}")
        print(f"{name:<12} {' '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="export, adapter or stage-1 directory with heads")
    parser.add_argument("--prompts", default=str(resources.folder("datasets") / "general_prompts.jsonl"))
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=20, help="simulations of each answer (default: 20)")
    args = parser.parse_args()
    kinds = [json.loads(line)["kind"] for line in Path(args.prompts).read_text(encoding="utf-8").splitlines()]
    _, prompts = read_prompts(args.model, args.prompts, None)
    model = base_of(load_for_scoring(args.model))
    costs = measure_costs(model)
    answers = [observe(model, row, DEFAULT_WIDTH) for row in self_generated_rows(model, prompts, args.max_new_tokens)]

    def by_paths(paths) -> Tree:
        return {n: [accepted_of_paths(answer, paths[:n]) for answer in answers] for n in (PROBE_NODES, len(paths))}

    def dynamic(nodes: int) -> Tree:
        levels = [accepted_levels(answer, nodes)[0] for answer in answers]  # (steps, nodes) each
        return {n: [accepted[:, n - 1].tolist() for accepted in levels] for n in (PROBE_NODES, nodes)}

    trees = {"chain 6": by_paths(chain_paths(6)), "static 8": by_paths(best_first_paths(assumed_accuracies(5), 8))}
    trees |= {f"dynamic {nodes}": dynamic(nodes) for nodes in (8, 16)}
    print("initial balance/allowance/largest balance, in use first: x plain steps on all text, and on the lowest kind")
    print_table(kinds, trees, costs, args.repeats)


if __name__ == "__main__":
    main()
