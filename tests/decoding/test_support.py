"""What look-back decoding leaves to stock ``generate``, with a line in the log that says why."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.decoding import (
    GREEDY,
    OTHER_SEARCH,
    assert_as_stock,
    assert_left_to_stock,
    decoded,
    enlarge_weights,
    oracle,
    padded,
    prompt,
    stock,
)
from transformers import (
    DynamicCache,
    LogitsProcessor,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StoppingCriteria,
)
from transformers.generation.logits_process import (
    TopKLogitsWarper,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lmtp_factory import LMTPError, attach_heads
from lmtp_factory.decoding import support
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.support import unsupported_reason
from lmtp_factory.decoding.tree_config import TreeConfig
from lmtp_factory.plugin.chat import ClientDisconnected


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


@pytest.mark.parametrize(
    "kwargs",
    [
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2},
        {"prefix_allowed_tokens_fn": lambda row, ids: [20 + row, 30 + row, 40 + len(ids)]},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_processors_that_index_rows_get_the_whole_batch(leap, kwargs, caplog):
    reason = "a logits processor wants the whole batch"
    assert_left_to_stock(leap(), reason, caplog, **padded([9, 5]), max_new_tokens=8, **GREEDY, **kwargs)
    assert_as_stock(leap(), prompt(), max_new_tokens=8, **GREEDY, **kwargs)


class TokenOfTheRow(LogitsProcessor):
    """Wants one token of each row, by the row's number."""

    def __call__(self, input_ids, scores):
        assert len(scores) == 2
        return scores + 1e4 * F.one_hot(torch.tensor([30, 40]) + input_ids.shape[1], scores.shape[1])


