"""Evaluation of both stages through upstream's own training function: what is scored, and how precisely."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import llamafactory_runs as runs

from lmtp_factory.modeling.checkpoint import load_heads
from lmtp_factory.modeling.model import LeapModel
from lmtp_factory.plugin.training.trainer import LeapTrainer
from lmtp_factory.plugin.training.whole_batches import pad_with_unlabelled


@pytest.mark.parametrize(
    "keys", [{"finetuning_type": "full"}, {"finetuning_type": "freeze", "freeze_trainable_modules": "mlp"}]
)
def test_evaluation_computes_in_the_precision_of_training(keys, llama, data, tmp_path, monkeypatch):
    """The backbone runs outside the model's own forward here, and trained weights are fp32 beside frozen ones in bf16."""
    compute, precisions = LeapModel.final_hidden_states, set()

    def recorded(self, *args, **kwargs):
        hidden = compute(self, *args, **kwargs)
        precisions.add((self.training, torch.is_autocast_enabled("cpu")))
        return hidden

    monkeypatch.setattr(LeapModel, "final_hidden_states", recorded)
    run = {"stage": "lmtp2", "bf16": True, "use_cpu": True, "max_steps": 1, "val_size": 6, "eval_strategy": "steps"}
    runs.train(llama, data, tmp_path, eval_steps=1, **run, **keys)
    assert precisions == {(True, True), (False, True)}


@pytest.mark.parametrize("inputs", ["state", "layers"])
def test_neat_packing_scores_every_document_as_if_alone(inputs, llama, data, stage1, tmp_path):
    """Documents in one row: the same loss and accuracy of every head as each in a row of its own."""
    if inputs == "layers":
        runs.train(llama, data, tmp_path / "stage1", head_inputs=inputs)
        stage1 = tmp_path / "stage1"
        assert all(head.leap_mix.abs().sum() > 0 for head in load_heads(stage1).heads)
    run = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(stage1), "learning_rate": 0.0,
           "cutoff_len": 192, "eval_dataset": "tiny", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1,
           "per_device_eval_batch_size": 1}  # fmt: skip
    alone = runs.train(llama, data, tmp_path / "alone", **run)
    packed = runs.train(llama, data, tmp_path / "packed", neat_packing=True, per_device_train_batch_size=1, **run)
    alone, packed = (next(entry for entry in entries if "eval_loss" in entry) for entries in (alone, packed))
    for head in range(4):
        assert packed[f"eval_loss_head_{head}"] == pytest.approx(alone[f"eval_loss_head_{head}"], rel=1e-4)
        assert packed[f"eval_acc_head_{head}"] == pytest.approx(alone[f"eval_acc_head_{head}"], abs=1e-6)


def test_evaluating_a_finished_stage(llama, data, stage1, tmp_path):
    """do_eval alone takes the heads that belong to the adapter, not those that it started from."""
    run = {
        "stage": "lmtp2",
        "finetuning_type": "lora",
        "stage1_pretrained_path": str(stage1),
        "val_size": 6,
        "max_steps": 20,
    }
    trained = runs.train(llama, data, tmp_path / "trained", eval_strategy="steps", eval_steps=20, **run)
    expected = next(entry for entry in trained if "eval_loss" in entry)
    runs.train_only_evaluates(llama, data, tmp_path / "scored", adapter_name_or_path=str(tmp_path / "trained"), **run)
    scored = json.loads((tmp_path / "scored" / "eval_results.json").read_text())
    for head in range(4):
        assert scored[f"eval_loss_head_{head}"] == pytest.approx(expected[f"eval_loss_head_{head}"], rel=1e-4)


def documents(count: int) -> Dataset:
    rows = [{"input_ids": [i, i + 1, i + 2], "labels": [-100, i + 1, i + 2]} for i in range(count)]
    return Dataset.from_list(rows)


@pytest.mark.parametrize(("count", "multiple", "length"), [(5, 4, 8), (8, 4, 8), (1, 6, 6)])
def test_added_documents_have_no_labels(count, multiple, length):
    padded = pad_with_unlabelled(documents(count), multiple)
    assert len(padded) == length and padded.features == documents(count).features
    assert padded[:count] == documents(count)[:]
    for row in (padded[i] for i in range(count, length)):
        assert row["labels"] == [-100] * 3 and row["input_ids"] == documents(count)[row["input_ids"][0]]["input_ids"]


@pytest.mark.parametrize(("ranks", "generates", "lengths"), [(2, False, (8, 4)), (1, False, (5, 3)), (2, True, (5, 3))])
def test_every_named_evaluation_set_is_padded_for_several_ranks(ranks, generates, lengths):
    args = SimpleNamespace(world_size=ranks, eval_batch_size=2, predict_with_generate=generates)
    trainer = SimpleNamespace(args=args, eval_dataset={"a": documents(5), "b": documents(3)})
    LeapTrainer._pad_evaluation_sets(trainer)
    assert tuple(len(trainer.eval_dataset[name]) for name in ("a", "b")) == lengths
