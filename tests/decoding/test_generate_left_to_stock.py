"""What look-back decoding leaves to stock ``generate``, with a line in the log that says why."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DynamicCache,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StoppingCriteria,
)
from trials import (
    GREEDY,
    OTHER_SEARCH,
    check,
    decoded,
    left_to_stock,
    oracle,
    padded,
    prompt,
    stir,
    stock,
)

from lmtp_factory import attach_heads
from lmtp_factory.decoding import generate
from lmtp_factory.decoding.obstacles import obstacle
from lmtp_factory.decoding.stats import DecodeStats


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
def test_calls_that_need_every_forward(leap, reason, kwargs, caplog):
    output = left_to_stock(leap("llama", "eager"), reason, caplog, prompt(), max_new_tokens=6, **GREEDY, **kwargs)
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
def test_other_ways_to_search_are_none_of_our_business(leap, kwargs, caplog):
    left_to_stock(leap(), OTHER_SEARCH, caplog, prompt(), max_new_tokens=8, **GREEDY, **kwargs)


def test_beams_that_sample(leap):
    outputs = []
    for decode in ("off", "auto"):
        torch.manual_seed(0)
        kwargs = {"num_beams": 2, "do_sample": True, "max_new_tokens": 8}
        outputs.append(leap().generate(prompt(), lmtp_decode=decode, **kwargs))
    assert torch.equal(*outputs)


def test_with_an_assistant_and_as_one(leap, caplog):
    """The assistant crops the cache that we hand back."""
    model = leap()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = stock(other, prompt(), max_new_tokens=16, **GREEDY)
    left_to_stock(
        other, OTHER_SEARCH, caplog, prompt(), expected=expected, assistant_model=model, max_new_tokens=16, **GREEDY
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2},
        {"prefix_allowed_tokens_fn": lambda row, ids: [20 + row, 30 + row, 40 + len(ids)]},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_processors_that_know_rows_by_number(leap, kwargs, caplog):
    reason = "a logits processor wants the whole batch"
    left_to_stock(leap(), reason, caplog, **padded([9, 5]), max_new_tokens=8, **GREEDY, **kwargs)
    check(leap(), prompt(), max_new_tokens=8, **GREEDY, **kwargs)


class AtLength(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 15)


def test_rows_that_nothing_pads(leap, caplog):
    reason = "rows of a batch end by a criterion of their own and there is no end-of-sequence token to pad with"
    kwargs = {"stopping_criteria": [AtLength()], "max_new_tokens": 9} | GREEDY
    left_to_stock(leap(), reason, caplog, **padded([9, 5]), **kwargs)
    caplog.clear()
    left_to_stock(leap(), reason, caplog, **padded([9, 5]), max_time=60.0, max_new_tokens=9, **GREEDY)


@pytest.mark.parametrize("name", ["output_scores", "output_logits"])
def test_scores_of_rows_that_end_before_others(leap, name, caplog):
    """Stock goes on scoring their padding."""
    model, inputs, kwargs = leap(), padded([9, 5]), {name: True, "return_dict_in_generate": True} | GREEDY
    end = int(stock(model, **inputs, max_new_tokens=9, **GREEDY)[0, 13])
    reason = "scores are wanted of rows that may end before others"
    left_to_stock(model, reason, caplog, **inputs, max_new_tokens=9, eos_token_id=end, **kwargs)
    decoded(model, **inputs, max_new_tokens=9, **kwargs)  # all rows have nine
    decoded(model, prompt(), max_new_tokens=9, eos_token_id=end, **kwargs)


def test_caches_that_cannot_go_back(leap, caplog):
    kind = type("Unknown", (DynamicCache,), {})
    generate._say_once.cache_clear()
    stats = DecodeStats()
    with caplog.at_level(logging.WARNING, logger="lmtp_factory"):
        kwargs = {"max_new_tokens": 8} | GREEDY
        output = leap().generate(prompt(), past_key_values=kind(), lmtp_stats=stats, **kwargs)
    assert stats.strategy == "off: a cache of type Unknown cannot hold trees"
    assert torch.equal(output, stock(leap(), prompt(), **kwargs))


def test_gpus_in_step(leap, caplog, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        kwargs = {"synced_gpus": True, "max_new_tokens": 6} | GREEDY
        left_to_stock(leap(), "synced_gpus is on", caplog, prompt(), **kwargs)
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
def test_rotary_embeddings_that_change_with_the_length(leap, kind, caplog):
    """Up to the length where they do it is decoded; a tree that looks beyond is not let near it."""
    model = leap("llama", rope_parameters=ROPES[kind], max_position_embeddings=24 if kind == "dynamic" else 48)
    reason = "generation may pass the length at which this model's rotary embedding changes"
    with oracle(stock(model, prompt(), max_new_tokens=15, **GREEDY)):
        check(model, prompt(), max_new_tokens=15, **GREEDY)
    left_to_stock(model, reason, caplog, prompt(), max_new_tokens=16, **GREEDY)
    caplog.clear()
    embedded = model.get_input_embeddings()(prompt()).detach()
    left_to_stock(model, reason, caplog, inputs_embeds=embedded, max_new_tokens=16, **GREEDY)
    caplog.clear()
    late = torch.arange(9)[None] + 10
    left_to_stock(model, reason, caplog, prompt(), position_ids=late, max_new_tokens=6, **GREEDY)


def test_models_that_cannot_be_sped_up(leap):
    """What would take another machine or another model to run, by the words alone."""
    model = leap()
    config = SimpleNamespace(
        prefill_chunk_size=None, output_attentions=False, output_hidden_states=False, max_length=20, output_scores=False,
        output_logits=False, return_dict_in_generate=False,
    )  # fmt: skip

    def reason(text_config=None, **kwargs):
        stand_in = SimpleNamespace(config=copy.deepcopy(model.config))
        for name, value in (text_config or {}).items():
            setattr(stand_in.config, name, value)
        inputs = {"use_cache": True, "past_key_values": DynamicCache(), "position_ids": torch.arange(9)[None]} | kwargs
        return obstacle(stand_in, prompt(), [], [], config, inputs)

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
    assert reason(past_key_values=None) == "use_cache is off"


def small(kind, config_kind, **config):
    torch.manual_seed(0)
    config = {"vocab_size": 400, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | config
    model = kind(config_kind(**config)).eval()
    stir(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return attach_heads(model)


@pytest.mark.parametrize(
    "build",
    [
        # No cache, and a mask of its own.
        lambda: small(OpenAIGPTLMHeadModel, OpenAIGPTConfig, n_embd=32, n_layer=2, n_head=4),
    ],
    ids=["openai-gpt"],
)
def test_models_whose_forward_takes_no_trees(build, caplog):
    """They are found out by trying."""
    reason = "a forward over a tree is not what forwards over its branches are"
    left_to_stock(build(), reason, caplog, prompt(), max_new_tokens=8, **GREEDY)
    caplog.clear()
    left_to_stock(build(), reason, caplog, **padded([9, 4]), max_new_tokens=8, **GREEDY)


def test_dropout_does_not_spoil_the_trial(leap):
    model = copy.deepcopy(leap("llama", attention_dropout=0.9))
    model.__dict__.pop("_takes_trees", None)
    model.train()
    stats = DecodeStats()
    model.generate(prompt(), max_new_tokens=4, lmtp_stats=stats, **GREEDY)
    assert stats.strategy.startswith("off: a forward over a tree")
    model.eval()
    check(model, prompt(), max_new_tokens=8, **GREEDY)
