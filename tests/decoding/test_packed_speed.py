"""Weights are packed only where a measurement finds that faster."""

import pytest
import torch
from helpers import tiny_models
from helpers.decoding import CHAIN, GREEDY, assert_as_stock, enlarge_weights, prompt
from helpers.tiny_models import randomise_heads
from torch import nn
from transformers import AutoModelForCausalLM

from lmtp_factory import attach_heads
from lmtp_factory.decoding import cpu_prepacked, packed_speed
from lmtp_factory.decoding.cpu_prepacked import can_prepack, mostly_prepacked, prepacked
from lmtp_factory.decoding.packed_speed import fewest_tokens
from lmtp_factory.modeling import onednn


measured = packed_speed._fewest_tokens  # before a fixture replaces it


@pytest.fixture
def model(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_models.save_llama(tmp_path)).eval()
    enlarge_weights(model)
    attach_heads(model)
    randomise_heads(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    assert can_prepack(model)
    return model


def generates_as_stock(model):
    return assert_as_stock(model, prompt(), max_new_tokens=16, lmtp_tree=CHAIN, **GREEDY)[0].tolist()


@pytest.mark.parametrize(
    "faster, expected", [([1, 2, 4, 8, 16], 1), ([4, 8, 16], 4), ([1, 8, 16], 8), ([1, 2], None), ([], None)]
)
def test_the_fewest_tokens_are_those_from_which_on_packed_weights_are_always_faster(monkeypatch, faster, expected):
    def seconds(inputs, weights, packed):
        torch.testing.assert_close(onednn.linear(inputs, packed[0]), inputs @ weights[0].T)
        return (2.0, 1.0) if len(inputs) in faster else (1.0, 2.0)

    monkeypatch.setattr(packed_speed, "_seconds", seconds)
    measured.cache_clear()
    assert measured((6, 8), 1) == expected
    measured.cache_clear()


def test_the_time_is_measured_once_for_each_shape_and_number_of_threads(monkeypatch):
    timed = []
    monkeypatch.setattr(packed_speed, "_fewest_tokens", measured)
    monkeypatch.setattr(packed_speed, "_seconds", lambda *operands: timed.append(operands) or (2.0, 1.0))
    measured.cache_clear()
    threads = torch.get_num_threads()
    try:
        for shape in ((6, 8), (6, 8), (8, 6)):
            assert fewest_tokens(shape) == 1
        assert len(timed) == 2 * len(packed_speed._TIMED_TOKENS)
        torch.set_num_threads(threads + 1)
        fewest_tokens((6, 8))
        assert len(timed) == 3 * len(packed_speed._TIMED_TOKENS)
    finally:
        torch.set_num_threads(threads)
        measured.cache_clear()


def test_weights_that_packing_slows_stay_ordinary(model, monkeypatch):
    faster = model.model.layers[0].mlp.up_proj.weight.shape
    monkeypatch.setattr(packed_speed, "_fewest_tokens", lambda shape, threads: 1 if shape == faster else None)
    layers = cpu_prepacked._linears(model)
    assert 0 < sum(layer.weight.shape == faster for layer in layers) < len(layers)
    with prepacked(model):
        for layer in layers:
            assert (layer.forward.packed is not None) == (layer.weight.shape == faster)
    generates_as_stock(model)
    monkeypatch.setattr(packed_speed, "_fewest_tokens", lambda shape, threads: None)
    assert not can_prepack(model)


def test_costs_are_those_of_packed_weights_if_most_are_packed_for_every_number_of_tokens(model, monkeypatch):
    one_kind = model.model.layers[0].mlp.up_proj.weight.shape
    for packed, fewest, expected in ((one_kind, 1, False), (None, 1, True), (None, 4, False)):
        monkeypatch.setattr(
            packed_speed, "_fewest_tokens", lambda shape, _, p=packed, f=fewest: f if p in (None, shape) else None
        )
        assert can_prepack(model) and mostly_prepacked(model) == expected


def test_a_weight_that_was_slower_is_packed_once_it_is_faster(model, monkeypatch):
    """With another number of threads, for instance."""
    monkeypatch.setattr(packed_speed, "_fewest_tokens", lambda shape, threads: None)
    with prepacked(model):
        assert model.lm_head.forward.packed is None
    monkeypatch.setattr(packed_speed, "_fewest_tokens", lambda shape, threads: 1)
    with prepacked(model):
        assert model.lm_head.forward.packed is not None


def test_the_real_measurement_takes_any_default_dtype_and_large_weights():
    torch.set_default_dtype(torch.bfloat16)
    try:
        for shape in ((48, 32), (60_000, 1_000)):
            assert measured(shape, torch.get_num_threads()) in (None, *packed_speed._TIMED_TOKENS)
    finally:
        torch.set_default_dtype(torch.float32)
        measured.cache_clear()


def test_few_tokens_use_the_ordinary_weight(monkeypatch):
    monkeypatch.setattr(packed_speed, "_fewest_tokens", lambda shape, threads: 3)
    layer, used = nn.Linear(8, 6), []
    monkeypatch.setattr(
        onednn,
        "linear",
        lambda *args: used.append(1) or nn.functional.linear(args[0], layer.weight, args[2]),
    )
    with torch.no_grad(), prepacked(nn.Sequential(layer)):
        for shape, packed in (((2, 8), False), ((1, 2, 8), False), ((3, 8), True), ((2, 2, 8), True)):
            used.clear()
            layer(torch.randn(shape))
            assert bool(used) == packed
