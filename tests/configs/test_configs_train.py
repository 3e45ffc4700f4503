"""Every file under ``configs/`` does its work: stage 1, stage 2 and export on a tiny model of that architecture."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.recipes import KINDS, MODELS, STAND_INS, check_losses, heads_in, read, steps, train_and_export, weights_in
from safetensors.torch import load_file


LOAD_EXPORTS = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
assert not {"lmtp_factory.plugin.hooks", "lmtp_factory.modeling"} & sys.modules.keys()
for path in sys.argv[1:]:
    is_image_text = type(AutoConfig.from_pretrained(path)) in AutoModelForImageTextToText._model_mapping
    auto_class = AutoModelForImageTextToText if is_image_text else AutoModelForCausalLM
    model, info = auto_class.from_pretrained(path, output_loading_info=True)
    inputs = AutoTokenizer.from_pretrained(path)("a frog leaps over", return_tensors="pt")
    logits = model.eval()(input_ids=inputs["input_ids"]).logits
    strays = [len(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    print(json.dumps([type(model).__name__, bool(torch.isfinite(logits).all()), sum(strays)]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every model's three files, run once."""
    results = {}
    for model in MODELS:
        directory = tmp_path_factory.mktemp(model)
        base = STAND_INS[model].save(directory / "base")
        results[model] = train_and_export(directory, base, *(read(kind, model) for kind in KINDS))
    return results


@pytest.mark.parametrize("model", MODELS)
def test_losses(model, trained):
    check_losses(trained[model].stage1, trained[model].stage2)
    loss, *heads = (
        steps(trained[model].stage1)[0][key] for key in ("loss", "loss_head_1", "loss_head_2", "loss_head_3")
    )
    assert loss == pytest.approx(sum(heads), rel=0.02)  # the heads' own means, whatever the accumulation
    loss, *heads = (steps(trained[model].stage2)[0][key] for key in ("loss", *(f"loss_head_{i}" for i in range(4))))
    assert loss == pytest.approx(heads[0] + read("s2", model)["head_weight"] * sum(heads[1:]), rel=0.02)


@pytest.mark.parametrize("model", MODELS)
def test_stage1_writes_heads_and_no_backbone(model, trained):
    assert weights_in(trained[model].stage1) == {"lmtp/model.safetensors", "checkpoint-2/lmtp/model.safetensors"}
    blocks = [tensor for name, tensor in heads_in(trained[model].stage1).items() if "blocks" in name]
    assert blocks and all(tensor.any() for tensor in blocks)  # they start at zero


@pytest.mark.parametrize("model", MODELS)
def test_stage2_writes_adapter_and_the_heads_it_went_on_with(model, trained):
    files = {"adapter_model.safetensors", "lmtp/model.safetensors"}
    assert weights_in(trained[model].stage2) == files | {f"checkpoint-2/{file}" for file in files}
    adapter = load_file(trained[model].stage2 / "adapter_model.safetensors")
    assert not any("leap" in name or "vision" in name for name in adapter)
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    before, after = heads_in(trained[model].stage1), heads_in(trained[model].stage2)
    assert before.keys() == after.keys()
    moved = [(after[name] - before[name]).abs().max().item() for name in before]
    assert all(0 < distance < 1e-4 for distance in moved)  # one step at a learning rate of 1e-5


@pytest.mark.parametrize("model", MODELS)
def test_export_is_the_tuned_base_without_heads(model, trained):
    export, base = trained[model].export, load_file(trained[model].base / "model.safetensors")
    assert not (export / "lmtp").exists()
    merged = load_file(export / "model.safetensors")
    assert merged.keys() == base.keys()
    assert all(merged[name].shape == base[name].shape for name in base)
    tuned = [name for name in base if not torch.equal(merged[name].float(), base[name])]
    assert tuned and all("_proj" in name and "vision" not in name for name in tuned)
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [STAND_INS[model].architecture]


def test_exports_load_in_plain_transformers(trained):
    environment = os.environ | {"LMTP_FACTORY_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    paths = [str(trained[model].export) for model in MODELS]
    command = [sys.executable, "-c", LOAD_EXPORTS, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loaded = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert loaded == [[STAND_INS[model].architecture, True, 0] for model in MODELS]
