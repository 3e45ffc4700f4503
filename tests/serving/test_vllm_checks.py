"""What leap heads refuse in vLLM, on stand-ins of its configuration and models."""

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_models
from helpers.serving import Target
from torch import nn

from lmtp_factory import LMTPConfig, LMTPError
from lmtp_factory.serving.vllm_checks import (
    check_heads,
    check_settings,
    check_version,
    lm_head_of,
    longest_draft,
    prove_final_states,
)


def settings(pipeline=1, tensor=1, lora=None, sleep=False):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline, tensor_parallel_size=tensor),
        lora_config=lora,
        model_config=SimpleNamespace(enable_sleep_mode=sleep),
    )


@pytest.mark.parametrize("version", [None, "0.31.9", "0.34.0", "1.32.0", "dev"])
def test_versions(version):
    with pytest.raises(LMTPError, match="not installed" if version is None else f"vLLM {version} is installed"):
        check_version(version)


def test_a_version_that_has_not_run_is_named(caplog):
    check_version("0.32.1")
    assert not caplog.records
    check_version("0.33.0")
    assert "not been run with vLLM 0.33.0" in caplog.text


def test_heads():
    heads = LMTPConfig(offsets=(2, 3, 6))
    assert longest_draft(heads) == 5
    check_heads(heads, 5)
    with pytest.raises(LMTPError, match="num_speculative_tokens is 6, but these heads reach 5"):
        check_heads(heads, 6)
    with pytest.raises(LMTPError, match="head_inputs: layers"):
        check_heads(LMTPConfig(head_inputs="layers"), 1)


@pytest.mark.parametrize(
    ("heads", "found", "words"),
    [
        ({}, settings(pipeline=2), "--pipeline-parallel-size 1"),
        ({"head_kind": "shared"}, settings(tensor=2), "cuts into 2 parts"),
        ({"head_inputs": "state_token"}, settings(lora=object()), "leave --enable-lora out"),
        ({}, settings(sleep=True), "leave --enable-sleep-mode out"),
    ],
)
def test_settings(heads, found, words):
    with pytest.raises(LMTPError, match=words):
        check_settings(LMTPConfig(**heads), found)


@pytest.mark.parametrize(
    ("heads", "found"),
    [({}, settings(tensor=2)), ({}, settings(lora=object())), ({"head_kind": "shared"}, settings())],
)
def test_settings_that_do_no_harm(heads, found):
    check_settings(LMTPConfig(**heads), found)


def test_the_lm_head_is_taken_without_padding():
    model = tiny_models.llama()
    target, size = Target(model), model.config.vocab_size
    heads = LMTPConfig(head_kind="shared", hidden_size=model.config.hidden_size, vocab_size=size)
    weight = target.lm_head.weight.detach()
    padded = nn.Linear(model.config.hidden_size, size + 7, bias=False)
    padded.weight.data[:size] = weight
    target.lm_head = padded
    assert torch.equal(lm_head_of(target, heads), weight)
    target.lm_head = nn.Linear(model.config.hidden_size, size)
    with pytest.raises(LMTPError, match="has a bias"):
        lm_head_of(target, heads)
    for other in (nn.Identity(), nn.Linear(8, size, bias=False)):
        target.lm_head = other
        with pytest.raises(LMTPError, match="no lm_head.weight of floating-point numbers"):
            lm_head_of(target, heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_states_that_are_normalised_before_the_lm_head_are_noticed(dtype, softcap):
    model = tiny_models.llama().to(dtype)
    prove_final_states(Target(model, softcap=softcap), model.config.hidden_size, softcap)
    with pytest.raises(LMTPError, match="other states than those that vLLM hands out"):
        prove_final_states(Target(model, True, softcap), model.config.hidden_size, softcap)
