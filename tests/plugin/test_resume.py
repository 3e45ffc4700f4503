"""Resuming: only from a checkpoint that is whole, of the same stage, and whose heads mean what this run's mean."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import llamafactory_runs as runs
from helpers.processes import exit_code_of_fork

from lmtp_factory import LMTPError
from lmtp_factory.files import STAGE_FILE
from lmtp_factory.modeling.checkpoint import load_heads, read_config
from lmtp_factory.plugin.training import trainer


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "overwrite_output_dir": None}
LORA = {"stage": "lmtp2", "finetuning_type": "lora"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, llama, data):
    """Checkpoints 2 and 4 of stage 1."""
    output = tmp_path_factory.mktemp("runs") / "saved"
    runs.train(llama, data, output, **SAVING)
    return output


@pytest.fixture(scope="module")
def saved_lora(tmp_path_factory, llama, data):
    """Checkpoints 2 and 4 of stage 2."""
    output = tmp_path_factory.mktemp("runs") / "saved"
    runs.train(llama, data, output, **SAVING, **LORA)
    return output


@pytest.fixture
def cut(saved, tmp_path):
    """A stage 1 that ended after its two checkpoints."""
    return cut_short(saved, tmp_path)


def cut_short(saved, tmp_path):
    output = tmp_path / "cut"
    shutil.copytree(saved, output)
    shutil.rmtree(output / "lmtp")
    return output


def refused(sentence: str):
    return pytest.raises(LMTPError, match=re.escape(sentence))


OTHER_HEADS = [
    ({"leap_stride": 3}, "leap_offsets 3,5,7 there and 4,7,10 here): write leap_offsets: 3,5,7 (no num_heads"),
    ({"leap_offsets": "2,4,6"}, "leap_offsets 3,5,7 there and 2,4,6 here"),
    ({"num_heads": 2}, "leap_offsets 3,5,7 there and 3,5 here"),
    ({"head_layers": 2}, "head_layers 1 there and 2 here): write head_layers: 1 to go on, or "),
    ({"head_kind": "shared"}, "head_kind own there and shared here): write head_kind: own to go on"),
    ({"draft_vocab_size": 40}, "draft_vocab_size None there and 40 here): write no draft_vocab_size to go on"),
    ({"head_inputs": "layers"}, "head_inputs state there and layers here): write head_inputs: state to go on"),
    ({"head_inputs": "state_token"}, "head_inputs state there and state_token here): write head_inputs: state to go on"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), OTHER_HEADS, ids=[str(c[0]) for c in OTHER_HEADS])
@pytest.mark.parametrize("named", [False, True], ids=["by itself", "named"])
def test_heads_of_another_shape_are_not_resumed(named, keys, message, llama, data, cut, no_model_loads):
    checkpoint = cut / "checkpoint-4"
    resume = {"resume_from_checkpoint": str(checkpoint)} if named else {}
    with refused(message) as caught:
        runs.train(llama, data, cut, **SAVING | {"max_steps": 6} | keys | resume)
    assert str(caught.value).startswith(
        f"Training would resume from {checkpoint}, whose heads are not those of this run ("
    )
    assert ("leave resume_from_checkpoint out" in str(caught.value)) == named
    assert read_config(checkpoint / "lmtp").offsets == (1, 3, 5, 7)


def test_the_advice_about_other_heads_works(llama, data, cut, tmp_path):
    run = SAVING | {"max_steps": 5}
    runs.train(llama, data, tmp_path / "another", leap_stride=3, **run)
    assert load_heads(tmp_path / "another").config.offsets == (1, 4, 7, 10)
    entries = runs.train(llama, data, cut, leap_offsets="3,5,7", **run)
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5]
    assert load_heads(cut).config.offsets == (1, 3, 5, 7)


def test_keys_that_are_left_out_mean_their_defaults(llama, data, tmp_path, no_model_loads, saved):
    """The checkpoint leaps by 3, and the YAML that resumes it no longer says so."""
    output = cut_short(saved, tmp_path)
    config = output / "checkpoint-4" / "lmtp" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"offsets": [1, 4, 7, 10]}))
    with refused("leap_offsets 4,7,10 there and 3,5,7 here"):
        runs.train(llama, data, output, **SAVING)


def test_stage_two_from_other_heads_than_its_checkpoint_s(llama, data, saved_lora, tmp_path, request):
    other = tmp_path / "other"
    runs.train(llama, data, other, leap_stride=3, max_steps=1)
    output = cut_short(saved_lora, tmp_path)
    request.getfixturevalue("no_model_loads")
    with refused(f"this run, which starts from {other}/lmtp (leap_offsets 3,5,7 there and 4,7,10 here)"):
        runs.train(llama, data, output, stage1_pretrained_path=str(other), **SAVING, **LORA)


def test_another_base_model_s_checkpoint(data, llama, saved, tmp_path, no_model_loads):
    from helpers import tiny_models

    other = tiny_models.save_llama(tmp_path / "other", hidden_size=16, head_dim=4)
    with refused(f"hidden_size 32 there and 16 here): write model_name_or_path: {llama} to go on"):
        runs.train(other, data, cut_short(saved, tmp_path), **SAVING)


def test_the_other_stage_s_checkpoint(llama, data, saved, saved_lora, tmp_path, no_model_loads):
    heads = cut_short(saved, tmp_path) / "checkpoint-4"
    with refused(f"Stage 1 saved {heads}, from which stage 2 would resume: write another output_dir, and stage1_pretr"):
        runs.train(llama, data, heads.parent, **SAVING, **LORA)
    adapter = saved_lora / "checkpoint-4"
    with refused(
        f"Stage 2 saved {adapter}, from which stage 1 would resume: leave resume_from_checkpoint out and write"
    ):
        runs.train(llama, data, tmp_path / "out", resume_from_checkpoint=str(adapter), **SAVING)


def as_deepspeed_saves(checkpoint, stage, records, llama):
    """Under ZeRO-3 without `stage3_gather_16bit_weights_on_model_save`: all weights are in DeepSpeed's own files."""
    (checkpoint / "global_step4").mkdir()
    (checkpoint / "optimizer.pt").unlink()
    if stage == 2:
        shutil.copy(llama / "config.json", checkpoint)
        (checkpoint / STAGE_FILE).write_text('{"stage": 2}')
    if not records:  # as this package did not write them at first
        (checkpoint / STAGE_FILE).unlink()
    return checkpoint


