"""The tree that promises most tokens a second on this device."""

import pytest
import torch

from lmtp_factory import LMTPError
from lmtp_factory.decoding.tree_config import CostCurve
from lmtp_factory.tuning.costs import StepCosts
from lmtp_factory.tuning.replay import Observed
from lmtp_factory.tuning.tree_search import measured, rank_trees, table, tree_config_of


@pytest.mark.parametrize(("curve", "kind"), [({1: 1.0, 2: 3.0, 64: 90.0}, "none"), ({1: 1.0, 64: 1.0}, None)])
def test_the_costs_of_the_device_decide(observed, curve, kind):
    costs = StepCosts(CostCurve(curve), draft=0.01)
    options = rank_trees(observed, costs)
    best = max(options, key=lambda option: option.tokens_per_second)
    assert (best.kind == "none") == (kind == "none")
    plan = tree_config_of(best, observed, costs)
    assert plan.nodes == best.nodes


def test_every_kind_and_size_is_ranked_and_can_be_carried_out(observed):
    costs = StepCosts(CostCurve({1: 1.0, 64: 2.0}), draft=0.01)
    options = rank_trees(observed, costs)
    assert {option.kind for option in options} == {"none", "chain", "static", "dynamic", "dynamic, cut"}
    for option in options:
        plan = tree_config_of(option, observed, costs)
        assert plan.nodes <= option.nodes and (plan.cost is not None) == (option.kind == "dynamic, cut")
        if option.kind in ("static", "dynamic"):  # a step yields tau tokens and takes as long as this many plain steps
            plain_steps = (costs.verify.at(option.nodes) + costs.draft) / costs.verify.at(1)
            assert plan.expected_gain == pytest.approx(option.tau - plain_steps)
    best = max(options, key=lambda option: option.tokens_per_second)
    marked = [line for line in table(options).splitlines() if "<- chosen" in line]
    assert len(marked) == 1 and marked[0].startswith(best.kind)


def test_what_the_choice_rests_on_is_kept(observed):
    costs = StepCosts(CostCurve({1: 1.0, 64: 2.0}), draft=0.01)
    kept = measured(rank_trees(observed, costs), observed, costs)
    assert kept["steps"] == sum(map(len, observed))
    assert kept["verify_seconds"] == {"1": 1.0, "64": 2.0} and kept["draft_seconds"] == 0.01


@pytest.mark.parametrize("steps", [(0, 1), (1, 0), (0, 0, 1, 0), (1, 0, 0)], ids=str)
def test_answers_without_steps_do_not_count(steps, observed):
    """An answer of one token has no step; neither half of the answers may consist of such answers."""
    costs = StepCosts(CostCurve({1: 1.0, 64: 2.0}), draft=0.01)
    empty = Observed(observed[0].probabilities[:0], observed[0].ranks[:0])
    answers = [observed[0] if some else empty for some in steps]
    options = rank_trees(answers, costs)
    assert options == rank_trees(observed[:1], costs)
    assert all(option.tau >= 1 for option in options)


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_to_replay_is_refused(count):
    empty = Observed(torch.zeros(0, 6, 8), torch.zeros(0, 6, dtype=torch.long))
    with pytest.raises(LMTPError, match=r"^No answer has more than one token, .*: give other prompts or .*\.$"):
        rank_trees([empty] * count, StepCosts(CostCurve({1: 1.0}), draft=0.01))
