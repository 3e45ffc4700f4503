"""Subsets of the trained heads, against models that have only these heads."""

from itertools import combinations

import pytest
import torch
from helpers import tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, LMTPError, attach_heads, geometry
from lmtp_factory.decoding.tree_config import CostCurve
from lmtp_factory.evaluation.self_generated import self_generated_rows
from lmtp_factory.tuning import head_subsets
from lmtp_factory.tuning.costs import StepCosts
from lmtp_factory.tuning.head_subsets import rank_subsets, subset_table, subsets
from lmtp_factory.tuning.replay import observe
from lmtp_factory.tuning.tree_search import rank_trees


TRAINED = (1, 2, 3, 5, 6, 9)
KINDS = {
    "own": {"head_kind": "own"},
    "shared": {"head_kind": "shared"},
    "all layers": {"head_inputs": "layers"},
    "newest token": {"head_inputs": "state_token", "head_block": "mlp", "head_backs": 8, "draft_vocab_size": 80},
}


@pytest.fixture(scope="module", params=KINDS)
def superset(request, tmp_path_factory):
    """A tiny model that repeats itself, with five different heads that are right now and then."""
    path = tiny_models.save_qwen3(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    config = LMTPConfig(offsets=TRAINED, **KINDS[request.param])
    attach_heads(model, config, draft_tokens=range(config.draft_vocab_size) if config.draft_vocab_size else None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.leap_heads.parameters():
            parameter.add_(0.012 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def rows(superset, prompts):
    return list(self_generated_rows(superset, prompts, 24))


def observed_alone(model, rows, offsets):
    """What a model that has only the heads at these offsets observes."""
    trained = model.leap_heads
    model.leap_heads = trained.subset(offsets)
    try:
        return [observe(model, row, width=6) for row in rows]
    finally:
        model.leap_heads = trained


@pytest.fixture
def timed(monkeypatch):
    """The drafts that were timed. None of them costs anything."""
    drafts = []

    def measure(model, pairs, **options):
        drafts.extend(pairs)
        return [StepCosts(CostCurve({1: 1.0, 64: 1.5}), draft=0.0)] * len(pairs)

    monkeypatch.setattr(head_subsets, "measure_drafts", measure)
    return drafts


def test_subsets_are_all_choices_beside_the_lm_head():
    chosen = subsets(LMTPConfig(offsets=TRAINED), 3)
    assert len(chosen) == len(set(chosen)) == 10
    assert all(geometry.check_offsets(offsets[1:]) == offsets and set(offsets) <= set(TRAINED) for offsets in chosen)
    assert subsets(LMTPConfig(offsets=TRAINED), 5) == [TRAINED]


@pytest.mark.parametrize("num_heads", [1, 3, 5])
def test_a_subset_is_observed_as_a_model_with_these_heads_alone(superset, rows, timed, num_heads):
    ranked = rank_subsets(superset, iter(rows), num_heads, width=6)
    assert {subset.offsets for subset in ranked} == set(subsets(LMTPConfig(offsets=TRAINED), num_heads))
    for subset in ranked:
        alone = observed_alone(superset, rows, subset.offsets)
        for ours, theirs in zip(subset.observed, alone, strict=True):
            torch.testing.assert_close(ours.probabilities, theirs.probabilities)
            assert torch.equal(ours.ranks, theirs.ranks)
        assert subset.options == rank_trees(subset.observed, subset.costs)


def test_the_fastest_subset_is_first(superset, rows, timed):
    speeds = [subset.best.tokens_per_second for subset in rank_subsets(superset, rows, 2)]
    assert speeds == sorted(speeds, reverse=True) and speeds[0] > speeds[-1]


def test_the_backbone_reads_an_answer_once(superset, rows, timed, monkeypatch):
    calls, forward = [], superset.base_model.forward
    monkeypatch.setattr(superset.base_model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    rank_subsets(superset, rows, 2)
    assert len(calls) == len(rows)


def test_a_draft_is_timed_once_for_each_reach(superset, rows, timed):
    rank_subsets(superset, rows, 3)
    reaches = {geometry.reach(offsets) for offsets in subsets(LMTPConfig(offsets=TRAINED), 3)}
    assert sorted(len(pairs) for pairs in timed) == sorted(reach - 1 for reach in reaches)
    assert all(len({head for head, _ in pairs}) == 3 for pairs in timed)


def test_where_no_draft_pays_tau_decides(superset, rows, monkeypatch):
    dear = StepCosts(CostCurve({1: 1.0, 2: 50.0, 64: 99.0}), 1.0)
    monkeypatch.setattr(head_subsets, "measure_drafts", lambda model, drafts, **options: [dear] * len(drafts))
    ranked = rank_subsets(superset, rows, 2)
    assert {subset.best.kind for subset in ranked} == {"none"}
    taus = [max(option.tau for option in subset.options) for subset in ranked]
    assert taus == sorted(taus, reverse=True) and taus[0] > taus[-1]


def test_real_costs(superset, rows):
    ranked = rank_subsets(superset, rows, 4, sizes=(1, 4), context=8, repeats=1, nodes=4)
    assert all(subset.costs.draft > 0 for subset in ranked)
    assert len({id(subset.costs.verify) for subset in ranked}) == 1


def test_no_step_is_refused(superset, rows, timed):
    short = [(prompt, answer[:1]) for prompt, answer in rows]
    with pytest.raises(LMTPError, match=r"^No answer has more than one token"):
        rank_subsets(superset, short, 2)
    assert not timed


def test_the_table_is_cut_and_says_so(superset, rows, timed):
    ranked = rank_subsets(superset, rows, 3)
    whole, cut = subset_table(ranked).splitlines(), subset_table(ranked, limit=4).splitlines()
    assert len(whole) == 11 and len(cut) == 6
    assert cut[:5] == whole[:5] and cut[5] == "and 6 more, none of them faster"
    assert [line for line in whole if "<- chosen" in line] == [whole[1]]
    assert whole[1].startswith(",".join(map(str, ranked[0].offsets[1:])))


@pytest.mark.parametrize("head_backs", [1, 2, 3, 8])
def test_heads_that_read_a_token_look_back_no_further_than_they_were_trained_for(head_backs):
    trained = LMTPConfig(offsets=(2, 3, 4, 5, 6, 7), head_inputs="state_token", head_backs=head_backs)
    for num_heads in range(1, 7):
        expected = [
            (1, *extra)
            for extra in combinations(trained.offsets[1:], num_heads)
            if all(far - near <= head_backs for near, far in zip((1, *extra), extra))
        ]
        if expected:
            assert subsets(trained, num_heads) == expected
        else:
            with pytest.raises(LMTPError, match="leap further than they were trained for .*larger head_backs"):
                subsets(trained, num_heads)