@pytest.mark.parametrize("records", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_stage_of_a_checkpoint_of_deepspeed(stage, records, llama, data, saved, tmp_path, no_model_loads):
    """It names no weights outside of DeepSpeed's files, which would be restored whatever they hold."""
    from llamafactory.hparams import get_train_args

    checkpoint = as_deepspeed_saves(cut_short(saved, tmp_path) / "checkpoint-4", stage, records, llama)

    def resume(stage):
        args = runs.arguments(llama, data, checkpoint.parent, **SAVING, stage=f"lmtp{stage}")
        return get_train_args(args)[3].heads_source.resumed

    other = 3 - stage
    with refused(f"Stage {stage} saved {checkpoint}, from which stage {other} would resume: write another output_dir"):
        resume(other)
    assert resume(stage) == checkpoint


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"stage": "2"}', '{"stage": [2]}', '{"stage": 3}'])
def test_a_checkpoint_whose_stage_cannot_be_read(content, llama, data, cut, no_model_loads):
    from llamafactory.hparams import get_train_args

    (cut / "checkpoint-4" / STAGE_FILE).write_text(content)
    args = runs.arguments(llama, data, cut, **SAVING, resume_from_checkpoint=str(cut / "checkpoint-4"))
    with refused(f"(its {STAGE_FILE} is damaged): write resume_from_checkpoint: {cut}/checkpoint-2."):
        get_train_args(args)


