"""The tree of each step, and steps without one."""

import dataclasses

import pytest
import torch
from helpers.decoding import GREEDY, PATHS, assert_as_stock, oracle, prompt, stock
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from lmtp_factory import LMTPError
from lmtp_factory.decoding import loop, tree_builder
from lmtp_factory.decoding.accept import Acceptor
from lmtp_factory.decoding.cache import TreeCache
from lmtp_factory.decoding.draft import propose_candidates
from lmtp_factory.decoding.draft_budget import PROBE_NODES
from lmtp_factory.decoding.state import DecodeState
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.tree_builder import TreeBuilder
from lmtp_factory.decoding.tree_config import CostCurve, TreeConfig


@pytest.mark.parametrize(
    "plan",
    [
        TreeConfig("chain", 5),
        TreeConfig("static", 12, paths=PATHS),
        TreeConfig("dynamic", 9, width=3),
    ],
    ids=["chain", "static", "dynamic"],
)
def test_every_kind_of_tree_stops_where_nothing_is_accepted(leap, plan, monkeypatch):
    """A real generation whose drafts are always wrong, on a clock on which a draft costs half a plain step more."""
    now, forward = 0.0, loop.verify

    def verify(model, tokens, *args):
        nonlocal now
        now += 1.0 if tokens.shape[1] == 1 else 1.5
        return forward(model, tokens, *args)

    monkeypatch.setattr(loop, "verify", verify)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now)
    model = leap()
    kwargs = {"max_new_tokens": 80} | GREEDY
    whole = stock(model, prompt(), **kwargs)
    stats = DecodeStats()
    with oracle(whole, lambda row, place: None):
        ours = model.generate(prompt(), lmtp_tree=plan, lmtp_stats=stats, **kwargs)
    assert ours.tolist() == whole.tolist()
    assert stats.steps < stats.nodes and stats.seconds["total"] <= 80 * 1.02
    with oracle(whole, lambda row, place: None):
        _, stats = assert_as_stock(model, prompt(), lmtp_tree=dataclasses.replace(plan, always=True), **kwargs)
    assert stats.seconds["total"] > 80 * 1.4


def state_of(model, inputs, most=40):
    """A state behind its prefill, in which a row may still get ``most`` tokens."""
    config, ids = model.config.get_text_config(), inputs["input_ids"]
    criteria = StoppingCriteriaList([MaxLengthCriteria(ids.shape[1] + most)])
    cache = TreeCache.replacing(DynamicCache(config=config), config, columns=ids.shape[1] + most)
    state = DecodeState(Acceptor(ids, LogitsProcessorList(), criteria, GenerationConfig()), cache)
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    with torch.no_grad():
        state.prefill(model, ids, GenerationConfig(), {"position_ids": positions, "use_cache": True})
    return state


def state_and_builder(model, config, constant=False):
    """A state behind the prefill of a prompt, and the builder of its trees."""
    builder = TreeBuilder(model, config, constant=constant, device=torch.device("cpu"))
    return state_of(model, {"input_ids": prompt()}), builder


def shape(tree):
    return tree.nodes, tree.height


def test_the_first_step_is_plain_because_a_draft_has_nothing_to_be_compared_with(leap):
    model = leap()
    state, builder = (
        state_of(model, {"input_ids": prompt(2)}),
        TreeBuilder(model, TreeConfig("chain", 4), constant=False, device=torch.device("cpu")),
    )
    tree, tokens = builder.build(state)
    assert shape(tree) == (1, 0) and tokens.tolist() == state.window.roots[:, None].tolist() and not builder.drafted
    builder.learn(tree.nodes, [[0], [0]], seconds=1.0)
    tree, tokens = builder.build(state)
    assert shape(tree) == (4, 3) and tokens.shape == (2, 4) and builder.drafted


def test_a_tree_with_a_measured_gain_survives_a_failed_probe(leap):
    model, drafted = leap(), {}
    for gain in (0.0, 0.2):
        state, config = state_of(model, {"input_ids": prompt()}), TreeConfig("chain", 6, expected_gain=gain)
        builder = TreeBuilder(model, config, constant=False, device=torch.device("cpu"))
        for seconds in (1.0, 1.1):  # a plain step, then a probe that brings nothing
            tree, _ = builder.build(state)
            builder.learn(tree.nodes, [[0]], seconds)
        builder.build(state)
        drafted[gain] = builder.drafted
    assert drafted == {0.0: False, 0.2: True}


