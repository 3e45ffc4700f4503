"""Greedy is greedy, whatever generation_config.json asks for."""

import copy

import pytest
import torch
from helpers import tiny_models
from transformers import GenerationConfig

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.tree_config import TreeConfig
from lmtp_factory.distill.engine import Request, Sampling
from lmtp_factory.distill.hf_engine import HFEngine
from lmtp_factory.distill.plain_generation import plain_config, plain_generation
from lmtp_factory.evaluation.self_generated import generate_greedy


PROMPT, LENGTH = [30, 40, 50], 12


@pytest.fixture
def plain():
    return tiny_models.llama(initializer_range=0.3)


@pytest.fixture
def answer(plain):
    """The model's own greedy tokens, without `generate`."""
    ids = list(PROMPT)
    for _ in range(LENGTH):
        with torch.inference_mode():
            ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def wishes(answer):
    """Generation configs, each of which changes the answer."""
    return {
        "beams": {"num_beams": 2, "no_repeat_ngram_size": 2},
        "ngrams": {"no_repeat_ngram_size": 1},
        "suppressed": {"suppress_tokens": answer[:1]},
        "bad words": {"bad_words_ids": [answer[:1]]},
        "first": {"begin_suppress_tokens": answer[:1]},
        "last": {"forced_eos_token_id": 7},
        "penalty": {"repetition_penalty": 9.0},
        "sampling": {"do_sample": True, "temperature": 9.0},
        "end": {"eos_token_id": answer[3], "min_length": 10},
    }


@pytest.fixture(params=["beams", "ngrams", "suppressed", "bad words", "first", "last", "penalty", "sampling", "end"])
def asking(request, plain, answer):
    """The model with such a config, and the answer that it should give nevertheless."""
    tokens = {name: getattr(plain.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokens["eos_token_id"] = None
    plain.generation_config = GenerationConfig(**tokens | wishes(answer)[request.param])
    return plain, answer[:4] if request.param == "end" else answer


def test_answers_of_every_arm_are_the_models_own(asking):
    model, expected = asking
    model, saved = attach_heads(model, LMTPConfig(num_heads=1)), copy.deepcopy(model.generation_config)
    assert generate_greedy(model, PROMPT, LENGTH, lmtp_decode="off")[0, len(PROMPT) :].tolist() == expected
    stats = DecodeStats()
    output = generate_greedy(model, PROMPT, LENGTH, lmtp_tree=TreeConfig("chain", 2, always=True), lmtp_stats=stats)
    assert output[0, len(PROMPT) :].tolist() == expected
    assert stats.stock_reason is None and stats.steps > 0  # not beam search, for instance
    assert model.generation_config == saved


def test_distilled_answers_are_the_models_own(asking, tmp_path):
    model, expected = asking
    end = model.generation_config.eos_token_id
    model.save_pretrained(tmp_path)
    rows = []
    sampling = Sampling(LENGTH, stop_ids=() if end is None else (end,))
    HFEngine(str(tmp_path)).generate([Request(0, tuple(PROMPT))], sampling, done=(), on_finished=rows.extend)
    assert list(rows[0].output_ids) == expected


def test_token_ids_stay_and_options_overrule_them():
    saved = GenerationConfig(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=4, num_beams=2, max_length=7)
    config = plain_config(saved)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 3], 4)
    assert config == GenerationConfig(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=4, do_sample=False)
    assert plain_config(saved, eos_token_id=5, do_sample=True).eos_token_id == 5


def test_a_failure_puts_the_config_back(plain):
    saved = plain.generation_config
    with pytest.raises(KeyError), plain_generation(plain):
        assert plain.generation_config is not saved
        raise KeyError
    assert plain.generation_config is saved
