"""Look-back decoding with heads that read all layers: stock's output, in batches, with every tree and strategy."""

import pytest
import torch
from helpers.decoding import GREEDY, TREES, assert_as_stock, assert_as_stock_with_drafts, padded, prompt, stock
from transformers import CompileConfig

from lmtp_factory.decoding import DecodeStats


LAYERS = {"head_inputs": "layers", "offsets": (2, 3, 6)}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3-text", "gemma3", "gpt2"])
def test_batches_with_padding(leap, architecture):
    model = leap(architecture, heads=LAYERS)
    _, stats = assert_as_stock_with_drafts(model, padded([9, 3, 1]))
    assert stats.tau > 1.3
    assert_as_stock(model, **padded([9, 3, 1]), max_new_tokens=20, **GREEDY)


@pytest.mark.parametrize("plan", TREES)
@pytest.mark.parametrize("strategy", ["backward", "forward"])
def test_every_tree_and_strategy(leap, plan, strategy):
    model = leap(heads=LAYERS)
    assert_as_stock(model, prompt(), lmtp_tree=TREES[plan], lmtp_decode=strategy, max_new_tokens=20, **GREEDY)


@pytest.mark.parametrize("length", [1, 2])
def test_prompts_shorter_than_the_window(leap, length):
    assert_as_stock(leap(heads=LAYERS), prompt(1, length), max_new_tokens=12, **GREEDY)


def test_a_static_cache(leap):
    model = leap(heads=LAYERS)
    assert_as_stock(model, prompt(), cache_implementation="static", max_new_tokens=12, **GREEDY)


def test_a_sampled_sequence_is_stock_s(leap):
    model, drawn = leap(heads=LAYERS), []
    for decode in ("backward", "off"):
        torch.manual_seed(0)
        drawn.append(model.generate(prompt(), do_sample=True, top_p=0.9, max_new_tokens=16, lmtp_decode=decode))
    assert torch.equal(*drawn)


def test_a_compiled_forward_is_left_to_stock(leap):
    model, stats = leap(heads=LAYERS), DecodeStats()
    options = CompileConfig(fullgraph=False, mode="default", backend="eager", dynamic=True)
    options._compile_all_devices = True
    kwargs = {"cache_implementation": "static", "compile_config": options, "max_new_tokens": 8} | GREEDY
    output = model.generate(prompt(), lmtp_stats=stats, **kwargs)
    assert stats.stock_reason == "a compiled forward does not show the inner layers that these heads read"
    assert torch.equal(output, stock(model, prompt(), max_new_tokens=8, **GREEDY))