def test_checkpoints_say_their_stage_and_outputs_do_not(saved, saved_lora):
    for output, stage in ((saved, 1), (saved_lora, 2)):
        for checkpoint in ("checkpoint-2", "checkpoint-4"):
            assert json.loads((output / checkpoint / STAGE_FILE).read_text()) == {"stage": stage}
        assert not (output / STAGE_FILE).exists()


@pytest.fixture
def unchecked(monkeypatch):
    """Without the check after parsing, so that the one where the checkpoint is used has to hold."""
    from lmtp_factory.plugin import validation

    monkeypatch.setattr(validation, "check_checkpoint", lambda *args: None)


def test_the_trainer_looks_for_itself(llama, data, cut, unchecked):
    with refused(
        f"The heads in {cut}/checkpoint-4 are not those that are trained (leap_offsets 3,5,7 there and 4,7,10"
    ):
        runs.train(llama, data, cut, leap_stride=3, **SAVING | {"max_steps": 6})


def test_the_best_checkpoint_may_hold_other_heads(llama, data, tmp_path, lines):
    """A state that remembers a best checkpoint which another run has replaced since."""
    best = {"val_size": 6, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    runs.train(llama, data, tmp_path / "out", **SAVING, **best)
    runs.train(llama, data, tmp_path / "other", leap_stride=3, **SAVING)
    replaced = tmp_path / "out" / "checkpoint-1"
    shutil.copytree(tmp_path / "other" / "checkpoint-2", replaced)
    state = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    remembered = {"best_model_checkpoint": str(replaced), "best_global_step": 1, "best_metric": 0.0}
    state.write_text(json.dumps(json.loads(state.read_text()) | remembered))
    runs.train(llama, data, tmp_path / "out", resume_from_checkpoint=str(state.parent), **SAVING, **best)
    kept, last = (load_heads(tmp_path / "out" / folder).state_dict() for folder in ("", "checkpoint-4"))
    assert all(torch.equal(kept[name], last[name]) for name in last)
    said = next(line for line in lines if "leap_offsets 4,7,10 there and 3,5,7 here" in line)
    assert said.endswith("The heads of the last step are kept.")


def killed_while_saving(where, args):
    """Train until a part of checkpoint 4 is about to be written; to be run in a fork."""
    from llamafactory.train.tuner import run_exp

    target, name = {
        "heads": (trainer, "save_heads"),
        "weights": (peft.PeftModel, "save_pretrained"),
        "optimizer": (transformers.Trainer, "_save_optimizer_and_scheduler"),
        "state": (transformers.TrainerState, "save_to_json"),
    }[where]
    original = getattr(target, name)

    def killed(*args, **kwargs):
        if "checkpoint-4" in " ".join(map(str, args)):
            if where == "state":
                Path(args[1]).write_text("{")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(target, name, killed)
    run_exp(args)


@pytest.mark.parametrize(
    ("where", "stage", "reason"),
    [
        ("weights", LORA, "it has no trainer_state.json"),
        ("heads", {}, "it has no trainer_state.json"),
        ("optimizer", LORA, "it has no trainer_state.json"),
        ("state", {}, "its trainer_state.json is damaged"),
    ],
)
def test_killed_while_it_saves(where, stage, reason, llama, data, saved, saved_lora, tmp_path, lines):
    args = runs.arguments(llama, data, tmp_path, **SAVING, **stage)
    assert exit_code_of_fork(lambda: killed_while_saving(where, args)) == -signal.SIGKILL
    assert (tmp_path / "checkpoint-4").is_dir()
    runs.train(llama, data, tmp_path, **SAVING, **stage)
    assert f"{tmp_path}/checkpoint-4 was not saved whole ({reason}): training resumes from checkpoint-2." in lines
    whole = saved_lora if stage else saved
    assert runs.step_losses(runs.history(tmp_path)) == runs.step_losses(runs.history(whole))
    ours, theirs = load_heads(tmp_path).state_dict(), load_heads(whole).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def break_it(checkpoint, damage):
    heads = checkpoint / "lmtp" / "model.safetensors"
    if damage == "no heads":
        shutil.rmtree(checkpoint / "lmtp")
    elif damage == "truncated heads":
        heads.write_bytes(heads.read_bytes()[:-10])
    elif damage == "truncated adapter":
        (checkpoint / "adapter_model.safetensors").write_bytes(b"")
    else:
        (checkpoint / "trainer_state.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("no heads", "it has no lmtp/ folder"),
        ("truncated heads", "its lmtp/ folder cannot be read"),
        ("truncated adapter", "its adapter_model.safetensors cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(damage, reason, llama, data, saved_lora, tmp_path, lines):
    output = cut_short(saved_lora, tmp_path)
    break_it(output / "checkpoint-4", damage)
    asked = {"resume_from_checkpoint": True} if damage == "no heads" else {}
    runs.train(llama, data, output, **SAVING, **LORA, **asked)
    assert f"{output}/checkpoint-4 was not saved whole ({reason}): training resumes from checkpoint-2." in lines
    assert runs.step_losses(runs.history(output)) == runs.step_losses(runs.history(saved_lora))


def test_no_checkpoint_is_whole_and_the_advice_works(llama, data, cut):
    for checkpoint, damage in [("checkpoint-2", "no heads"), ("checkpoint-4", "no state")]:
        break_it(cut / checkpoint, damage)
    with refused(
        f"No checkpoint in output_dir {cut} was saved whole (checkpoint-4: it has no trainer_state.json): delete "
        "checkpoint-4, checkpoint-2 to train from the beginning."
    ):
        runs.train(llama, data, cut, **SAVING)
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(cut / checkpoint)
    assert len(runs.step_losses(runs.train(llama, data, cut, **SAVING))) == 4


def test_a_damaged_checkpoint_that_is_named_and_the_advice_works(llama, data, cut):
    run = SAVING | {"resume_from_checkpoint": str(cut / "checkpoint-4")}
    break_it(cut / "checkpoint-4", "no state")
    with refused(f"(it has no trainer_state.json): write resume_from_checkpoint: {cut}/checkpoint-2."):
        runs.train(llama, data, cut, **run)
    runs.train(llama, data, cut, **run | {"resume_from_checkpoint": str(cut / "checkpoint-2")})
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        break_it(cut / checkpoint, "no state")
    with refused("(it has no trainer_state.json): leave the key out and delete it."):
        runs.train(llama, data, cut, **run)


def test_checkpoints_of_another_training_are_not_to_be_deleted(llama, data, tmp_path, no_model_loads):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    with refused(
        f"output_dir {tmp_path} holds checkpoints of another training, which has no leap heads (checkpoint-4, "
        "checkpoint-2): write another output_dir."
    ):
        runs.train(llama, data, tmp_path, **SAVING)
    named = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    with refused(
        f"resume_from_checkpoint {tmp_path}/checkpoint-2 belongs to another training, which has no leap heads: leave "
        "resume_from_checkpoint out and write another output_dir."
    ):
        runs.train(llama, data, tmp_path, **SAVING | named)


def test_a_checkpoint_that_is_not_there(llama, data, tmp_path, no_model_loads):
    with refused("resume_from_checkpoint no/such/place is no directory: name a checkpoint-N directory"):
        runs.train(llama, data, tmp_path, resume_from_checkpoint="no/such/place")
    with refused(f"resume_from_checkpoint: true finds no checkpoint in output_dir {tmp_path}: leave it out."):
        runs.train(llama, data, tmp_path, resume_from_checkpoint=True)


def test_a_checkpoint_that_is_written_again_is_not_whole_meanwhile(llama, data, cut, monkeypatch):
    """A run that begins in an old folder is killed: the old state beside new weights would look whole."""
    from lmtp_factory.plugin.training import trainer

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "save_heads", killed)
        runs.train(llama, data, cut, **SAVING | {"overwrite_output_dir": True})
    assert not (cut / "checkpoint-2" / "trainer_state.json").exists()
