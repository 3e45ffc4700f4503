"""fp32 matrix products of head training: oneDNN against torch's own (MKL on x86) into a buffer, on this CPU.

    python benchmarks/matmul.py

Shapes are those of SmolLM2-135M. For each layer, the three products of a training step: outputs, gradient of the inputs,
gradient of the weight.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lmtp_factory.evaluation.machine import describe
from lmtp_factory.modeling import onednn


LAYERS = {
    "linear block": (576, 576),
    "mlp block": (4608, 1152),
    "8,192 words": (8192, 576),
    "49,152 words": (49152, 576),
}


def seconds_of(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, rounds: int) -> float:
    product(left, right)
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        product(left, right)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=800, help="tokens of a training step (default: 800)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not onednn.available():
        raise SystemExit("This build of torch has no oneDNN.")
    print(describe(torch.device("cpu")))
    print(f"{'layer':<14}{'product':<20}{'torch, GFLOP/s':>15}{'oneDNN, GFLOP/s':>17}{'ratio':>7}")
    results = {"machine": describe(torch.device("cpu")), "rows": args.rows, "layers": {}}
    for layer, (out, width) in LAYERS.items():
        weight = torch.randn(out, width)
        inputs, gradient = torch.randn(args.rows, width), torch.randn(args.rows, out)
        products = {
            "outputs": (inputs, weight.t()),
            "gradient of inputs": (gradient, weight),
            "gradient of weight": (gradient.t(), inputs),
        }
        results["layers"][layer] = {}
        for name, (left, right) in products.items():
            operations = 2 * args.rows * out * width
            ours = seconds_of(onednn.mm, left, right, args.rounds)
            buffer = torch.empty(left.shape[0], right.shape[1])  # page faults on a new allocation are slow
            theirs = seconds_of(partial(torch.mm, out=buffer), left, right, args.rounds)
            speeds = [round(operations / seconds / 1e9) for seconds in (theirs, ours)]
            results["layers"][layer][name] = {"torch": speeds[0], "oneDNN": speeds[1], "ratio": round(theirs / ours, 2)}
            print(f"{layer:<14}{name:<20}{speeds[0]:>15}{speeds[1]:>17}{theirs / ours:>7.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
