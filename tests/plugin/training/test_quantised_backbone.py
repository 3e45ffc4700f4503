"""Stage 1 on a backbone that is quantised as it loads: the heads train, and belong to the model in full precision."""

import json

import pytest
import torch
from helpers import llamafactory_runs as runs
from helpers import tiny_models
from torch import nn
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, LMTPError, load_model
from lmtp_factory.modeling import load_heads
from lmtp_factory.modeling.attach import fresh_heads


bitsandbytes = pytest.importorskip("bitsandbytes")
QUANTISED = {"quantization_bit": 4, "max_steps": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A bf16 checkpoint, as most are: what is not quantised has to be cast to the dtype that the run computes in."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    path = tiny_models.save_llama(folder, hidden_size=64, intermediate_size=128, head_dim=16)
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_heads_train_and_belong_to_the_whole_model(kind, model, data, tmp_path, trainers):
    logged = runs.step_losses(runs.train(model, data, tmp_path / "stage1", head_kind=kind, **QUANTISED))
    assert logged[-1] < logged[0]
    trained = trainers[0].model
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in trained.modules())
    assert trained.is_quantized  # hidden from the Trainer's check only
    assert trained.get_input_embeddings().weight.dtype == torch.float32

    export = tmp_path / "export"
    keys = {"stage1_pretrained_path": tmp_path / "stage1", "lmtp_export": "heads", "export_dir": export}
    runs.export(model_name_or_path=model, **keys)
    config = json.loads((export / "config.json").read_text())
    assert "quantization_config" not in config
    whole = load_model(str(export), dtype=torch.float32)
    ids = torch.tensor([[40, 41, 42, 43]])
    drafted = whole.generate(ids, max_new_tokens=8, do_sample=False, lmtp_decode="backward")
    assert torch.equal(drafted, whole.generate(ids, max_new_tokens=8, do_sample=False, lmtp_decode="off"))


def test_the_cache_belongs_to_the_quantised_backbone(model, data, tmp_path):
    run = {"hidden_cache_dir": str(tmp_path / "cache"), **QUANTISED}
    plain = runs.train(model, data, tmp_path / "plain", **QUANTISED)
    cached = runs.train(model, data, tmp_path / "cached", **run)
    assert runs.step_losses(cached) == pytest.approx(runs.step_losses(plain), rel=2e-2)  # bf16 states
    with pytest.raises(LMTPError, match="quantization = '.*4 bits"):
        runs.train(model, data, tmp_path / "other", **run | {"quantization_bit": None})
    with pytest.raises(LMTPError, match="quantised twice"):
        runs.train(model, data, tmp_path / "double", **run, double_quantization=False)


def test_a_quantised_lm_head_is_copied_in_floating_point(model):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    exact = base.get_output_embeddings().weight.detach().clone()
    quantised = bitsandbytes.nn.Linear4bit(64, len(exact), bias=False, compute_dtype=torch.float32)
    quantised.weight = bitsandbytes.nn.Params4bit(exact.clone(), requires_grad=False)
    base.set_output_embeddings(quantised.to("cpu"))
    assert quantised.weight.quant_state is not None
    heads = fresh_heads(base, LMTPConfig(num_heads=2))
    expected = bitsandbytes.functional.dequantize_4bit(quantised.weight.data, quantised.weight.quant_state)
    for head in heads.heads:
        assert torch.allclose(head.unembed.weight, expected, atol=1e-5)
    assert not torch.allclose(expected, exact, atol=1e-3)
    few = fresh_heads(base, LMTPConfig(num_heads=1, draft_vocab_size=3), draft_tokens=[1, 5, 9])
    assert torch.allclose(few.heads[0].unembed.weight, expected[[1, 5, 9]], atol=1e-5)


def test_a_bias_of_the_lm_head_is_no_part_of_its_weight(model):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    exact = base.get_output_embeddings().weight.detach().clone()

    class Packed(nn.Module):
        """An LM head whose weight has another layout, as quantised ones do."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(exact.flatten()[:, None].clone(), requires_grad=False)
            self.bias = nn.Parameter(torch.arange(len(exact)).float())

        def forward(self, hidden):
            return hidden @ self.weight.view_as(exact).t() + self.bias

    base.set_output_embeddings(Packed())
    heads = fresh_heads(base, LMTPConfig(num_heads=1))
    assert torch.allclose(heads.heads[0].unembed.weight, exact, atol=1e-3)


def test_zero3_is_refused(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("lmtp_factory.plugin.validation.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(LMTPError, match="does not run under ZeRO-3: use ZeRO-2, or leave quantization_bit out"):
        runs.train(model, data, tmp_path, **QUANTISED)


def test_other_methods_are_refused(model, data, tmp_path):
    with pytest.raises(LMTPError, match="with bitsandbytes only, not with hqq: leave quantization_method out"):
        runs.train(model, data, tmp_path, **QUANTISED, quantization_method="hqq")


def test_an_export_with_heads_is_of_the_whole_model(model, stage1, tmp_path):
    keys = {"stage1_pretrained_path": stage1, "lmtp_export": "heads", "export_dir": tmp_path / "export"}
    with pytest.raises(LMTPError, match="holds the model in full precision.*: leave quantization_bit out"):
        runs.export(model_name_or_path=model, quantization_bit=4, **keys)


def test_norms_that_upstream_casts_stay(model, data, tmp_path, trainers):
    runs.train(
        model, data, tmp_path, **QUANTISED | {"max_steps": 1, "bf16": True, "use_cpu": True, "upcast_layernorm": True}
    )
    trained = trainers[0].model
    assert trained.model.norm.weight.dtype == torch.float32
    assert trained.get_input_embeddings().weight.dtype == torch.bfloat16


def test_heads_of_a_quantised_stage_one_name_the_base(model, data, tmp_path):
    runs.train(model, data, tmp_path, **QUANTISED)
    assert load_heads(tmp_path).config.base_model == str(model)
