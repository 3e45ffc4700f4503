"""Replayed acceptance against real decoding, and the tree that follows from it."""

import json

import pytest
import torch
from helpers import tiny_data, tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.cli import main
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.tree import best_first_paths, chain_paths
from lmtp_factory.decoding.tree_config import Conditions, CostCurve, TreeConfig, read_tree
from lmtp_factory.evaluation.self_generated import generate_greedy, write_own_text
from lmtp_factory.tuning.costs import StepCosts
from lmtp_factory.tuning.replay import accuracies, observe, rate_of_cut_trees, tau_of_dynamic, tau_of_paths
from lmtp_factory.tuning.tree_search import plan_of, weigh


PROMPTS = [[30, 40, 50], [60, 61, 62, 63, 64, 65], [70]]


@pytest.fixture(scope="module", params=[(2, None), (None, (2, 3, 6))], ids=["stride 2", "rising"])
def model(request, tmp_path_factory):
    """Tied embeddings and untrained heads: a model that repeats itself, so drafts are often right."""
    stride, offsets = request.param
    path = tiny_models.save_qwen3(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return attach_heads(model, LMTPConfig(num_heads=None if offsets else 3, stride=stride, offsets=offsets))


@pytest.fixture(scope="module")
def observed(model):
    return [observe(model, row, width=6) for row in write_own_text(model, PROMPTS, 40)]


def decoded_tau(model, plan):
    stats = DecodeStats()
    for ids in PROMPTS:
        generate_greedy(model, ids, 40, lmtp_tree=plan, lmtp_stats=stats)
    return stats.tau


@pytest.mark.parametrize("nodes", [2, 4, 6])
def test_replayed_chains_are_decoded_ones(model, observed, nodes):
    tau = tau_of_paths(observed, chain_paths(nodes))
    assert tau == pytest.approx(decoded_tau(model, TreeConfig("chain", nodes, always=True)))
    assert tau > 1.2


@pytest.mark.parametrize("nodes", [3, 9])
def test_replayed_static_trees_are_decoded_ones(model, observed, nodes):
    paths = tuple(best_first_paths(accuracies(observed), nodes))
    assert tau_of_paths(observed, paths) == pytest.approx(
        decoded_tau(model, TreeConfig("static", nodes, paths, always=True))
    )


def test_replayed_dynamic_trees_are_decoded_ones(model, observed):
    taus = tau_of_dynamic(observed, [2, 5, 12])
    for nodes, tau in taus.items():
        assert tau == pytest.approx(decoded_tau(model, TreeConfig("dynamic", nodes, width=6, always=True)))
    assert taus[2] <= taus[5] <= taus[12]


def test_free_verification_cuts_nothing(observed):
    free = TreeConfig("dynamic", 12, cost=CostCurve({1: 1.0, 64: 1.0}))
    tau, _ = rate_of_cut_trees(observed, free, draft_cost=0.0)
    assert tau == pytest.approx(tau_of_dynamic(observed, [12])[12])


def test_dear_verification_drafts_nothing(observed):
    dear = TreeConfig("dynamic", 12, cost=CostCurve({1: 1.0, 2: 2.5, 64: 200.0}))
    assert rate_of_cut_trees(observed, dear, draft_cost=0.0) == (1.0, 1.0)


def test_accuracies_add_up_to_at_most_one(observed):
    for level in accuracies(observed):
        assert 0 < sum(level) <= 1
        assert all(0 <= rate <= 1 for rate in level)


@pytest.mark.parametrize(("curve", "kind"), [({1: 1.0, 2: 3.0, 64: 90.0}, "none"), ({1: 1.0, 64: 1.0}, None)])
def test_the_device_decides(observed, curve, kind):
    costs = StepCosts(CostCurve(curve), draft=0.01)
    options = weigh(observed, costs)
    best = max(options, key=lambda option: option.tokens_per_second)
    assert (best.kind == "none") == (kind == "none")
    plan = plan_of(best, observed, costs)
    assert plan.nodes == best.nodes


def test_tree_command(tmp_path, capsys):
    path = tiny_models.save_qwen3(tmp_path / "model")
    model = attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig(num_heads=2))
    model.save_pretrained(path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"instruction": text}) for text, _ in tiny_data.texts(4)))
    arguments = ["--prompts", str(prompts), "--max-new-tokens", "12", "--context", "16"]
    assert main(["tree", str(path), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "<- chosen" in printed and "level 1:" in printed
    plan, conditions = read_tree(path / "lmtp")
    assert plan.source.endswith("tree.json")
    facts = json.loads((path / "lmtp" / "tree.json").read_text())["measured"]
    best = max(facts["options"], key=lambda option: option["tokens_per_second"])
    assert best["nodes"] == plan.nodes
    assert (path / "lmtp" / "tree.png").stat().st_size > 10_000
    assert conditions == Conditions("cpu", "float32", True)


def test_bench_command(tmp_path, capsys):
    path = tiny_models.save_qwen3(tmp_path / "model")
    attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig()).save_pretrained(path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"instruction": text}) for text, _ in tiny_data.texts(2)))
    options = [
        "--prompts",
        str(prompts),
        "--max-new-tokens",
        "16",
        "--nodes",
        "6",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main(["bench", str(path), *options]) == 0
    facts = json.loads((tmp_path / "out" / "bench.json").read_text())
    arms = {arm["name"]: arm for arm in facts["arms"]}
    assert arms["stock generate"]["tau"] == arms["our loop, no heads"]["tau"] == 1
    for name in ("backward, chain", "backward, static", "backward, dynamic", "forward, dynamic"):
        arm = arms[name]
        assert arm["differing"] == 0
        assert arm["tau"] == pytest.approx(1 + sum(arm["acceptance"]))
        assert 0 < arm["verify_share"] < 1
    assert arms["backward, dynamic"]["tau"] >= 1
    assert "tau" in capsys.readouterr().out and (tmp_path / "out" / "bench.png").stat().st_size > 5_000


def test_missing_heads_are_named(tmp_path):
    path = tiny_models.save_llama(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "what?"}')
    assert main(["tree", str(path), "--prompts", str(prompts)]) == 1
