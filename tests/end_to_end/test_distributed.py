"""Two processes on the CPU under DeepSpeed: the same losses as one process with the same global batch."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import llamafactory_runs as runs
from helpers import tiny_data, tiny_models
from llamafactory.extras.misc import find_available_port
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lmtp_factory import load_model, resources
from lmtp_factory.modeling.checkpoint import load_heads
from lmtp_factory.modeling.model_facts import model_facts


pytestmark = pytest.mark.distributed
# Uneven answers on the two ranks, so that averaging rank means would give other numbers.
# DeepSpeed clips by one norm over all heads, one process clips head by head: nothing is clipped here.
GLOBAL_BATCH = {"disable_shuffling": True, "max_steps": 4, "max_grad_norm": 1e9}


def torchrun(path: str, *overrides: str):
    return runs.cli("train", path, *overrides, FORCE_TORCHRUN="1", NPROC_PER_NODE="2", DS_ACCELERATOR="cpu")


def deepspeed(name: str) -> str:
    return str(resources.folder("configs") / "deepspeed" / f"{name}.json")


HEADS = {
    "own": {"head_kind": "own"},
    "shared": {"head_kind": "shared"},
    # Adjacent heads look back nowhere, so that no random number depends on the number of forwards in a step.
    "token": {"head_kind": "shared", "head_inputs": "state_token", "head_block": "mlp", "draft_vocab_size": 64,
              "leap_offsets": "2,3,4"},
    "layers": {"head_kind": "own", "head_inputs": "layers"},
    "own token": {"head_kind": "own", "head_inputs": "state_token", "draft_vocab_size": 64, "leap_offsets": "2,3,4"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("zero", "stage", "method", "kind"),
    [
        pytest.param("zero2", "lmtp1", "full", "token", marks=pytest.mark.slow),
        pytest.param("zero2", "lmtp2", "lora", "own token", marks=pytest.mark.slow),
        pytest.param("zero3", "lmtp1", "full", "own token", marks=pytest.mark.slow),
        pytest.param("zero3", "lmtp2", "full", "token", marks=pytest.mark.slow),
        pytest.param("zero2", "lmtp1", "full", "layers", marks=pytest.mark.slow),
        pytest.param("zero2", "lmtp2", "lora", "layers", marks=pytest.mark.slow),
        pytest.param("zero3", "lmtp1", "full", "layers", marks=pytest.mark.slow),
        pytest.param("zero3", "lmtp2", "full", "layers", marks=pytest.mark.slow),
        pytest.param(None, "lmtp2", "lora", "layers", marks=pytest.mark.slow),
        pytest.param(None, "lmtp1", "full", "own", marks=pytest.mark.slow),
        pytest.param(None, "lmtp2", "lora", "own", marks=pytest.mark.slow),
        pytest.param("zero2", "lmtp1", "full", "own", marks=pytest.mark.slow),
        pytest.param("zero2", "lmtp2", "lora", "own", marks=pytest.mark.slow),
        pytest.param("zero2", "lmtp2", "full", "shared", marks=pytest.mark.slow),
        pytest.param("zero3", "lmtp1", "full", "shared", marks=pytest.mark.slow),
        pytest.param("zero3", "lmtp2", "lora", "own", marks=pytest.mark.slow),
        ("zero3", "lmtp2", "full", "shared"),
    ],
)
def test_losses_of_two_processes_equal_those_of_one(zero, stage, method, kind, llama, data, tmp_path):
    run = {"stage": stage, "finetuning_type": method, **HEADS[kind], **GLOBAL_BATCH}
    run |= {"val_size": 6, "eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 1}
    run |= {"train_lm_head": True} if (zero, method) == ("zero3", "lora") else {}
    alone = runs.train(llama, data, tmp_path / "one", per_device_train_batch_size=4, **run)
    args = runs.arguments(
        llama, data, tmp_path / "two", per_device_train_batch_size=1, gradient_accumulation_steps=2,
        deepspeed=zero and deepspeed(zero), **run,
    )  # fmt: skip
    torchrun(runs.write_yaml(tmp_path / "x.yaml", args))
    together = runs.history(tmp_path / "two")
    assert runs.step_losses(together) == pytest.approx(runs.step_losses(alone), rel=2e-4)
    for one, two in zip(alone, together):
        for key in one:
            if "_head_" in key or (zero != "zero3" and ("tau" in key or "acceptance" in key)):
                assert two[key] == pytest.approx(one[key], rel=5e-4, abs=1e-4), key
    assert any("eval_loss" in entry for entry in together)
    assert any("eval_tau" in entry for entry in together) == (zero != "zero3")

    whole, sharded = (load_heads(tmp_path / name).state_dict() for name in ("one", "two"))
    assert {name: t.shape for name, t in sharded.items()} == {name: t.shape for name, t in whole.items()}
    for name, tensor in whole.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-2, atol=2e-3)
    if stage == "lmtp1":
        assert not list((tmp_path / "two").glob("*.safetensors"))
    elif method == "full":
        # ZeRO-2 clones tensors before they are saved, so upstream writes a tied LM head a second time.
        saved = set(load_file(tmp_path / "two" / "model.safetensors")) - {"lm_head.weight"}
        assert saved == set(load_file(llama / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "method"), [("zero2", "lora"), ("zero2", "full"), ("zero3", "full")])
def test_heads_train_with_a_rate_of_their_own_under_deepspeed(zero, method, llama, data, tmp_path):
    run = {"stage": "lmtp2", "finetuning_type": method, "learning_rate": 1e-4, "lr_scheduler_type": "linear"}
    run |= {"head_weight": 1.0, "head_learning_rate": 1e-2} | GLOBAL_BATCH
    alone = runs.train(llama, data, tmp_path / "one", per_device_train_batch_size=4, **run)
    same = runs.train(
        llama, data, tmp_path / "same", per_device_train_batch_size=4, **run | {"head_learning_rate": None}
    )
    args = runs.arguments(
        llama, data, tmp_path / "two", per_device_train_batch_size=2, deepspeed=deepspeed(zero), **run
    )
    torchrun(runs.write_yaml(tmp_path / "x.yaml", args))
    together = runs.history(tmp_path / "two")
    assert runs.step_losses(together) == pytest.approx(runs.step_losses(alone), rel=5e-4)
    assert runs.step_losses(together) != pytest.approx(runs.step_losses(same), rel=5e-2)
    for entry in (entry for entry in together if "loss" in entry):
        assert entry["head_learning_rate"] == pytest.approx(100 * entry["learning_rate"])


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_an_optimizer_of_deepspeed_takes_no_rate_of_the_heads(section, llama, data, tmp_path):
    config = json.loads(Path(deepspeed("zero2")).read_text())
    config[section] = {"type": "AdamW" if section == "optimizer" else "WarmupLR", "params": {}}
    args = runs.arguments(llama, data, tmp_path, stage="lmtp2", head_learning_rate=1e-2, deepspeed=config)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
             "MASTER_PORT": str(find_available_port()), "DS_ACCELERATOR": "cpu"}  # fmt: skip
    result = runs.cli("train", runs.write_yaml(tmp_path / "x.yaml", args), check=False, **alone)
    assert result.returncode
    assert (
        f'head_learning_rate does not go with the section "{section}" of the deepspeed configuration' in result.stderr
    )


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    """So many numbers a token that 400 documents fill several shards."""
    return tiny_models.save_llama(tmp_path_factory.mktemp("models") / "wide", hidden_size=512)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, "zero2", "zero3"])
def test_two_processes_train_from_the_hidden_state_cache(zero, wide_llama, tmp_path):
    llama, data = wide_llama, tmp_path / "data"
    tiny_data.save_dataset(data, rows=400)
    run = HEADS["token"] | GLOBAL_BATCH
    alone = runs.train(
        llama, data, tmp_path / "one", per_device_train_batch_size=4, hidden_cache_dir=str(tmp_path / "first"), **run
    )
    args = runs.arguments(
        llama, data, tmp_path / "two", per_device_train_batch_size=2, hidden_cache_dir=str(tmp_path / "second"),
        deepspeed=zero and deepspeed(zero), **run,
    )  # fmt: skip
    torchrun(runs.write_yaml(tmp_path / "x.yaml", args))
    assert runs.step_losses(runs.history(tmp_path / "two")) == pytest.approx(runs.step_losses(alone), rel=5e-4)
    shards = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("first", "second")]
    assert len(shards[0]) == len(shards[1]) >= 3  # more for one rank than for the other
    for one, two in zip(*shards, strict=True):
        torch.testing.assert_close(load_file(one), load_file(two), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("zero", [None, "zero2", "zero3"])
def test_every_rank_compares_an_older_cache_with_the_model(zero, edited, data, tmp_path):
    model, cache = tiny_models.save_llama(tmp_path / "model", hidden_size=256), str(tmp_path / "cache")
    runs.train(model, data, tmp_path / "one", hidden_cache_dir=cache, max_steps=1)
    if edited:
        path = model / "model.safetensors"
        before, tensors = path.stat(), load_file(path)
        facts = model_facts(str(model), AutoConfig.from_pretrained(model))
        tensors["model.norm.weight"] *= 1.05
        save_file(tensors, path, metadata={"format": "pt"})
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert model_facts(str(model), AutoConfig.from_pretrained(model)) == facts, "the samples saw the edit"
    args = runs.arguments(
        model, data, tmp_path / "two", hidden_cache_dir=cache, max_steps=1, deepspeed=zero and deepspeed(zero)
    )
    environment = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "DS_ACCELERATOR": "cpu"}
    result = runs.cli("train", runs.write_yaml(tmp_path / "x.yaml", args), check=False, **environment)
    assert bool(result.returncode) == edited
    assert (result.stderr.count("are not this model's (they differ by") >= 2) == edited


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "method"), [("zero2", "lora"), ("zero3", "lora"), ("zero3", "full")])
def test_heads_grow_with_new_tokens(zero, method, llama, stage1, data, tmp_path):
    args = runs.arguments(
        llama, data, tmp_path / "out", stage="lmtp2", finetuning_type=method, stage1_pretrained_path=str(stage1),
        add_tokens="<think>,<done>", deepspeed=deepspeed(zero), learning_rate=1e-3,
    )  # fmt: skip
    torchrun(runs.write_yaml(tmp_path / "x.yaml", args))
    losses = runs.step_losses(runs.history(tmp_path / "out"))
    assert losses[-1] < losses[0] < 10
    model, known = load_model(str(tmp_path / "out")), load_heads(stage1).config.vocab_size
    for old, new in zip(load_heads(stage1).heads, model.leap_heads.heads, strict=True):
        assert len(new.unembed.weight) == 384
        torch.testing.assert_close(new.unembed.weight[:known], old.unembed.weight, rtol=0, atol=0.02)
        # The new rows were the LM head's, on every rank the same.
        lm_head = model.get_output_embeddings().weight[known:]
        torch.testing.assert_close(new.unembed.weight[known:], lm_head, rtol=0, atol=0.02)


def test_optimizer_states_of_the_heads_are_sharded(llama, data, tmp_path):
    run = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "head_kind": "own"}
    args = runs.arguments(llama, data, tmp_path, deepspeed=deepspeed("zero2"), **run)
    torchrun(runs.write_yaml(tmp_path / "x.yaml", args))
    states = sorted((tmp_path / "checkpoint-1").glob("global_step1/*optim_states.pt"))
    parameters = sum(p.numel() for p in load_heads(tmp_path).parameters())
    # fp32 master weights, and Adam's two moments: half of them on each rank.
    assert [f.stat().st_size for f in states] == [pytest.approx(3 * 4 * parameters / 2, rel=0.1)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize(("stage", "method"), [("lmtp1", "full"), ("lmtp2", "lora")])
def test_resuming_under_deepspeed(zero, stage, method, llama, data, tmp_path):
    args = runs.arguments(
        llama, data, tmp_path / "out", stage=stage, finetuning_type=method, deepspeed=deepspeed(zero),
        save_strategy="steps", save_steps=2, max_steps=4, overwrite_output_dir=None, head_kind="shared",
    )  # fmt: skip
    path = runs.write_yaml(tmp_path / "x.yaml", args)
    torchrun(path)
    whole = runs.step_losses(runs.history(tmp_path / "out"))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    if stage == "lmtp1":  # the frozen backbone is not written again
        states = sum(f.stat().st_size for f in checkpoint.glob("global_step2/*model_states.pt"))
        assert states < (llama / "model.safetensors").stat().st_size
    torchrun(path, f"resume_from_checkpoint={checkpoint}")
    assert runs.step_losses(runs.history(tmp_path / "out")) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("guard", ["after parsing", pytest.param("in the Trainer", marks=pytest.mark.slow)])
def test_heads_of_another_shape_are_not_resumed_under_deepspeed(guard, llama, data, tmp_path):
    """DeepSpeed restores its own checkpoint, whose tensors have the same shapes whatever the offsets are."""
    args = runs.arguments(
        llama, data, tmp_path / "out", deepspeed=deepspeed("zero2"), save_strategy="steps", save_steps=2, max_steps=2,
        overwrite_output_dir=None, head_kind="shared",
    )  # fmt: skip
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
             "MASTER_PORT": str(find_available_port()), "DS_ACCELERATOR": "cpu"}  # fmt: skip
    program = (
        "import json, sys\nfrom llamafactory.train.tuner import run_exp\nfrom lmtp_factory.plugin import validation\n"
        "if sys.argv[2] == 'in the Trainer':\n    validation.check_checkpoint = lambda *args: None\n"
        "run_exp(json.load(open(sys.argv[1])))"
    )
    path = runs.write_yaml(tmp_path / "x.json", args)
    runs.cli(sys.executable, "-c", program, path, guard, **alone)
    args = args | {"leap_stride": 3, "max_steps": 4}
    result = runs.cli(
        sys.executable, "-c", program, runs.write_yaml(tmp_path / "x.json", args), guard, check=False, **alone
    )
    assert result.returncode != 0
    assert "leap_offsets 3,5,7 there and 4,7,10 here" in result.stderr
    assert load_heads(tmp_path / "out").config.offsets == (1, 3, 5, 7)
