"""What look-back decoding leaves to stock ``generate``, with a line in the log that says why."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from helpers.decoding import GREEDY, OTHER_SEARCH, assert_as_stock, assert_left_to_stock, oracle, prompt, stock
from transformers import DynamicCache

from lmtp_factory.decoding import support
from lmtp_factory.decoding.compat import CACHE
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.support import unsupported_reason


@pytest.mark.parametrize(
    "reason, kwargs",
    [
        ("use_cache is off", {"use_cache": False}),
        ("prefill_chunk_size is set", {"prefill_chunk_size": 4}),
        *(
            ("attentions or hidden states are wanted", {name: True, "return_dict_in_generate": True})
            for name in ("output_attentions", "output_hidden_states")
        ),
    ],
    ids=str,
)
def test_calls_that_need_every_forward_fall_back(leap, reason, kwargs, caplog):
    output = assert_left_to_stock(
        leap("llama", "eager"), reason, caplog, prompt(), max_new_tokens=6, **GREEDY, **kwargs
    )
    if "return_dict_in_generate" in kwargs:
        assert len(output["attentions" if "output_attentions" in kwargs else "hidden_states"]) == 6


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 355},
    ],
    ids=str,
)
def test_beam_and_assisted_search_fall_back(leap, kwargs, caplog):
    assert_left_to_stock(leap(), OTHER_SEARCH, caplog, prompt(), max_new_tokens=8, **GREEDY, **kwargs)


def test_a_query_scaled_by_columns_falls_back(leap, monkeypatch, caplog):
    """As Ministral 3's until transformers 5.3."""
    model = copy.deepcopy(leap())
    model.config.rope_parameters = {**model.config.rope_parameters, "llama_4_scaling_beta": 0.1}
    assert_as_stock(model, prompt(), max_new_tokens=6, **GREEDY)
    monkeypatch.setattr(support, "TAKES_COLUMNS", True)
    reason = "before transformers 5.4 this model scales queries by columns, which are not a tree's positions"
    assert_left_to_stock(model, reason, caplog, prompt(), max_new_tokens=6, **GREEDY)


def test_sampling_beam_search_falls_back_and_takes_its_seed(leap):
    outputs = []
    for decode in ("off", "auto"):
        torch.manual_seed(0)
        kwargs = {"num_beams": 2, "do_sample": True, "max_new_tokens": 8}
        outputs.append(leap().generate(prompt(), lmtp_decode=decode, **kwargs))
    assert torch.equal(*outputs)


def test_a_model_with_heads_is_assisted_and_assists(leap, caplog):
    """The assistant crops the cache that we hand back."""
    model = leap()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = stock(other, prompt(), max_new_tokens=16, **GREEDY)
    assert_left_to_stock(
        other, OTHER_SEARCH, caplog, prompt(), expected=expected, assistant_model=model, max_new_tokens=16, **GREEDY
    )


def test_an_unknown_cache_falls_back(leap, caplog):
    kind = type("Unknown", (DynamicCache,), {})
    support.warn_once.cache_clear()
    stats = DecodeStats()
    with caplog.at_level(logging.WARNING, logger="lmtp_factory"):
        kwargs = {"max_new_tokens": 8} | GREEDY
        output = leap().generate(prompt(), past_key_values=kind(), lmtp_stats=stats, **kwargs)
    assert stats.stock_reason == "a cache of type Unknown cannot hold trees"
    assert torch.equal(output, stock(leap(), prompt(), **kwargs))


def test_synced_gpus_fall_back(leap, caplog, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        kwargs = {"synced_gpus": True, "max_new_tokens": 6} | GREEDY
        assert_left_to_stock(leap(), "synced_gpus is on", caplog, prompt(), **kwargs)
    finally:
        torch.distributed.destroy_process_group()


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [3.0, 4.0, 5.0, 6.0],
        "factor": 2.0,
        "original_max_position_embeddings": 24,
        "rope_theta": 10000.0,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings_that_change_with_the_length_fall_back_beyond_it(leap, kind, caplog):
    """Up to the length where they do it is decoded; a tree that looks beyond is not let near it."""
    model = leap("llama", rope_parameters=ROPES[kind], max_position_embeddings=24 if kind == "dynamic" else 48)
    reason = "generation may pass the length at which this model's rotary embedding changes"
    with oracle(stock(model, prompt(), max_new_tokens=15, **GREEDY)):
        assert_as_stock(model, prompt(), max_new_tokens=15, **GREEDY)
    assert_left_to_stock(model, reason, caplog, prompt(), max_new_tokens=16, **GREEDY)
    caplog.clear()
    embedded = model.get_input_embeddings()(prompt()).detach()
    assert_left_to_stock(model, reason, caplog, inputs_embeds=embedded, max_new_tokens=16, **GREEDY)
    caplog.clear()
    late = torch.arange(9)[None] + 10
    assert_left_to_stock(model, reason, caplog, prompt(), position_ids=late, max_new_tokens=6, **GREEDY)


def test_reasons_that_would_take_another_machine_or_model(leap):
    """What would take another machine or another model to run, by the words alone."""
    model = leap()
    config = SimpleNamespace(
        prefill_chunk_size=None, output_attentions=False, output_hidden_states=False, max_length=20, output_scores=False,
        output_logits=False, return_dict_in_generate=False,
    )  # fmt: skip

    def reason(text_config=None, **kwargs):
        stand_in = SimpleNamespace(
            config=copy.deepcopy(model.config), training=False, _takes_trees={"sdpa": True}, leap_heads=model.leap_heads
        )
        for name, value in (text_config or {}).items():
            setattr(stand_in.config, name, value)
        inputs = {"use_cache": True, CACHE: DynamicCache(), "position_ids": torch.arange(9)[None]} | kwargs
        return unsupported_reason(stand_in, prompt(), [], [], config, False, inputs)

    assert reason() is None
    assert reason({"_attn_implementation_internal": "flash_attention_2"}) == (
        "attention flash_attention_2 takes no tree mask, load with attn_implementation sdpa (flash_attn: sdpa)"
    )
    assert reason({"layer_types": ["linear_attention", "full_attention"]}) == (
        "layers of type linear_attention cannot go back"
    )
    assert reason({"layer_types": ["sliding_attention", "full_attention"]}) is None
    assert reason({"num_kv_shared_layers": 1}) == "layers share keys and values"
    assert reason(position_ids=None) == "the model takes no position_ids"
    assert reason(**{CACHE: None}) == "use_cache is off"


@pytest.mark.parametrize("before", [True, False], ids=["after a call in eval mode", "at once"])
def test_gradient_checkpointing_in_train_mode(leap, before, caplog):
    """Layers then drop the cache that they are given; stock generates, in its way."""
    model = copy.deepcopy(leap())
    model.__dict__.pop("_takes_trees", None)
    if before:
        assert_as_stock(model, prompt(), max_new_tokens=4, **GREEDY)
    model.gradient_checkpointing_enable()
    assert_as_stock(model, prompt(), max_new_tokens=4, **GREEDY)
    model.train()
    reason = "gradient checkpointing in train mode keeps no cache"
    assert_left_to_stock(model, reason, caplog, prompt(), max_new_tokens=6, **GREEDY)
    model.gradient_checkpointing_disable()
    assert_as_stock(model, prompt(), max_new_tokens=4, **GREEDY)
