"""Effect of calibrating the heads' probabilities on dynamic trees that are cut in each step.

The trees are replayed on self-generated text. Baseline: uncalibrated probabilities. Numbers are tokens per duration of
a plain step, by the default cost curves of lmtp_factory/decoding/tree_choice.py and without the draft budget.

    python experiments/calibration.py demo_run/export_heads --rows data/self_distilled_smollm2_heldout.jsonl
"""

import argparse
from collections.abc import Sequence

from lmtp_factory.decoding.tree_choice import PLAIN_CPU, PREPACKED_CPU
from lmtp_factory.decoding.tree_config import DEFAULT_WIDTH, AcceptanceCalibration, TreeConfig
from lmtp_factory.evaluation.report import load_for_scoring
from lmtp_factory.evaluation.scoring import read_rows
from lmtp_factory.modeling.model import base_of
from lmtp_factory.tuning.replay import Observed, observe, rate_of_cut_trees


class Uncalibrated(AcceptanceCalibration):
    """Uses the heads' probabilities unchanged."""

    @property
    def ratio(self) -> float:
        return 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="export, adapter or stage-1 directory with heads")
    parser.add_argument("--rows", required=True, help="rows of lmtp-cli distill")
    parser.add_argument("--limit", type=int, default=40, help="number of rows (default: 40)")
    parser.add_argument(
        "--draft-cost", type=float, default=0.08, help="duration of a draft, in plain steps (default: 0.08)"
    )
    args = parser.parse_args()
    model = base_of(load_for_scoring(args.model))
    observed: Sequence[Observed] = [observe(model, row, DEFAULT_WIDTH) for row in read_rows(args.rows, args.limit)]
    print(f"{'cost curve':<12} {'nodes':>5}   tokens per plain step's cost (tau)")
    for name, curve in (("prepacked", PREPACKED_CPU), ("ordinary", PLAIN_CPU)):
        for nodes in (8, 16):
            config = TreeConfig("dynamic", nodes, cost=curve)
            cells = []
            for label, calibration in (("calibrated", AcceptanceCalibration), ("uncalibrated", Uncalibrated)):
                tau, rate = rate_of_cut_trees(observed, config, args.draft_cost, calibration)
                cells.append(f"{label} {rate:.3f} ({tau:.2f})")
            print(f"{name:<12} {nodes:>5}   {'   '.join(cells)}")


if __name__ == "__main__":
    main()
