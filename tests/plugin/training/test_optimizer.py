"""`head_learning_rate`: the heads' steps scale with it, the other parameters' do not."""

import json

import pytest
import torch
from helpers import llamafactory_runs as runs
from helpers import tiny_models
from torch import nn

from lmtp_factory import LMTPError
from lmtp_factory.modeling.checkpoint import load_heads
from lmtp_factory.plugin.training.optimizer import check_rates, parameter_groups, with_groups


RATE = 1e-3
STAGE2 = {"stage": "lmtp2", "learning_rate": RATE, "max_grad_norm": 0.0, "freeze_trainable_layers": 1}


def changes(trainers, start):
    """Change of each trained parameter since `start`, the heads' and the others'."""
    model = trainers[-1].model
    moved = {name: p.detach() - start[name] for name, p in model.named_parameters() if p.requires_grad}
    heads = {name: change for name, change in moved.items() if "leap_heads." in name}
    return heads, {name: change for name, change in moved.items() if name not in heads}


@pytest.fixture
def start(monkeypatch):
    """Parameters at the beginning of the training."""
    from lmtp_factory.plugin.training.trainer import LeapTrainer

    parameters, train = {}, LeapTrainer.train

    def remember(self, *args, **kwargs):
        parameters.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return train(self, *args, **kwargs)

    monkeypatch.setattr(LeapTrainer, "train", remember)
    return parameters


@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adafactor"])
def test_a_step_of_the_heads_scales_with_their_rate(
    optim, method, llama, data, stage1, tmp_path, trainers, start, lines
):
    run = STAGE2 | {"finetuning_type": method, "optim": optim, "max_steps": 1, "stage1_pretrained_path": str(stage1)}
    runs.train(llama, data, tmp_path / "one", **run)
    heads, rest = changes(trainers, start)
    runs.train(llama, data, tmp_path / "two", head_learning_rate=4 * RATE, **run)
    faster, same = changes(trainers, start)
    assert heads and rest and heads.keys() == faster.keys() and rest.keys() == same.keys()
    for name, change in heads.items():
        assert change.abs().sum() > 0, name
        torch.testing.assert_close(faster[name], 4 * change, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(same[name], change) for name, change in rest.items())
    assert any(change.abs().sum() > 0 for change in rest.values())
    assert "Leap heads train with learning rate 0.004, the rest with 0.001." in lines


def test_the_schedule_scales_both_rates(llama, data, tmp_path):
    run = STAGE2 | {"finetuning_type": "lora", "lr_scheduler_type": "cosine", "warmup_steps": 1}
    entries = [e for e in runs.train(llama, data, tmp_path, head_learning_rate=3 * RATE, **run) if "loss" in e]
    assert len({entry["learning_rate"] for entry in entries}) > 2
    for entry in entries:
        assert entry["head_learning_rate"] == pytest.approx(3 * entry["learning_rate"])


def test_the_cli_reads_the_key_from_yaml(llama, data, tmp_path):
    keys = STAGE2 | {"finetuning_type": "lora"}
    args = runs.arguments(llama, data, tmp_path / "out", **keys)
    runs.cli("train", runs.write_yaml(tmp_path / "x.yaml", args), "head_learning_rate=5e-4")
    steps = [entry for entry in runs.history(tmp_path / "out") if "loss" in entry]
    assert {entry["head_learning_rate"] for entry in steps} == {5e-4}


def test_resuming_takes_the_rate_that_was_saved(llama, data, tmp_path, lines):
    run = STAGE2 | {"finetuning_type": "lora", "save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": None}
    whole = runs.train(llama, data, tmp_path / "whole", head_learning_rate=3 * RATE, **run)
    runs.train(llama, data, tmp_path / "cut", head_learning_rate=3 * RATE, **run)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert json.loads((checkpoint / "lmtp_stage.json").read_text()) == {"stage": 2, "head_learning_rate": 3 * RATE}
    run |= {"resume_from_checkpoint": str(checkpoint)}
    with pytest.raises(
        LMTPError, match="whose optimizer has another learning rate .*: write head_learning_rate: 0.003"
    ):
        runs.train(llama, data, tmp_path / "cut", head_learning_rate=RATE, **run)
    with pytest.raises(LMTPError, match="has another learning rate for the heads"):
        runs.train(llama, data, tmp_path / "cut", **run)
    resumed = runs.train(llama, data, tmp_path / "cut", head_learning_rate=3 * RATE, **run)
    assert runs.step_losses(resumed) == runs.step_losses(whole)
    ours, theirs = (load_heads(tmp_path / name).state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_without_the_rate_is_not_resumed_with_it(llama, data, tmp_path):
    run = STAGE2 | {"finetuning_type": "lora", "save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": None}
    runs.train(llama, data, tmp_path, **run)
    with pytest.raises(LMTPError, match="has no learning rate for the heads: leave head_learning_rate out to go on"):
        runs.train(llama, data, tmp_path, head_learning_rate=RATE, max_steps=6, **run)


def test_groups_keep_the_weight_decay_of_each_side():
    from lmtp_factory import attach_heads

    model = attach_heads(tiny_models.llama(), stage=2)
    model.lm_head.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    groups = parameter_groups(
        model.named_parameters(), model.leap_heads, 0.5, 0.1, [n for n in names if "norm" not in n]
    )
    assert [(group["weight_decay"], group.get("lr")) for group in groups] == [(0.1, None), (0.0, None), (0.1, 0.5)]
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len(set(members)) == sum(p.requires_grad for p in model.parameters())


def test_an_optimizer_without_groups_is_refused_late_too():
    heads = nn.Linear(2, 2)
    with pytest.raises(LMTPError, match="head_learning_rate does not go with AdamW, which takes no parameter groups"):
        with_groups(torch.optim.AdamW, {"params": []}, [])
    with pytest.raises(LMTPError, match="does not go with <lambda>"):
        with_groups(lambda: None, {}, [])
    with pytest.raises(LMTPError, match="does not train the leap heads with head_learning_rate: 0.5"):
        check_rates(torch.optim.SGD(heads.parameters(), lr=0.1), heads, 0.5)