@pytest.mark.parametrize(
    ("config", "verified"),
    [(TreeConfig("dynamic", 16, cost=CostCurve({1: 1.0, 2: 1.0, 3: 9.0})), 2), (TreeConfig("chain", 50), 7)],
    ids=["a cost curve", "the reach of the heads"],
)
def test_the_time_of_a_whole_tree_is_that_of_steps_that_may_have_one(config, verified, leap):
    """However few nodes they verify: else it is never known, and a whole tree always seems to take half a step."""
    model = leap()
    state, builder = state_and_builder(model, config)
    tree, _ = builder.build(state)
    builder.learn(tree.nodes, [[0]], seconds=1.0)
    builder.budget.balance = 0.3
    assert builder.nodes() == PROBE_NODES
    builder.budget.balance = 3.0
    tree, _ = builder.build(state)
    assert tree.nodes == verified
    builder.learn(tree.nodes, [[0]], seconds=1.1)
    builder.budget.balance = 0.3
    assert builder.nodes() == config.nodes


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(
    "config", [TreeConfig("chain", 6), TreeConfig("static", 8, PATHS[:8]), TreeConfig("dynamic", 9, width=3)], ids=str
)
@torch.no_grad()
def test_a_probe_is_the_best_part_of_the_tree(config, constant, leap):
    model = leap()
    state, builder = state_and_builder(model, config, constant)
    tree, _ = builder.build(state)
    builder.learn(tree.nodes, [[0]], seconds=1.0)
    probe, tokens = builder.build(state)
    builder.budget.balance = 3.0
    whole, all_tokens = builder.build(state)
    assert (probe.nodes, whole.nodes) == (config.nodes if constant else PROBE_NODES, config.nodes)
    assert torch.equal(probe.parents, whole.parents[:, : probe.nodes])
    assert torch.equal(tokens, all_tokens[:, : probe.nodes])


def test_only_candidates_that_the_tree_takes_are_computed(leap, monkeypatch):
    """The deepest path is beyond the heads, so its rank does not widen the draft."""
    model, widths = leap(heads={"num_heads": 1, "stride": 2}), []  # two levels
    paths = ((), (0,), (1,), (0, 2), (0, 2, 5))
    builder = TreeBuilder(
        model, TreeConfig("static", 5, paths, always=True), constant=False, device=torch.device("cpu")
    )

    def propose(model, window, levels, width, *_):
        widths.append((levels, width))
        return propose_candidates(model, window, levels, width)

    monkeypatch.setattr(tree_builder, "propose_candidates", propose)
    with torch.no_grad():
        tree, _ = builder.build(state_of(model, {"input_ids": prompt()}))
    assert shape(tree) == (4, 2) and widths == [(2, 3)]


def test_trees_end_where_the_heads_do(leap):
    """Offsets 1, 3, 5: the heads draft four tokens behind the root's next one."""
    model = leap(heads={"num_heads": 2, "stride": 2})
    state = state_of(model, {"input_ids": prompt()})
    with torch.no_grad():
        for config in (TreeConfig("chain", 50, always=True), TreeConfig("dynamic", 5, width=1, always=True)):
            tree, _ = TreeBuilder(model, config, constant=False, device=torch.device("cpu")).build(state)
            assert tree.height == 4 and tree.nodes == 5


def test_dynamic_trees_are_no_higher_than_the_tokens_that_may_still_come(leap):
    model, config = leap(), TreeConfig("dynamic", 9, width=2, always=True)
    with torch.no_grad():
        for left, height in (
            (2, 0),
            (3, 1),
            (4, 2),
            (40, 6),
        ):  # the prefill takes one token, the step's own is the last
            state = state_of(model, {"input_ids": prompt()}, most=left)
            tree, _ = TreeBuilder(model, config, constant=False, device=torch.device("cpu")).build(state)
            assert tree.height <= height and (tree.nodes == 1) == (height == 0)


def test_what_was_accepted_calibrates_the_size_of_dynamic_trees(leap):
    model = leap()
    state = state_of(model, {"input_ids": prompt()})
    config = TreeConfig("dynamic", 9, width=3, cost=CostCurve({1: 1.0, 64: 1.0}), always=True)
    builder = TreeBuilder(model, config, constant=False, device=torch.device("cpu"))
    with torch.no_grad():
        tree, _ = builder.build(state)
        builder.learn(tree.nodes, [[0]], seconds=1.0)
    assert tree.nodes == 9 and builder.calibration.ratio < 1
    promised = sum(tree.values[0, 1:].tolist())
    assert builder.calibration.predicted == pytest.approx(promised) and builder.calibration.accepted == 0


@pytest.mark.parametrize("rows", [1, 2])
def test_trees_wider_than_the_vocabulary(leap, rows):
    """Candidates end with the vocabulary; a static tree that names ranks beyond it was measured on another model."""
    model = leap("llama", vocab_size=9, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    inputs, kwargs = {"input_ids": prompt(rows, 6) % 7 + 2}, {"max_new_tokens": 12} | GREEDY
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for width in (9, 10, 40):
        assert_as_stock(model, **inputs, **kwargs, lmtp_tree=TreeConfig("dynamic", 64, width=width))
    assert_as_stock(model, **inputs, **kwargs, lmtp_tree=TreeConfig("static", 3, paths=((), (0,), (8,))))
    beyond = TreeConfig("static", 3, paths=((), (0,), (9,)))
    message = r"static tree takes candidates down to rank 9, but the heads draft 9 tokens \(ranks 0 to 8\)"
    with pytest.raises(LMTPError, match=message):
        model.generate(**inputs, **kwargs, lmtp_tree=beyond)
    assert torch.equal(
        model.generate(**inputs, **kwargs, lmtp_decode="off", lmtp_tree=beyond), stock(model, **inputs, **kwargs)
    )
