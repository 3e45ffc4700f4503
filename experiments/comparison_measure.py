"""What comparison.py measures of an arm: accuracy by depth, tau and speed of every tree by replay, decoding, perplexity."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from comparison_training import Comparison, slug
from heads_runs import costs_of
from torch import nn

from lmtp_factory import geometry
from lmtp_factory.decoding.tree import best_first_paths, chain_paths
from lmtp_factory.decoding.tree_config import DEFAULT_WIDTH, KINDS, TreeConfig
from lmtp_factory.evaluation.bench import OWN_LOOP, STOCK, Arm, always_drafting, results, run_arms
from lmtp_factory.evaluation.report import load_for_scoring
from lmtp_factory.evaluation.scoring import Row, read_rows, score_heads
from lmtp_factory.evaluation.self_generated import generate_greedy_batch, read_prompts
from lmtp_factory.modeling.model import base_of
from lmtp_factory.tuning.replay import Observed, accuracies, observe_answers, tau_of_dynamic, tau_of_paths


def measure(run: Comparison, folder: Path, path: Path, frozen: bool) -> dict:
    """Measure what does not depend on the machine's speed, once: the results are kept in `path`.

    Args:
        run: The comparison.
        folder: Heads of stage 1, or the output of a stage 2.
        path: JSON file of the results.
        frozen: Whether the backbone is the base model's, which then answers and predicts as the base model does.
    """
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    run.say(f"measuring {folder.name}")
    model = base_of(load_for_scoring(str(folder)))
    heads, texts = model.leap_heads, {}
    for label in run.settings["test"]:
        kept = run.folder / f"answers-{slug(label)}.json" if frozen else None
        answers = answers_of(model, _prompts(run, label), run.settings["max_new_tokens"], kept)
        texts[label] = replayed(observe_answers(model, answers, DEFAULT_WIDTH), run.settings["nodes"])
    found = {
        "offsets": heads.config.offsets,
        "parameters": sum(parameter.numel() for parameter in heads.parameters()),
        "text": texts,
    }
    if not frozen:
        found["perplexity"] = perplexity(run, model)
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def timed(run: Comparison, folder: Path, path: Path, text: dict, decode_forward: bool) -> dict:
    """Time forwards and drafts of a model with heads, and decode with the best tree; once, kept in `path`.

    Args:
        run: The comparison.
        folder: Heads of stage 1.
        path: JSON file of the results.
        text: What `measure` found on each kind of text.
        decode_forward: Also decode looking forward.
    """
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    run.say(f"timing {folder.name}")
    model = base_of(load_for_scoring(str(folder)))
    costs = costs_of(run.folder, model)
    seconds = {size: costs.verify.at(size) + (costs.draft if size > 1 else 0.0) for size in run.settings["nodes"]}
    found = {
        "seconds": seconds,
        "decoded": {
            label: decoded(run, model, _prompts(run, label), best_tree(text[label], seconds), decode_forward)
            for label in run.settings["decoded"]
        },
    }
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def answers_of(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, kept: Path | None) -> list[Row]:
    """Return a model's greedy answers to prompts, generated in one batch.

    Args:
        model: A model with leap heads.
        prompts: Token ids of the prompts.
        max_new_tokens: Length of the longest answer.
        kept: JSON file of the answers, which is read if it exists; None to keep none.
    """
    if kept is not None and kept.is_file():
        return [(prompt, answer) for prompt, answer in json.loads(kept.read_text(encoding="utf-8"))]
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    written = generate_greedy_batch(model, prompts, max_new_tokens, lmtp_tree=TreeConfig("chain", 1))
    answers = []
    for answer in written[:, max(map(len, prompts)) :].tolist():
        end = next((place for place, token in enumerate(answer) if token in ends), len(answer))
        answers.append(answer[: end + 1])
    rows = list(zip(prompts, answers))
    if kept is not None:
        kept.write_text(json.dumps(rows), encoding="utf-8")
    return rows


def replayed(observed: Sequence[Observed], nodes: Sequence[int]) -> dict:
    """Replay trees on a model's own answers.

    Static trees are built from the first half of the answers; tau is that of the second half.

    Returns:
        Top-1 accuracy by depth, +2 first; tau for each kind of tree and number of nodes.
    """
    half = max(len(observed) // 2, 1)
    first, second = observed[:half], observed[half:] or observed
    rates, levels = accuracies(first), observed[0].ranks.shape[1]
    taus: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    for size in nodes:
        taus["chain"][size] = tau_of_paths(second, chain_paths(min(size, levels + 1)))
        taus["static"][size] = tau_of_paths(second, best_first_paths(rates, size))
    taus["dynamic"] |= tau_of_dynamic(second, nodes)
    return {"top-1": [ranks[0] for ranks in accuracies(observed)], "tau": taus}


def decoded(run: Comparison, model: nn.Module, prompts: list[list[int]], best: tuple[str, int], forward: bool) -> dict:
    """Decode with the tree that replay found fastest, against our own loop without heads in the same run."""
    kind, size = best
    reach = geometry.reach(model.leap_heads.config.offsets)
    tree = TreeConfig("chain", min(size, reach)) if kind == "chain" else TreeConfig("dynamic", size)
    arms = {STOCK: Arm({"lmtp_decode": "off"}), OWN_LOOP: Arm({"lmtp_tree": TreeConfig("chain", 1)})}
    ways = {"backward": "backward", **({"forward": "forward"} if forward else {})}
    for name, strategy in ways.items():
        arms[name] = Arm(always_drafting({"lmtp_decode": strategy, "lmtp_tree": tree}))
    shown = prompts[: run.settings["bench_prompts"]]
    run_arms(model, arms, shown, run.settings["max_new_tokens"], repeats=1)
    rows = {row.name: row for row in results(arms, shown)}
    if model.dtype == torch.float32 and any(row.differing for row in rows.values()):
        raise SystemExit("Decoding with heads gave other answers than stock decoding: this is a bug, please report it.")
    return {
        name: {
            "tree": f"{tree.kind} {tree.nodes}",
            "tau": rows[name].tau,
            "tokens per second": rows[name].tokens_per_second,
            "x own loop": rows[name].over_own_loop,
            "other answers": rows[name].differing,  # in bf16 two logits may be equal, and rounding then decides
        }
        for name in (OWN_LOOP, *ways)
    }


def best_tree(text: dict, seconds: dict[int, float]) -> tuple[str, int]:
    """Return kind and nodes of the tree with the most expected tokens per second, of those with a draft."""
    options = {
        (kind, int(size)): tau / seconds[int(size)]
        for kind in ("chain", "dynamic")
        for size, tau in text["tau"][kind].items()
        if int(size) > 1
    }
    return max(options, key=options.get)


def perplexity(run: Comparison, model: nn.Module) -> float:
    """Return the next-token perplexity on the held-out rows."""
    rows = read_rows(run.settings["heldout_rows"], run.settings["max_heldout_rows"])
    return math.exp(score_heads(model, rows).losses[0])


def _prompts(run: Comparison, label: str) -> list[list[int]]:
    """Return the token ids of the test prompts of a kind of text."""
    return read_prompts(run.model, run.settings["test"][label], run.settings["test_prompts"])[1]
