"""The dtype that the backbone of a stage computes in."""

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory.plugin.training.attach import cast_backbone


def arguments(dtype: torch.dtype, upcast_layernorm: bool = False) -> SimpleNamespace:
    return SimpleNamespace(compute_dtype=dtype, upcast_layernorm=upcast_layernorm)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["saved in fp32", "saved in bf16"])
def saved(request, tmp_path):
    path = tiny_models.save_llama(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(path, dtype=request.param).save_pretrained(path)
    return path


def far_states(model) -> torch.Tensor:
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        return model.base_model(ids, position_ids=torch.arange(1000, 1040)[None]).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_frozen_backbone_computes_as_one_loaded_in_its_dtype(saved, dtype):
    """Where it decodes, the model is loaded in the dtype; its rotary frequencies are in fp32 then."""
    model, loaded = (AutoModelForCausalLM.from_pretrained(saved, dtype=d).eval() for d in ("auto", dtype))
    cast_backbone(model, arguments(dtype), frozen=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(far_states(model), far_states(loaded))


def test_what_is_kept_in_fp32_stays(saved):
    model = AutoModelForCausalLM.from_pretrained(saved).float()
    model._keep_in_fp32_modules_strict, model._keep_in_fp32_modules = {"q_proj"}, {"k_proj"}
    cast_backbone(model, arguments(torch.bfloat16, upcast_layernorm=True), frozen=True)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.dtype == layer.input_layernorm.weight.dtype == torch.float32
    assert layer.self_attn.k_proj.weight.dtype == torch.bfloat16  # for fp16 only


def test_a_trained_backbone_is_cast_to_fp32_alone(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    cast_backbone(model, arguments(torch.bfloat16), frozen=False)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == before
    cast_backbone(model, arguments(torch.float32), frozen=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
