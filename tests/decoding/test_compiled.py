"""Compiled decoding against stock's own, by torch.compile itself; only the slow tests let it write machine code."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers.decoding import GREEDY, TREES, decoded, mixed_ranks, oracle, padded, prompt, stock
from transformers import CompileConfig, set_seed

from lmtp_factory.decoding import loop, tree_builder
from lmtp_factory.decoding.draft import Candidates
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.tree_config import TreeConfig


def options(backend: str = "eager", fullgraph: bool = True) -> CompileConfig:
    config = CompileConfig(mode="default" if backend == "inductor" else None, backend=backend, fullgraph=fullgraph)
    config._compile_all_devices = True
    return config


def compiled(backend: str = "eager", fullgraph: bool = True, new: int = 24) -> dict:
    config = options(backend, fullgraph)
    return {"cache_implementation": "static", "compile_config": config, "max_new_tokens": new}


@contextmanager
def drafts_by_token(continuations: torch.Tensor, vocabulary: int, width: int):
    """Inside, drafts say what follows the root in `continuations`, at ranks that change; looked up on the device."""
    table = torch.randint(vocabulary, (vocabulary, 12, width), generator=torch.Generator().manual_seed(0))
    for row in continuations.tolist():
        for place, token in enumerate(row):
            for level, right in enumerate(row[place + 1 : place + 13]):
                table[token, level] = (right + 1 + torch.arange(width)) % vocabulary
                if level < (3, 0, 5)[place % 3]:
                    table[token, level, place % 3 // 2] = right

    def propose(model, window, levels, width, *_):
        tokens = table[window.roots, :levels, :width]  # (batch, levels, width)
        return Candidates(tokens, torch.full(tokens.shape, 0.5) ** torch.arange(1, width + 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_builder, "propose_candidates", propose)
        yield


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("plan", ["chain", "static", "dynamic"])
@pytest.mark.parametrize("lengths", [[9], [7, 2, 4]], ids=["one row", "padded rows"])
def test_a_whole_step_is_one_graph(leap, lengths, plan):
    """Nothing of a step is left out of it (`fullgraph`), and a later call of the same length finds the graphs."""
    model, inputs = leap("llama"), padded(lengths)
    expected = stock(model, **inputs, max_new_tokens=24, **GREEDY)
    found = []
    for _ in range(3):
        with drafts_by_token(expected, model.config.vocab_size, 3):
            ours, stats = decoded(model, **inputs, lmtp_tree=TREES[plan], **compiled(), **GREEDY)
        assert ours.tolist() == expected.tolist() and stats.tau > 1.3
        assert stats.nodes == stats.steps * TREES[plan].nodes
        found.append(graphs())
    assert found[0] > 0 and found[2] == found[1]


HEADS = {
    "the newest token": {"head_kind": "own", "head_inputs": "state_token", "head_block": "mlp"},
    "own, few tokens": {"head_kind": "own", "head_inputs": "state_token", "draft_vocab_size": 40},
    "the LM head's": {"head_kind": "shared", "stride": 3, "num_heads": 2},
}


def assert_drafts_as_uncompiled(model, inputs, tree, expected):
    """The graph drafts the same tokens in every step."""
    new, drafts, original = expected.shape[1] - inputs["input_ids"].shape[1], [], tree_builder.TreeBuilder.draft

    def draft(self, *args):
        drawn, tokens = original(self, *args)
        collect(tokens)
        return drawn, tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_builder.TreeBuilder, "draft", draft)
        patch.setattr(loop, "prepacked_if_possible", lambda *_: nullcontext())  # int8 heads draft a little otherwise
        for is_compiled in (True, False):
            verified.clear()
            options = compiled(new=new) | {"disable_compile": not is_compiled}
            before = graphs()
            ours, stats = decoded(model, **inputs, lmtp_tree=tree, **options, **GREEDY)
            assert ours.tolist() == expected.tolist() and stats.nodes > stats.steps
            assert (graphs() > before) == is_compiled
            drafts.append(list(verified))
    assert len(drafts[0]) == len(drafts[1]) > 1 and all(map(torch.equal, *drafts))


verified: list[torch.Tensor] = []  # (batch, nodes) tokens of every step


@torch.library.custom_op("leap_tests::collect", mutates_args=())
def collect(tokens: torch.Tensor) -> None:
    verified.append(tokens.clone())


collect.register_fake(lambda tokens: None)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3-text"])
def test_the_heads_draft_in_the_graph(leap, heads, architecture):
    model, inputs = leap(architecture, heads=HEADS[heads]), padded([9, 2])
    expected = stock(model, **inputs, max_new_tokens=12, **GREEDY)
    assert_drafts_as_uncompiled(model, inputs, TREES["dynamic"], expected)


def test_rows_that_end_early_and_plain_steps(leap):
    model, inputs = leap("mistral"), padded([9, 5, 7])
    whole = stock(model, **inputs, max_new_tokens=30, **GREEDY)
    ends = {"eos_token_id": [int(whole[0, 15]), int(whole[1, 21])], "pad_token_id": 0}
    expected = stock(model, **inputs, max_new_tokens=30, **ends, **GREEDY)
    with drafts_by_token(whole, model.config.vocab_size, 3):
        tree = TreeConfig("dynamic", 9, width=3)  # without `always`: the budget mixes plain steps in
        ours, stats = decoded(model, **inputs, lmtp_tree=tree, **compiled(new=30), **ends, **GREEDY)
    assert ours.tolist() == expected.tolist() and stats.steps < stats.nodes < 9 * stats.steps


def test_a_draft_vocabulary_of_the_lm_head(leap):
    model = leap("llama", heads={"head_kind": "shared", "draft_vocab_size": 40})
    expected = stock(model, prompt(), max_new_tokens=12, **GREEDY)
    assert_drafts_as_uncompiled(model, {"input_ids": prompt()}, TREES["static"], expected)
    rows = model.compiled_functions.unembeddings(model)[0].weight
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    try:
        assert model.compiled_functions.unembeddings(model)[0].weight is rows  # where graphs expect it
        assert torch.equal(rows, model.lm_head.weight[model.leap_heads.draft_tokens])
        model.double()
        assert model.compiled_functions.unembeddings(model)[0].weight.dtype == torch.float64  # a cast takes new memory
    finally:
        model.float()
        with torch.no_grad():
            model.lm_head.weight.mul_(2.0)


def test_looking_forward(leap):
    """Plain steps and drafts in turns."""
    model, inputs = leap("llama", heads={"num_heads": 2, "stride": 3}), padded([9, 2])
    expected = stock(model, **inputs, max_new_tokens=20, **GREEDY)
    with drafts_by_token(expected, model.config.vocab_size, 3):
        ours, stats = decoded(
            model, **inputs, lmtp_tree=TREES["chain"], lmtp_decode="forward", **compiled(new=20), **GREEDY
        )
    assert ours.tolist() == expected.tolist() and stats.strategy == "forward" and stats.steps < stats.nodes


def test_processors_leave_the_walk_to_the_host(leap):
    model, settings = leap("llama"), {"no_repeat_ngram_size": 2, "max_new_tokens": 20} | GREEDY
    expected = stock(model, **padded([7, 4]), **settings)
    with oracle(expected, mixed_ranks):
        options = compiled(fullgraph=False) | settings
        ours, stats = decoded(model, **padded([7, 4]), lmtp_tree=TREES["dynamic"], **options)
    assert ours.tolist() == expected.tolist() and stats.tau > 1.3 and graphs() > 0


def test_a_penalty_of_padded_rows(leap):
    """Since transformers 5.24 it knows the padding of the whole batch, and stock decodes."""
    settings = {"repetition_penalty": 1.3, "max_new_tokens": 6} | GREEDY
    model, stats = leap("llama"), DecodeStats()
    ours = model.generate(**padded([7, 4]), lmtp_stats=stats, **settings)
    assert torch.equal(ours, stock(model, **padded([7, 4]), **settings))
    assert stats.stock_reason in (None, "a logits processor wants the whole batch")


def test_sampling_compiles_the_backbone(leap):
    """The host walks down the tree where tokens are drawn."""
    model, settings = leap("llama"), {"do_sample": True, "temperature": 1e-3, "top_k": 0}
    set_seed(0)
    expected = stock(model, prompt(), max_new_tokens=24, **settings)
    with oracle(expected, mixed_ranks):
        set_seed(0)
        ours, stats = decoded(model, prompt(), lmtp_tree=TREES["dynamic"], **compiled(fullgraph=False), **settings)
    assert ours.tolist() == expected.tolist() and stats.tau > 1.3 and graphs() > 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_machine_code(leap, architecture):
    model, inputs = leap(architecture), padded([7, 4])
    expected = stock(model, **inputs, max_new_tokens=24, **GREEDY)
    end = {"eos_token_id": int(expected[0, 20]), "pad_token_id": 0}
    for tree in (TREES["dynamic"], TreeConfig("dynamic", 9, width=3)):  # the other begins with a plain step
        for more in ({}, end):
            whole = stock(model, **inputs, max_new_tokens=24, **more, **GREEDY)
            with drafts_by_token(expected, model.config.vocab_size, 3):
                ours, stats = decoded(model, **inputs, lmtp_tree=tree, **compiled("inductor"), **more, **GREEDY)
            assert ours.tolist() == whole.tolist() and stats.nodes > stats.steps
