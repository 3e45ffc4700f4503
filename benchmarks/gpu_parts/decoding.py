"""Decoding with the trained heads: stock and ours, eager and compiled, by kind and size of tree and by batch."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from gpu_parts.settings import Settings
from lmtp_factory import geometry
from lmtp_factory.decoding import attach_heads
from lmtp_factory.decoding.stats import PHASES, DecodeStats
from lmtp_factory.decoding.tree import best_first_paths
from lmtp_factory.decoding.tree_config import DEFAULT_WIDTH, TreeConfig
from lmtp_factory.evaluation.bench import OWN_LOOP, STOCK, Arm, always_drafting, margins, results, run_arms
from lmtp_factory.evaluation.self_generated import generate_greedy, generate_greedy_batch
from lmtp_factory.modeling.checkpoint import load_heads
from lmtp_factory.tuning.costs import measure_costs
from lmtp_factory.tuning.replay import accuracies, observe_answers


COMPILED = {"cache_implementation": "static"}  # `generate` compiles the forward with such a cache


def parts(settings: Settings) -> dict[str, Callable[[], dict]]:
    """Return the parts: costs of a step, one sequence by tree, the phases of a step, batches."""
    sizes = (4,) if settings.toy else (8, 16, 32, 64)
    batches = (2,) if settings.toy else (4, 16)
    return (
        {"costs": partial(costs, settings)}
        | {f"trees-{size}": partial(trees, settings, size) for size in sizes}
        | {f"phases-{size}": partial(phases, settings, size) for size in sizes}
        | {f"batch-{count}": partial(batch, settings, count) for count in batches}
    )


def with_heads(settings: Settings) -> nn.Module:
    """Load the model with the heads that the step `heads` kept."""
    folder = settings.folder / "heads"
    if not folder.is_dir():
        raise RuntimeError(f"{folder} has no heads: run the step heads first.")
    model = attach_heads(settings.base(), heads=load_heads(str(folder)), dtype=settings.dtype)
    return model.requires_grad_(False).eval()


def costs(settings: Settings) -> dict:
    """Time forwards by number of tokens, and a draft."""
    measured = measure_costs(with_heads(settings), sizes=(1, 4) if settings.toy else (1, 2, 4, 8, 16, 32, 64, 128))
    return {"verify": measured.verify.seconds, "draft": measured.draft}


def trees(settings: Settings, nodes: int) -> dict:
    """Decode one sequence at a time with every kind of tree, eager and compiled, against stock generate."""
    model = with_heads(settings)
    observed = observe_answers(model, settings.heldout_rows()[:16], DEFAULT_WIDTH)
    paths = tuple(best_first_paths(accuracies(observed), nodes))
    reach = geometry.reach(model.leap_heads.config.offsets)
    shapes = {
        "chain": TreeConfig("chain", min(nodes, reach)),
        "static": TreeConfig("static", len(paths), paths),
        "dynamic": TreeConfig("dynamic", nodes),
    }
    arms = {}
    for suffix, options in (("", {}), (", compiled", COMPILED)):
        arms[STOCK + suffix] = Arm({"lmtp_decode": "off", **options})
        arms[OWN_LOOP + suffix] = Arm({"lmtp_tree": TreeConfig("chain", 1), **options})
        for kind, tree in shapes.items():
            arms[kind + suffix] = Arm({**always_drafting({"lmtp_tree": tree}), **options})
    prompts = [prompt for prompt, _ in settings.heldout_rows()][: 1 if settings.toy else 4]
    run_arms(model, arms, prompts, 8 if settings.toy else 96, repeats=1)
    rows = [asdict(row) for row in results(arms, prompts)]
    for row in rows:
        row["stock_reason"] = arms[row["name"]].stats.stock_reason
    return {"nodes": nodes, "rows": rows, "margins where answers part": margins(model, arms)}


def phases(settings: Settings, nodes: int) -> dict:
    """Time the phases of a step, and count in another run how often it waits for the device."""
    model, found = with_heads(settings), {}
    prompt, new = settings.heldout_rows()[0][0], 8 if settings.toy else 128
    tree = TreeConfig("dynamic", nodes, always=True)
    for name, options in (("eager", {}), ("compiled", COMPILED)):
        generate_greedy(model, prompt, new, lmtp_tree=tree, **options)  # a warm-up
        profiled, counted = DecodeStats(profile=True), DecodeStats()
        generate_greedy(model, prompt, new, lmtp_tree=tree, lmtp_stats=profiled, **options)
        with synchronisations(settings.device) as of_prompt:
            generate_greedy(model, prompt, 1, lmtp_tree=tree, **options)
        with synchronisations(settings.device) as waits:
            generate_greedy(model, prompt, new, lmtp_tree=tree, lmtp_stats=counted, **options)
        waits_of_steps = len(waits) - len(of_prompt)
        found[name] = {
            "ms a step": {phase: 1e3 * profiled.seconds[phase] / max(profiled.steps, 1) for phase in PHASES},
            "synchronisations a step": waits_of_steps / max(counted.steps, 1)
            if settings.device.type == "cuda"
            else None,
        }
    return {"nodes": nodes, **found}


@contextmanager
def synchronisations(device: torch.device) -> Iterator[list]:
    """Collect the warnings of torch about operations that wait for the GPU; stays empty on a CPU.

    Those of the prompt's forward are among them.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        waits: list = []
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            waits += [warning for warning in caught if "called a synchronizing" in str(warning.message)]


@torch.no_grad()
def batch(settings: Settings, count: int) -> dict:
    """Decode a batch with a dynamic tree of each size, against stock generate."""
    model, rows = with_heads(settings), settings.heldout_rows()
    prompts = [rows[number % len(rows)][0] for number in range(count)]
    ways = {STOCK: {"lmtp_decode": "off"}, OWN_LOOP: {"lmtp_tree": TreeConfig("chain", 1)}}
    for nodes in (4,) if settings.toy else (8, 16, 32, 64):
        ways[f"dynamic {nodes}"] = {"lmtp_tree": TreeConfig("dynamic", nodes, always=True)}
    found, new = {}, 8 if settings.toy else 128
    for name, options in ways.items():
        for timed in (False, True):
            stats = DecodeStats()
            started = _now(settings.device)
            # All rows write equally many tokens, so that no way decodes fewer.
            output = generate_greedy_batch(model, prompts, new, eos_token_id=None, lmtp_stats=stats, **options)
            seconds = _now(settings.device) - started
            if timed:
                tokens = count * (output.shape[1] - max(map(len, prompts)))
                found[name] = {"tokens per second": tokens / seconds, "tau": stats.tau}
    for row in found.values():
        row["x stock"] = row["tokens per second"] / found[STOCK]["tokens per second"]
        row["x own loop"] = row["tokens per second"] / found[OWN_LOOP]["tokens per second"]
    return {"batch": count, "rows": found}


def _now(device: torch.device) -> float:
    """Return the time after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
