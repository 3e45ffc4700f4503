"""Exports: tensor for tensor what PEFT itself merges, loadable without us."""

import subprocess
import sys

import pytest
import torch
from helpers import llamafactory_runs as runs
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPError, load_model
from lmtp_factory.modeling.checkpoint import load_heads


@pytest.fixture(scope="module")
def adapter_with_lm_head(llama, data, stage1, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "adapter"
    runs.train(
        llama,
        data,
        output,
        stage="lmtp2",
        finetuning_type="lora",
        stage1_pretrained_path=str(stage1),
        train_lm_head=True,
    )
    return output


def weights(directory):
    return load_file(directory / "model.safetensors")


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def load_without_us(directory):
    """The first logits of the exported model in a process that has no plugin."""
    program = (
        "import sys, torch, transformers\nfrom safetensors.torch import save_file\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "save_file({'logits': model(torch.arange(20, 30)[None]).logits}, sys.argv[2])\n"
        "assert not any(name.startswith('lmtp_factory.m') for name in sys.modules)\n"
    )
    target = directory / "logits.safetensors"
    environment = {"LMTP_FACTORY_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", program, str(directory), str(target)], check=True, env=environment)
    return load_file(target)["logits"]


def test_ntp_export_is_peft_s_own_merge(llama, adapter, tmp_path):
    runs.export(model_name_or_path=llama, adapter_name_or_path=adapter, export_dir=tmp_path / "ours")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    assert_equal(weights(tmp_path / "ours"), weights(tmp_path / "theirs"))
    assert not (tmp_path / "ours" / "lmtp").exists()
    logits = merged(torch.arange(20, 30)[None]).logits
    torch.testing.assert_close(load_without_us(tmp_path / "ours"), logits)


def test_ntp_export_after_stage_one_is_the_base(llama, stage1, tmp_path):
    runs.export(model_name_or_path=llama, stage1_pretrained_path=stage1, export_dir=tmp_path)
    assert_equal(weights(tmp_path), weights(llama))
    assert not (tmp_path / "lmtp").exists()


def test_heads_export_is_the_ntp_export_and_the_heads(llama, adapter, tmp_path):
    runs.export(model_name_or_path=llama, adapter_name_or_path=adapter, export_dir=tmp_path / "ntp")
    runs.export(
        model_name_or_path=llama, adapter_name_or_path=adapter, export_dir=tmp_path / "heads", lmtp_export="heads"
    )
    assert_equal(weights(tmp_path / "heads"), weights(tmp_path / "ntp"))
    assert (tmp_path / "heads" / "config.json").read_text() == (tmp_path / "ntp" / "config.json").read_text()
    assert_equal(load_heads(tmp_path / "heads").state_dict(), load_heads(adapter).state_dict())
    assert load_model(tmp_path / "heads").leap_heads.config.offsets == (1, 3, 5, 7)
    plain, kept = ({path.name for path in (tmp_path / kind).iterdir()} for kind in ("ntp", "heads"))
    assert kept == plain | {"lmtp"}


@pytest.mark.parametrize("kept", ["ntp", "heads"])
def test_export_of_an_export_with_heads(kept, llama, stage1, tmp_path):
    """Base and stage-1 heads, without any adapter, exported together; then exported again from there."""
    runs.export(
        model_name_or_path=llama, stage1_pretrained_path=stage1, export_dir=tmp_path / "first", lmtp_export="heads"
    )
    runs.export(model_name_or_path=tmp_path / "first", export_dir=tmp_path / "again", lmtp_export=kept)
    assert_equal(weights(tmp_path / "again"), weights(llama))
    assert (tmp_path / "again" / "lmtp").exists() == (kept == "heads")


def test_a_tuned_lm_head_survives_the_export_of_a_tied_model(llama, adapter_with_lm_head, tmp_path):
    runs.export(model_name_or_path=llama, adapter_name_or_path=adapter_with_lm_head, export_dir=tmp_path)
    saved = load_file(adapter_with_lm_head / "adapter_model.safetensors")
    tuned = next(tensor for name, tensor in saved.items() if "lm_head" in name)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, tuned)
    assert not torch.equal(tuned, weights(llama)["model.embed_tokens.weight"])


def test_full_tuning_exports_too(llama, data, stage1, tmp_path):
    runs.train(llama, data, tmp_path / "full", stage="lmtp2", stage1_pretrained_path=str(stage1))
    runs.export(model_name_or_path=tmp_path / "full", export_dir=tmp_path / "heads", lmtp_export="heads")
    assert_equal(weights(tmp_path / "heads"), weights(tmp_path / "full"))
    assert_equal(load_heads(tmp_path / "heads").state_dict(), load_heads(tmp_path / "full").state_dict())


def test_a_converted_pissa_adapter_keeps_the_heads(llama, data, stage1, tmp_path, monkeypatch):
    """PiSSA trains beside what is left of the weights; ``pissa_converted/`` is the adapter for the weights as they were."""
    from lmtp_factory.plugin.training import trainer

    trainers, init = [], trainer.LeapTrainer.__init__
    monkeypatch.setattr(
        trainer.LeapTrainer, "__init__", lambda self, *args, **kw: trainers.append(self) or init(self, *args, **kw)
    )
    run = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(stage1), "learning_rate": 1e-3}
    runs.train(llama, data, tmp_path / "run", pissa_init=True, pissa_convert=True, **run)
    converted = tmp_path / "run" / "pissa_converted"
    assert_equal(load_heads(converted).state_dict(), load_heads(tmp_path / "run").state_dict())
    runs.export(
        model_name_or_path=llama, adapter_name_or_path=converted, export_dir=tmp_path / "out", lmtp_export="heads"
    )
    exported, trained, tokens = load_model(tmp_path / "out"), trainers[0].model.eval(), torch.arange(20, 30)[None]
    assert_equal(exported.leap_heads.state_dict(), load_heads(tmp_path / "run").state_dict())
    torch.testing.assert_close(exported(tokens).logits, trained(tokens).logits, rtol=1e-4, atol=1e-5)


def test_heads_that_are_not_there_are_refused(llama, tmp_path):
    with pytest.raises(LMTPError, match="lmtp_export: heads asks for leap heads"):
        runs.export(model_name_or_path=llama, export_dir=tmp_path / "out", lmtp_export="heads")
    assert not (tmp_path / "out").exists()


def test_old_heads_in_the_target_are_refused(llama, stage1, tmp_path):
    runs.export(model_name_or_path=llama, stage1_pretrained_path=stage1, export_dir=tmp_path, lmtp_export="heads")
    with pytest.raises(LMTPError, match="already holds leap heads"):
        runs.export(model_name_or_path=llama, export_dir=tmp_path)


def test_the_cli_itself(llama, adapter, tmp_path):
    args = {"model_name_or_path": str(llama), "adapter_name_or_path": str(adapter), "template": "qwen",
            "export_dir": str(tmp_path / "out"), "lmtp_export": "heads"}  # fmt: skip
    result = runs.cli("export", runs.write_yaml(tmp_path / "merge.yaml", args))
    assert f"Exporting with the leap heads of {adapter}/lmtp" in result.stdout + result.stderr
    assert load_model(tmp_path / "out").leap_heads.config.num_heads == 3
