"""Two processes on the CPU under DeepSpeed: the same losses as one process with the same global batch."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import llamafactory_runs as runs
from helpers import several_runs, tiny_data, tiny_models
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


def train_on_two(folder: Path, *all_args: dict, check: bool = True):
    """Train several runs, one after the other, in the processes of one torchrun."""
    paths = [runs.write_yaml(folder / f"arguments_{number}.json", args) for number, args in enumerate(all_args)]
    command = (str(runs.BIN / "torchrun"), "--standalone", "--nproc_per_node=2", several_runs.__file__, *paths)
    return runs.cli(*command, timeout=120 + 60 * len(paths), check=check, DS_ACCELERATOR="cpu")


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


# Stage, finetuning type and heads of the runs without DeepSpeed and with each ZeRO.
RUNS = {
    None: [("lmtp2", "lora", "own"), ("lmtp2", "lora", "layers"), ("lmtp1", "full", "own")],
    "zero2": [
        ("lmtp1", "full", "own"),
        ("lmtp1", "full", "token"),
        ("lmtp1", "full", "layers"),
        ("lmtp2", "lora", "own"),
        ("lmtp2", "lora", "own token"),
        ("lmtp2", "lora", "layers"),
        ("lmtp2", "full", "shared"),
    ],
    "zero3": [
        ("lmtp1", "full", "shared"),
        ("lmtp1", "full", "own token"),
        ("lmtp1", "full", "layers"),
        ("lmtp2", "lora", "own"),
        ("lmtp2", "full", "token"),
        ("lmtp2", "full", "layers"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("zero", RUNS)
def test_losses_of_two_processes_equal_those_of_one(zero, llama, data, tmp_path):
    pairs = [Pair(zero, *kind, llama, data, tmp_path / "-".join(kind)) for kind in RUNS[zero]]
    train_on_two(tmp_path, *(pair.args for pair in pairs))
    for pair in pairs:
        pair.check()


def test_the_command_trains_and_resumes(llama, data, tmp_path):
    pair = Pair("zero3", "lmtp2", "full", "shared", llama, data, tmp_path)
    args = pair.args | {"save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": None}
    command, two = ("train", runs.write_yaml(tmp_path / "x.yaml", args)), tmp_path / "two"
    processes = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "DS_ACCELERATOR": "cpu"}
    runs.cli(*command, **processes)
    pair.check()
    whole = runs.step_losses(runs.history(two))
    runs.cli(*command, f"resume_from_checkpoint={two / 'checkpoint-2'}", **processes)
    assert runs.step_losses(runs.history(two)) == pytest.approx(whole, rel=1e-5)


class Pair:
    """The same run in this process and, with `args`, on two."""

    def __init__(self, zero, stage, method, kind, llama, data, folder):
        self.zero, self.stage, self.method, self.llama, self.folder = zero, stage, method, llama, folder
        run = {"stage": stage, "finetuning_type": method, **HEADS[kind], **GLOBAL_BATCH}
        # Five documents: each counts once, although two ranks read six.
        run |= {"val_size": 5, "eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 1}
        run |= {"train_lm_head": True} if (zero, method) == ("zero3", "lora") else {}
        self.alone = runs.train(llama, data, folder / "one", per_device_train_batch_size=4, **run)
        self.args = runs.arguments(
            llama, data, folder / "two", per_device_train_batch_size=1, gradient_accumulation_steps=2,
            deepspeed=zero and deepspeed(zero), **run,
        )  # fmt: skip

    def check(self):
        together, name = runs.history(self.folder / "two"), self.folder.name
        assert runs.step_losses(together) == pytest.approx(runs.step_losses(self.alone), rel=2e-4), name
        for one, two in zip(self.alone, together, strict=True):
            for key in one:
                if "_head_" in key or (self.zero != "zero3" and ("tau" in key or "acceptance" in key)):
                    assert two[key] == pytest.approx(one[key], rel=5e-4, abs=1e-4), (name, key)
        assert any("eval_loss" in entry for entry in together), name
        assert any("eval_tau" in entry for entry in together) == (self.zero != "zero3"), name

        whole, sharded = (load_heads(self.folder / part).state_dict() for part in ("one", "two"))
        assert {key: t.shape for key, t in sharded.items()} == {key: t.shape for key, t in whole.items()}, name
        for key, tensor in whole.items():
            torch.testing.assert_close(sharded[key], tensor, rtol=1e-2, atol=2e-3, msg=lambda text: f"{name}: {text}")
        if self.stage == "lmtp1":
            assert not list((self.folder / "two").glob("*.safetensors")), name
        elif self.method == "full":
            # ZeRO-2 clones tensors before they are saved, so upstream writes a tied LM head a second time.
            saved = set(load_file(self.folder / "two" / "model.safetensors")) - {"lm_head.weight"}
            assert saved == set(load_file(self.llama / "model.safetensors")), name


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "methods"), [("zero2", ("lora", "full")), ("zero3", ("full",))])
def test_heads_train_with_a_rate_of_their_own_under_deepspeed(zero, methods, llama, data, tmp_path):
    run = {"stage": "lmtp2", "learning_rate": 1e-4, "lr_scheduler_type": "linear"} | GLOBAL_BATCH
    run |= {"head_weight": 1.0, "head_learning_rate": 1e-2}

    def two(method):
        batch = {"per_device_train_batch_size": 2, "deepspeed": deepspeed(zero)}
        return runs.arguments(llama, data, tmp_path / method, finetuning_type=method, **batch, **run)

    train_on_two(tmp_path, *map(two, methods))
    for method in methods:
        one = {"finetuning_type": method, "per_device_train_batch_size": 4} | run
        alone = runs.train(llama, data, tmp_path / f"one_{method}", **one)
        same = runs.train(llama, data, tmp_path / f"same_{method}", **one | {"head_learning_rate": None})
        together = runs.history(tmp_path / method)
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
    train_on_two(tmp_path, args)
    assert runs.step_losses(runs.history(tmp_path / "two")) == pytest.approx(runs.step_losses(alone), rel=5e-4)
    shards = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("first", "second")]
    assert len(shards[0]) == len(shards[1]) >= 3  # more for one rank than for the other
    for one, two in zip(*shards, strict=True):
        torch.testing.assert_close(load_file(one), load_file(two), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, "zero2", "zero3"])
def test_every_rank_compares_an_older_cache_with_the_model(zero, data, tmp_path):
    def save(name):
        model, cache = tiny_models.save_llama(tmp_path / name, hidden_size=256), str(tmp_path / f"cache_{name}")
        runs.train(model, data, tmp_path / "one", hidden_cache_dir=cache, max_steps=1)
        return model, runs.arguments(
            model, data, tmp_path / f"two_{name}", hidden_cache_dir=cache, max_steps=1,
            deepspeed=zero and deepspeed(zero),
        )  # fmt: skip

    (_, unchanged), (model, edited) = save("same"), save("edited")
    path = model / "model.safetensors"
    before, tensors = path.stat(), load_file(path)
    facts = model_facts(str(model), AutoConfig.from_pretrained(model))
    tensors["model.norm.weight"] *= 1.05
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert model_facts(str(model), AutoConfig.from_pretrained(model)) == facts, "the samples saw the edit"

    result = train_on_two(tmp_path, unchanged, edited, check=False)
    assert len(runs.step_losses(runs.history(tmp_path / "two_same"))) == 1
    assert result.returncode and not (tmp_path / "two_edited" / "lmtp").exists()
    assert result.stderr.count("are not this model's (they differ by") >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "methods"), [("zero2", ("lora",)), ("zero3", ("lora", "full"))])
def test_heads_grow_with_new_tokens(zero, methods, llama, stage1, data, tmp_path):
    run = {"stage": "lmtp2", "stage1_pretrained_path": str(stage1), "add_tokens": "<think>,<done>"}
    run |= {"deepspeed": deepspeed(zero), "learning_rate": 1e-3}
    train_on_two(tmp_path, *(runs.arguments(llama, data, tmp_path / m, finetuning_type=m, **run) for m in methods))
    for method in methods:
        losses = runs.step_losses(runs.history(tmp_path / method))
        assert losses[-1] < losses[0] < 10
        model, known = load_model(str(tmp_path / method)), load_heads(stage1).config.vocab_size
        for old, new in zip(load_heads(stage1).heads, model.leap_heads.heads, strict=True):
            assert len(new.unembed.weight) == 384
            torch.testing.assert_close(new.unembed.weight[:known], old.unembed.weight, rtol=0, atol=0.02)
            # The new rows were the LM head's, on every rank the same.
            lm_head = model.get_output_embeddings().weight[known:]
            torch.testing.assert_close(new.unembed.weight[known:], lm_head, rtol=0, atol=0.02)


def test_optimizer_states_of_the_heads_are_sharded(llama, data, tmp_path):
    run = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "head_kind": "own"}
    args = runs.arguments(llama, data, tmp_path, deepspeed=deepspeed("zero2"), **run)
    train_on_two(tmp_path, args)
    states = sorted((tmp_path / "checkpoint-1").glob("global_step1/*optim_states.pt"))
    parameters = sum(p.numel() for p in load_heads(tmp_path).parameters())
    # fp32 master weights, and Adam's two moments: half of them on each rank.
    assert [f.stat().st_size for f in states] == [pytest.approx(3 * 4 * parameters / 2, rel=0.1)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_resuming_under_deepspeed(zero, llama, data, tmp_path):
    stages = {"lmtp1": "full", "lmtp2": "lora"}

    def run(stage, **more):
        return runs.arguments(
            llama, data, tmp_path / stage, stage=stage, finetuning_type=stages[stage], deepspeed=deepspeed(zero),
            save_strategy="steps", save_steps=2, max_steps=4, overwrite_output_dir=None, head_kind="shared", **more,
        )  # fmt: skip

    train_on_two(tmp_path, *map(run, stages))
    whole = {stage: runs.step_losses(runs.history(tmp_path / stage)) for stage in stages}
    checkpoints = {stage: tmp_path / stage / "checkpoint-2" for stage in stages}
    # Stage 1 does not write the frozen backbone again.
    states = sum(f.stat().st_size for f in checkpoints["lmtp1"].glob("global_step2/*model_states.pt"))
    assert states < (llama / "model.safetensors").stat().st_size
    train_on_two(tmp_path, *(run(stage, resume_from_checkpoint=str(checkpoints[stage])) for stage in stages))
    for stage in stages:
        assert runs.step_losses(runs.history(tmp_path / stage)) == pytest.approx(whole[stage], rel=1e-5)


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
