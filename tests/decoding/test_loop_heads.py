"""Look-back decoding with heads other than the paper's: stock's output, in batches, with every tree and strategy."""

import pytest
import torch
from helpers.decoding import GREEDY, TREES, assert_as_stock, assert_as_stock_with_drafts, padded, prompt, stock
from transformers import CompileConfig

from lmtp_factory.decoding import DecodeStats


OFFSETS = {"offsets": (2, 3, 6)}
HEADS = {
    "all layers": OFFSETS | {"head_inputs": "layers"},
    "newest token": OFFSETS | {"head_inputs": "state_token"},
    "newest token, gated, draft vocabulary": OFFSETS
    | {"head_inputs": "state_token", "head_block": "mlp", "head_kind": "shared", "draft_vocab_size": 40},
}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3-text", "gemma3", "gpt2"])
@pytest.mark.parametrize("heads", HEADS)
def test_batches_with_padding(leap, architecture, heads):
    model = leap(architecture, heads=HEADS[heads])
    _, stats = assert_as_stock_with_drafts(model, padded([9, 3, 1]))
    assert stats.tau > 1.3
    assert_as_stock(model, **padded([9, 3, 1]), max_new_tokens=20, **GREEDY)


@pytest.mark.parametrize("plan", TREES)
@pytest.mark.parametrize("strategy", ["backward", "forward"])
@pytest.mark.parametrize("heads", HEADS)
def test_every_tree_and_strategy(leap, plan, strategy, heads):
    model = leap(heads=HEADS[heads])
    assert_as_stock(model, prompt(), lmtp_tree=TREES[plan], lmtp_decode=strategy, max_new_tokens=20, **GREEDY)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("heads", HEADS)
def test_prompts_shorter_than_the_window(leap, length, heads):
    assert_as_stock(leap(heads=HEADS[heads]), prompt(1, length), max_new_tokens=12, **GREEDY)


@pytest.mark.parametrize("heads", HEADS)
def test_a_static_cache(leap, heads):
    model = leap(heads=HEADS[heads])
    assert_as_stock(model, prompt(), cache_implementation="static", max_new_tokens=12, **GREEDY)


@pytest.mark.parametrize("heads", HEADS)
def test_a_sampled_sequence_is_stock_s(leap, heads):
    model, drawn = leap(heads=HEADS[heads]), []
    for decode in ("backward", "off"):
        torch.manual_seed(0)
        drawn.append(model.generate(prompt(), do_sample=True, top_p=0.9, max_new_tokens=16, lmtp_decode=decode))
    assert torch.equal(*drawn)


def test_heads_of_all_layers_leave_a_compiled_forward_to_stock(leap):
    model, stats = leap(heads=HEADS["all layers"]), DecodeStats()
    options = CompileConfig(fullgraph=False, mode="default", backend="eager", dynamic=True)
    options._compile_all_devices = True
    kwargs = {"cache_implementation": "static", "compile_config": options, "max_new_tokens": 8} | GREEDY
    output = model.generate(prompt(), lmtp_stats=stats, **kwargs)
    assert stats.stock_reason == "a compiled forward does not show the inner layers that these heads read"
    assert torch.equal(output, stock(model, prompt(), max_new_tokens=8, **GREEDY))
