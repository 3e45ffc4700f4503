"""load_model: exports, adapters and stage-1 outputs, each with the base that belongs to it."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import tiny_data, tiny_models
from helpers.tiny_models import randomise_heads
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

from lmtp_factory import LeapHeads, LMTPConfig, LMTPError, attach_heads, load_model
from lmtp_factory.modeling import heads_of
from lmtp_factory.modeling.checkpoint import save_heads


def test_save_and_load_an_export_with_heads(tmp_path):
    model = attach_heads(
        tiny_models.load(tiny_models.save_llama(tmp_path / "base")), LMTPConfig(offsets=(2, 3, 6)), stage=2
    )
    randomise_heads(model)
    model.save_pretrained(tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    ids = tiny_data.batch()["input_ids"]
    assert loaded.leap_heads.config.offsets == (1, 2, 3, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    for name, tensor in model.leap_heads.state_dict().items():
        assert torch.equal(loaded.leap_heads.state_dict()[name], tensor), name
    assert isinstance(AutoModel.from_pretrained(tmp_path / "out" / "lmtp"), LeapHeads)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    # What tools that know nothing of heads see: exactly the base's tensors.
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(
        tiny_models.load(tmp_path / "base").state_dict()
    )


def test_plain_transformers_reads_a_heads_export(tmp_path):
    model = attach_heads(tiny_models.load(tiny_models.save_llama(tmp_path / "base")), stage=2)
    model.save_pretrained(tmp_path / "out")
    program = (
        "import sys, transformers; m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "assert 'lmtp_factory' not in sys.modules and type(m).__mro__[0].__module__.startswith('transformers')"
    )
    environment = {"LMTP_FACTORY_DISABLE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=True, env=environment)


def test_stage_one_saves_heads_only(tmp_path):
    base = tiny_models.save_llama(tmp_path / "base")
    model = attach_heads(tiny_models.load(base), LMTPConfig(base_model=str(base)), stage=1)
    randomise_heads(model)
    model.save_pretrained(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["lmtp"]
    assert sorted(p.name for p in (tmp_path / "out" / "lmtp").iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_model(tmp_path / "out")  # its config names the base
    assert torch.equal(loaded.leap_heads.heads[2].unembed.weight, model.leap_heads.heads[2].unembed.weight)


def test_heads_beside_a_peft_adapter(tmp_path):
    base = tiny_models.save_llama(tmp_path / "base")
    model = get_peft_model(
        tiny_models.load(base), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    attach_heads(model, stage=2)
    outputs = model(**tiny_data.batch())
    outputs.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n or "leap_heads" in n)
    model.save_pretrained(tmp_path / "adapter")
    assert not any("leap" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    save_heads(heads_of(model), tmp_path / "adapter" / "lmtp")
    loaded = load_model(tmp_path / "adapter")
    assert isinstance(loaded, PeftModel)
    ids = tiny_data.batch()["input_ids"]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_heads_export_whose_tokenizer_was_changed_is_refused(tmp_path):
    base = tiny_models.save_llama(tmp_path / "base")
    model = attach_heads(
        tiny_models.load(base), LMTPConfig(base_model="base", tokenizer_fingerprint="0123456789abcdef"), stage=1
    )
    model.leap_heads.config.base_model = str(base)
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(LMTPError, match=r"tokenizer 0123456789abcdef\), not to .*base \(tokenizer"):
        load_model(tmp_path / "out")
