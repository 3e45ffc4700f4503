"""Overhead of a look-back step over a plain forward.

Baseline: the model's forward, including logits, of equally many tokens, with the same cache, weights and context length.
The phases of a step are timed inside `generate`. Rounds of both are interleaved. `operators` counts the operators of torch,
views aside, that a step calls outside the backbone: on a GPU most are a kernel each, launched by the host.

With --compiled the baseline is a step whose backbone alone is compiled, the host walking down the tree, as a stopping
criterion of the caller makes it; against it a whole compiled step.

    python benchmarks/decode_step.py demo_run/export_heads
    python benchmarks/decode_step.py demo_run/export_heads --compiled --nodes 8
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache

from lmtp_factory.decoding.cache import TreeCache
from lmtp_factory.decoding.cpu_prepacked import can_prepack, prepacked
from lmtp_factory.decoding.stats import PHASES, DecodeStats
from lmtp_factory.decoding.tree_config import TreeConfig
from lmtp_factory.evaluation.machine import describe
from lmtp_factory.evaluation.report import load_for_scoring
from lmtp_factory.evaluation.self_generated import generate_greedy
from lmtp_factory.modeling.model import base_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="export, adapter or stage-1 directory with heads")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 16], help="sizes of the dynamic tree")
    parser.add_argument("--prompt", type=int, default=200, help="length of the prompt")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens generated per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="compare compiled steps instead")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()

    model, rows = base_of(load_for_scoring(args.model)), []
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.get_text_config().vocab_size, (args.prompt,), generator=generator).tolist()
    print(describe(model.device))
    if args.compiled:
        print(f"{'nodes':>5} {'backbone compiled':>18} {'step compiled':>14} {'ratio':>6}")
        for nodes in args.nodes:
            row = compiled_steps(model, prompt, nodes, args.new_tokens, args.rounds)
            print(
                f"{nodes:>5} {row['backbone_ms']:>15.1f} ms {row['step_ms']:>11.1f} ms {row['ratio']:>6.2f}", flush=True
            )
            rows.append({"nodes": nodes, **row})
        return write(args.json, model, rows)
    print(
        f"{'nodes':>5} {'forward':>9} {'step':>9} {'ratio':>6} {'operators':>9}   "
        f"phases in ms: {' '.join(f'{p:>7}' for p in PHASES)}"
    )
    for nodes in args.nodes:
        rounds = [one_round(model, prompt, nodes, args.new_tokens) for _ in range(args.rounds + 1)][1:]
        forward = statistics.median(seconds for seconds, _ in rounds)
        phases = {phase: statistics.median(times[phase] for _, times in rounds) for phase in PHASES}
        step = statistics.median(sum(times.values()) for _, times in rounds)
        ratio = statistics.median(sum(times.values()) / seconds for seconds, times in rounds)
        count = operators_a_step(model, prompt, nodes, args.new_tokens)
        row = {"nodes": nodes, "forward_ms": 1e3 * forward, "step_ms": 1e3 * step, "ratio": ratio, "operators": count}
        rows.append(row)
        parts = " ".join(f"{1e3 * phases[phase]:>7.2f}" for phase in PHASES)
        print(
            f"{nodes:>5} {1e3 * forward:>6.1f} ms {1e3 * step:>6.1f} ms {ratio:>6.2f} {count:>9.1f}   {'':<13} {parts}"
        )
    write(args.json, model, rows)


def write(path: str | None, model, rows: list[dict]) -> None:
    """Write the rows and the machine that they were measured on, if a path is given."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"machine": describe(model.device), "rows": rows}, file, indent=1)


def one_round(model, prompt: list[int], nodes: int, new_tokens: int) -> tuple[float, dict[str, float]]:
    """Return the seconds of a plain forward and of each phase of a step."""
    stats = DecodeStats(profile=True)
    decode(model, prompt, nodes, new_tokens, stats)
    steps = max(stats.steps, 1)
    times = {phase: stats.seconds[phase] / steps for phase in PHASES}
    return bare_forward(model, prompt, nodes, len(prompt) + new_tokens // 2, steps), times


def compiled_steps(model, prompt: list[int], nodes: int, new_tokens: int, rounds: int) -> dict[str, float]:
    """Return the milliseconds of a step whose backbone alone is compiled, of a compiled step, and the ratio."""
    options = CompileConfig(mode=None if model.device.type == "cpu" else "reduce-overhead")
    options._compile_all_devices = True  # also on a CPU
    compiled = {"cache_implementation": "static", "compile_config": options}
    # A criterion that is not of transformers makes the host walk.
    ways = {"backbone": {"stopping_criteria": [lambda ids, scores, **_: torch.zeros(len(ids), dtype=torch.bool)]}}
    seconds: dict[str, list[float]] = {"backbone": [], "step": []}
    for _ in range(rounds + 2):  # two of them compile
        for way, times in seconds.items():
            stats = DecodeStats(profile=True)
            decode(model, prompt, nodes, new_tokens, stats, **compiled, **ways.get(way, {}))
            times.append(sum(stats.seconds[phase] for phase in PHASES) / max(stats.steps, 1))
    backbone, step = (seconds[way][2:] for way in ("backbone", "step"))
    ratio = statistics.median(whole / alone for whole, alone in zip(step, backbone))
    return {"backbone_ms": 1e3 * statistics.median(backbone), "step_ms": 1e3 * statistics.median(step), "ratio": ratio}


def decode(model, prompt: list[int], nodes: int, new_tokens: int, stats: DecodeStats, **options) -> None:
    """Generate with a dynamic tree. Without an end-of-sequence token all rounds have equal length."""
    tree_config = TreeConfig("dynamic", nodes, always=True) if nodes > 1 else TreeConfig("chain", 1)
    generate_greedy(model, prompt, new_tokens, lmtp_tree=tree_config, lmtp_stats=stats, eos_token_id=None, **options)


class OperatorCount(TorchDispatchMode):
    """Counts the operators of torch that are no views, except inside the backbone's forward."""

    def __init__(self, model):
        super().__init__()
        self.count, self.inside, self.hooks = 0, False, ()
        self.backbone = model.base_model

    def __enter__(self):
        self.hooks = (
            self.backbone.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            self.backbone.register_forward_hook(lambda *_: setattr(self, "inside", False)),
        )
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not self.inside and not function.is_view
        return function(*args, **(kwargs or {}))


def operators_a_step(model, prompt: list[int], nodes: int, new_tokens: int) -> float:
    """Return the mean number of operators a step: those of a generation, less those of its first token."""
    counts, stats = [], DecodeStats()
    decode(model, prompt, nodes, 1, stats)  # what is done once a model
    for length in (1, new_tokens):
        with OperatorCount(model) as counted:
            decode(model, prompt, nodes, length, stats)
        counts.append(counted.count)
    return (counts[1] - counts[0]) / max(stats.steps, 1)


@torch.no_grad()
def bare_forward(model, prompt: list[int], nodes: int, context: int, repeats: int) -> float:
    """Return the seconds of a forward of `nodes` tokens after `context` cached tokens."""
    config = model.config.get_text_config()
    ids = torch.tensor([(prompt * 2)[:context]], device=model.device)
    cache = TreeCache.replacing(DynamicCache(config=config), config, columns=0)
    with prepacked(model) if can_prepack(model) else nullcontext():
        model(ids, past_key_values=cache, logits_to_keep=1)
        started = time.perf_counter()
        for _ in range(repeats):
            model(ids[:, :nodes], past_key_values=cache)
            for layer in cache.layers:
                layer.set_cursor(context, context)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / repeats


if __name__ == "__main__":
    main()