class LengthOfTheRow(StoppingCriteria):
    """Ends each row at a length of its own, by the row's number."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([12, 15]) <= input_ids.shape[1]


class FewTokens(TopKLogitsWarper):
    """A subclass may do anything."""

    def __call__(self, input_ids, scores):
        assert len(scores) == 2
        return super().__call__(input_ids, scores)


def nothing(input_ids, scores):
    return scores


@pytest.mark.parametrize(
    "name, argument, made",
    [
        ("TokenOfTheRow", "logits_processor", TokenOfTheRow()),
        ("LengthOfTheRow", "stopping_criteria", LengthOfTheRow()),
        ("FewTokens", "logits_processor", FewTokens(4)),
        ("nothing", "logits_processor", nothing),
    ],
    ids=["processor", "criterion", "subclass", "function"],
)
def test_processors_and_criteria_of_others_get_the_whole_batch(leap, name, argument, made, caplog):
    reason = f"{name} is no class of transformers and may want the whole batch"
    kwargs = {"max_new_tokens": 8, "eos_token_id": 355, argument: [made]} | GREEDY
    output = assert_left_to_stock(leap(), reason, caplog, **padded([9, 5]), **kwargs)
    if name == "TokenOfTheRow":
        assert output[:, 9].tolist() == [39, 49]
    if name == "LengthOfTheRow":
        assert output.shape[1] == 15 and output[0, 12:].tolist() == [0] * 3


def test_custom_processors_of_a_single_row_do_not_fall_back(leap):
    kwargs = {"logits_processor": [nothing], "stopping_criteria": [AtLength()]}
    output, _ = assert_as_stock(leap(), prompt(), max_new_tokens=20, **kwargs, **GREEDY)
    assert output.shape[1] == 15


def test_the_chat_s_own_criterion_does_not_fall_back(leap):
    assert_as_stock(
        leap(), **padded([9, 5]), max_new_tokens=8, eos_token_id=355, stopping_criteria=[ClientDisconnected()], **GREEDY
    )


class AtLength(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 15)


def test_rows_that_end_early_without_a_padding_token_fall_back(leap, caplog):
    reason = "rows of a batch end by a criterion of their own and there is no end-of-sequence token to pad with"
    kwargs = {"stopping_criteria": [AtLength()], "max_new_tokens": 9} | GREEDY
    assert_left_to_stock(leap(), reason, caplog, **padded([9, 5]), **kwargs)
    caplog.clear()
    assert_left_to_stock(leap(), reason, caplog, **padded([9, 5]), max_time=60.0, max_new_tokens=9, **GREEDY)


@pytest.mark.parametrize("name", ["output_scores", "output_logits"])
def test_scores_of_rows_that_end_before_others_fall_back(leap, name, caplog):
    """Stock goes on scoring their padding."""
    model, inputs, kwargs = leap(), padded([9, 5]), {name: True, "return_dict_in_generate": True} | GREEDY
    end = int(stock(model, **inputs, max_new_tokens=9, **GREEDY)[0, 13])
    reason = "scores are wanted of rows that may end before others"
    assert_left_to_stock(model, reason, caplog, **inputs, max_new_tokens=9, eos_token_id=end, **kwargs)
    decoded(model, **inputs, max_new_tokens=9, **kwargs)  # all rows have nine
    decoded(model, prompt(), max_new_tokens=9, eos_token_id=end, **kwargs)


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
        stand_in = SimpleNamespace(config=copy.deepcopy(model.config), training=False, _takes_trees={"sdpa": True})
        for name, value in (text_config or {}).items():
            setattr(stand_in.config, name, value)
        inputs = {"use_cache": True, "past_key_values": DynamicCache(), "position_ids": torch.arange(9)[None]} | kwargs
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
    assert reason(past_key_values=None) == "use_cache is off"


def small(kind, config_kind, **config):
    torch.manual_seed(0)
    config = {"vocab_size": 400, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | config
    model = kind(config_kind(**config)).eval()
    enlarge_weights(model)
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
def test_models_whose_forward_takes_no_tree_fall_back(build, caplog):
    """They are found out by trying."""
    reason = "a tree-masked forward does not match sequential forwards"
    assert_left_to_stock(build(), reason, caplog, prompt(), max_new_tokens=8, **GREEDY)
    caplog.clear()
    assert_left_to_stock(build(), reason, caplog, **padded([9, 4]), max_new_tokens=8, **GREEDY)


def test_a_trial_under_dropout_is_not_remembered_in_eval_mode(leap):
    model = copy.deepcopy(leap("llama", attention_dropout=0.9))
    model.__dict__.pop("_takes_trees", None)
    model.train()
    stats = DecodeStats()
    model.generate(prompt(), max_new_tokens=4, lmtp_stats=stats, **GREEDY)
    assert stats.stock_reason == "a tree-masked forward does not match sequential forwards"
    model.eval()
    assert_as_stock(model, prompt(), max_new_tokens=8, **GREEDY)


def test_dropout_is_left_to_stock_with_its_random_numbers(leap):
    """Whatever was found out in eval mode; trying takes no random numbers from those who sample."""
    model, seen = copy.deepcopy(leap("llama", attention_dropout=0.9)), []
    assert_as_stock(model, prompt(), max_new_tokens=4, **GREEDY)
    model.train()
    for decode in ("off", "auto"):
        torch.manual_seed(0)
        stats = DecodeStats()
        output = model.generate(prompt(), max_new_tokens=12, do_sample=True, lmtp_decode=decode, lmtp_stats=stats)
        seen.append((output.tolist(), float(torch.rand(()))))
    assert seen[0] == seen[1]
    assert stats.stock_reason == "a tree-masked forward does not match sequential forwards"


def test_an_error_during_the_trial_is_not_remembered(leap):
    """A device may have been out of memory."""
    model, stats = copy.deepcopy(leap()), DecodeStats()
    model.__dict__.pop("_takes_trees", None)

    def fail(module, args, kwargs):
        if kwargs["input_ids"].shape[1] < 9:
            raise torch.OutOfMemoryError("try again later")

    hook = model.base_model.register_forward_pre_hook(fail, with_kwargs=True)
    model.generate(prompt(), max_new_tokens=1, lmtp_stats=stats, **GREEDY)
    assert stats.stock_reason == "a tree-masked forward does not match sequential forwards"
    hook.remove()
    assert_as_stock(model, prompt(), max_new_tokens=8, **GREEDY)


def test_every_attention_implementation_gets_a_trial_of_its_own(leap, monkeypatch):
    """One that ignores its mask says nothing about others, nor others about it."""
    model, stats = copy.deepcopy(leap()), DecodeStats()
    model.__dict__.pop("_takes_trees", None)
    right = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def careless(module, query, key, value, mask, **kwargs):
        return right(module, query, key, value, None if mask is None or mask.dtype == torch.bool else mask, **kwargs)

    for first in ("eager", "sdpa"):
        model.__dict__.pop("_takes_trees", None)
        for attention in (first, "eager" if first == "sdpa" else "sdpa"):
            model.set_attn_implementation(attention)
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", careless)
            model.generate(prompt(), max_new_tokens=8, lmtp_stats=stats, **GREEDY)
            monkeypatch.undo()
            assert stats.strategy == ("off" if attention == "sdpa" else "backward")


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
    message = r"static tree takes candidates down to rank 9, but the vocabulary has 9 tokens \(ranks 0 to 8\)"
    with pytest.raises(LMTPError, match=message):
        model.generate(**inputs, **kwargs, lmtp_tree=beyond)
    assert torch.equal(
        model.generate(**inputs, **kwargs, lmtp_decode="off", lmtp_tree=beyond), stock(model, **inputs, **kwargs)
    )
