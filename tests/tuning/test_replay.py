"""Replayed acceptance against real decoding."""

import pytest
from torch import nn

from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.tree import best_first_paths, chain_paths
from lmtp_factory.decoding.tree_config import CostCurve, TreeConfig
from lmtp_factory.evaluation.self_generated import generate_greedy
from lmtp_factory.tuning.replay import accuracies, observe_answers, rate_of_cut_trees, tau_of_dynamic, tau_of_paths


@pytest.fixture
def decoded_tau(model, prompts):
    """plan -> tokens a forward of a real generation with it."""

    def decode(plan):
        stats = DecodeStats()
        for ids in prompts:
            generate_greedy(model, ids, 40, lmtp_tree=plan, lmtp_stats=stats)
        return stats.tau

    return decode


@pytest.mark.parametrize("nodes", [2, 4, 6])
def test_replayed_chains_are_decoded_ones(observed, decoded_tau, nodes):
    tau = tau_of_paths(observed, chain_paths(nodes))
    assert tau == pytest.approx(decoded_tau(TreeConfig("chain", nodes, always=True)))
    assert tau > 1.2


@pytest.mark.parametrize("nodes", [3, 9])
def test_replayed_static_trees_are_decoded_ones(observed, decoded_tau, nodes):
    paths = tuple(best_first_paths(accuracies(observed), nodes))
    assert tau_of_paths(observed, paths) == pytest.approx(decoded_tau(TreeConfig("static", nodes, paths, always=True)))


def test_replayed_dynamic_trees_are_decoded_ones(observed, decoded_tau):
    taus = tau_of_dynamic(observed, [2, 5, 12])
    for nodes, tau in taus.items():
        assert tau == pytest.approx(decoded_tau(TreeConfig("dynamic", nodes, width=6, always=True)))
    assert taus[2] <= taus[5] <= taus[12]


def test_free_verification_cuts_nothing(observed):
    free = TreeConfig("dynamic", 12, cost=CostCurve({1: 1.0, 64: 1.0}))
    tau, _ = rate_of_cut_trees(observed, free, draft_cost=0.0)
    assert tau == pytest.approx(tau_of_dynamic(observed, [12])[12])


def test_expensive_verification_drafts_nothing(observed):
    dear = TreeConfig("dynamic", 12, cost=CostCurve({1: 1.0, 2: 2.5, 64: 200.0}))
    assert rate_of_cut_trees(observed, dear, draft_cost=0.0) == (1.0, 1.0)


def test_accuracies_add_up_to_at_most_one(observed):
    for level in accuracies(observed):
        assert 0 < sum(level) <= 1
        assert all(0 <= rate <= 1 for rate in level)


def test_replay_runs_the_backbone_on_prepacked_weights_and_the_heads_on_their_own(model, prompts):
    """int8 heads would round all rows of a call alike, and a draft has fewer rows than a replay."""
    seen = set()

    def look(module, args, kwargs, output):
        for part, of in {"backbone": model.base_model, "heads": model.leap_heads}.items():
            seen.update((part, "forward" in vars(layer)) for layer in of.modules() if type(layer) is nn.Linear)

    hook = model.base_model.register_forward_hook(look, with_kwargs=True)
    try:
        observe_answers(model, [(prompts[0], [5, 6, 7, 8])], width=2)
    finally:
        hook.remove()
    assert seen == {("backbone", True), ("heads", False)}
    assert not any("forward" in vars(layer) for layer in model.modules() if type(layer) is nn.Linear)
