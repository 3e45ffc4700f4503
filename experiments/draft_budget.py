"""Simulation of the draft budget: tokens per duration of a plain step.

Baseline: 1.0, plain steps only. The column `always` drafts in every step. Rows are kinds of text (acceptance rate at
    each
level) combined with the extra duration of a step with a draft. Other columns are values of the constants in
lmtp_factory/decoding/draft_budget.py. Step durations have 5 % noise.

    python experiments/draft_budget.py
"""

import argparse
import random
from collections.abc import Sequence

from lmtp_factory.decoding.draft_budget import ALLOWANCE, MOST, STAKE, DraftBudget


TEXTS = {
    "nothing accepted": (0.02,),
    "hardly any": (0.15, 0.1),
    "general, weak heads": (0.25, 0.15),
    "better": (0.35, 0.25),
    "own topics": (0.55, 0.3, 0.2),
    "good heads": (0.7, 0.5, 0.4, 0.3),
}
EXTRAS = (0.25, 0.4)
SETTINGS = (
    (STAKE, ALLOWANCE, MOST),
    (0.5, 0.01, 3.0),
    (1.0, 0.01, 3.0),
    (2.0, 0.01, 3.0),
    (0.75, 0.005, 3.0),
    (1.0, 0.005, 1.5),
    (1.0, 0.005, 6.0),
)


def rate(accuracies: Sequence[float], extra: float, tokens: int, seed: int, setting: Sequence[float]) -> float:
    """Simulate one answer and return its tokens per duration of a plain step."""
    generator, budget = random.Random(seed), DraftBudget(*setting)
    seconds, done = 0.0, 0
    while done < tokens:
        step = max(0.2, generator.gauss(1, 0.05))
        if budget.allows_draft():
            accepted = 0
            while accepted < len(accuracies) and generator.random() < accuracies[accepted]:
                accepted += 1
            step *= 1 + extra
            budget.record_draft(step, 8, accepted)
            done += 1 + accepted
        else:
            budget.record_plain(step)
            done += 1
        seconds += step
    return done / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100, help="length of an answer (default: 100)")
    parser.add_argument("--answers", type=int, default=400, help="simulated answers per number (default: 400)")
    args = parser.parse_args()
    settings = " ".join(f"{'/'.join(f'{value:g}' for value in setting):>12}" for setting in SETTINGS)
    print(f"{'':<20} {'extra':>5} {'always':>7} {settings}   stake/allowance/most, in use first")
    for name, accuracies in TEXTS.items():
        for extra in EXTRAS:
            tau, reached = 1.0, 1.0
            for accuracy in accuracies:
                reached *= accuracy
                tau += reached
            means = [
                sum(rate(accuracies, extra, args.tokens, seed, setting) for seed in range(args.answers)) / args.answers
                for setting in SETTINGS
            ]
            print(f"{name:<20} {extra:>5} {tau / (1 + extra):>7.3f} {' '.join(f'{mean:>12.3f}' for mean in means)}")


if __name__ == "__main__":
    main()
