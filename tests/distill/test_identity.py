"""A journal belongs to one model: another one in the same directory, or other end tokens, are refused."""

import json
import shutil

import pytest
import torch
from helpers import tiny_models
from helpers.scripted_engine import ScriptedEngine
from transformers import AutoModelForCausalLM

from lmtp_factory.distill.identity import weight_facts
from lmtp_factory.distill.pipeline import Settings, distill
from lmtp_factory.distill.prompts import build_prompt
from lmtp_factory.errors import LMTPError


@pytest.fixture
def model(distill_model, tmp_path):
    shutil.copytree(distill_model, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    return tmp_path / "model"


@pytest.fixture
def run(model, tmp_path, tokenizer):
    """Distill two prompts; returns how many the engine was asked."""

    def run(prompts=True):
        engine = ScriptedEngine(tokenizer, lambda number: f"What{number} is{number} the{number} answer?<|im_end|>")
        texts = ["tell me", "tell me more"]
        settings = Settings(
            model=str(model),
            name="d",
            output_dir=tmp_path / "out",
            prompts=[build_prompt(text) for text in texts] if prompts else None,
            num_prompts=2,
        )
        distill(settings, tokenizer, lambda: engine)
        return len(engine.asked)

    return run


def train_again(model):
    """Other weights of the same size in the same directory."""
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        trained.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    trained.save_pretrained(model)
    (model / "generation_config.json").unlink()


@pytest.mark.parametrize("prompts", [True, False], ids=["given", "self-written"])
def test_a_model_that_was_trained_again_is_another_model(run, model, prompts):
    assert run(prompts) > 0 and run(prompts) == 0
    train_again(model)
    with pytest.raises(
        LMTPError, match=r"was begun with model\.safetensors = .*: use the same settings, choose another"
    ):
        run(prompts)


def test_other_end_tokens_are_refused(run, model):
    run()
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 40]}')
    with pytest.raises(LMTPError, match=r"was begun with stop_ids = \[2\], now it is \[2, 40\]"):
        run()


def test_a_journal_of_an_earlier_version_is_refused(run, tmp_path):
    run()
    journal = tmp_path / "out" / "d.raw.jsonl"
    header, *rows = journal.read_text().splitlines(keepends=True)
    settings = json.loads(header)["lmtp_distill"]
    old = {key: settings[key] for key in settings if key not in ("stop_ids", "configuration", "model.safetensors")}
    journal.write_text(json.dumps({"lmtp_distill": old}) + "\n" + "".join(rows))
    with pytest.raises(LMTPError, match=r"was begun with stop_ids = None, now it is \[2\]"):
        run()


def test_of_an_adapter_both_weights_count(tmp_path):
    base = tiny_models.save_llama(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (adapter / "adapter_model.safetensors").write_bytes(b"some weights")
    facts = weight_facts(Settings(str(adapter), "d", tmp_path))
    assert set(facts) == {"configuration", "model.safetensors", "adapter_model.safetensors"}
    (adapter / "adapter_model.safetensors").write_bytes(b"same weights")
    assert weight_facts(Settings(str(adapter), "d", tmp_path)) != facts


def test_a_server_s_weights_are_not_known(tmp_path):
    assert weight_facts(Settings("nowhere", "d", tmp_path, engine="server")) == {}
    with pytest.raises(LMTPError, match="No causal language model can be loaded from nowhere"):
        weight_facts(Settings("nowhere", "d", tmp_path))
