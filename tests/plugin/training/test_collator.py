"""Stage 1 packs the documents of a batch: same losses as padded rows, no document sees another."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import llamafactory_runs as runs
from helpers import tiny_data, tiny_models

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.modeling.model import LeapModel
from lmtp_factory.plugin.training import collator
from lmtp_factory.plugin.training.collator import PackingCollator, packing_collator


MODELS = [
    tiny_models.save_llama,
    tiny_models.save_mistral,
    tiny_models.save_qwen2,
    tiny_models.save_qwen3,
    tiny_models.save_gemma3_text,
    tiny_models.save_gemma3,
]


NEW_HEADS = {"head_inputs": "state_token", "head_block": "mlp", "draft_vocab_size": 64}
LAYERS = {"head_inputs": "layers"}


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        *((make, {}) for make in MODELS),
        *((make, heads) for make in (tiny_models.save_llama, tiny_models.save_gemma3) for heads in (NEW_HEADS, LAYERS)),
    ],
    ids=lambda part: part.__name__ if callable(part) else "-".join(part) or "paper",
)
def test_losses_equal_those_of_padded_rows(make, heads, data, tmp_path, lines):
    model = make(tmp_path / "model")
    template = "gemma3" if make is tiny_models.save_gemma3 else "qwen"
    run = {"per_device_train_batch_size": 6, "template": template, "val_size": 6, "eval_strategy": "steps", **heads}
    packed = runs.train(model, data, tmp_path / "packed", eval_steps=2, **run)
    assert any("packs the documents of each batch" in line for line in lines)
    padded = runs.train(model, data, tmp_path / "padded", eval_steps=2, packing=False, **run)
    for ours, theirs in zip(packed, padded, strict=True):
        for key, value in theirs.items():
            if "loss" in key and "train" not in key or "acc_head" in key:
                assert ours[key] == pytest.approx(value, rel=2e-4), key


def shapes_seen(monkeypatch):
    """(rows, length) of every batch that a backbone read while training."""
    from lmtp_factory.plugin.training import trainer

    seen, compute_loss = [], trainer.LeapTrainer.compute_loss

    def remember(self, model, inputs, **kwargs):
        seen.append(
            (tuple(inputs["input_ids"].shape), "attention_mask" in inputs, int((inputs["labels"] != -100).sum()))
        )
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(trainer.LeapTrainer, "compute_loss", remember)
    return seen


def uneven_dataset(directory):
    """The tiny texts with answers of one word up to all."""
    tiny_data.save_dataset(directory)
    rows = json.loads((directory / "tiny.json").read_text())
    for i, row in enumerate(rows):
        row["output"] = " ".join(row["output"].split()[: 1 + i % 12])
    (directory / "tiny.json").write_text(json.dumps(rows))
    return directory


def test_fewer_tokens_are_computed(tmp_path, monkeypatch):
    data, seen = uneven_dataset(tmp_path), shapes_seen(monkeypatch)
    # In a narrow model attention costs more than padding.
    llama = tiny_models.save_llama(tmp_path / "model", hidden_size=512)
    run = {
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "disable_shuffling": True,
        "leap_offsets": "2,3",
        "cutoff_len": 256,
    }
    runs.train(llama, data, tmp_path / "packed", **run)
    packed, seen[:] = list(seen), []
    runs.train(llama, data, tmp_path / "padded", packing=False, **run)
    for (ours, masked, labels), (theirs, their_mask, their_labels) in zip(packed, seen, strict=True):
        assert ours[0] * ours[1] < theirs[0] * theirs[1]
        assert not masked and their_mask
        assert labels == their_labels


@pytest.mark.parametrize("written", [{"packing": False}, {"packing": True}, {"neat_packing": True}])
def test_what_is_written_about_packing_holds(written, llama, data, tmp_path, lines):
    runs.train(llama, data, tmp_path, max_steps=1, **written)
    assert not any("packs the documents" in line for line in lines)


def test_stage_two_is_left_to_upstream(llama, data, stage1, tmp_path, lines):
    run = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(stage1)}
    runs.train(llama, data, tmp_path, max_steps=1, **run)
    assert not any("packs the documents" in line for line in lines)


def test_a_model_that_mixes_documents_pads(llama, data, tmp_path, lines, monkeypatch):
    final_hidden_states = LeapModel.final_hidden_states

    def leaking(self, **inputs):
        states = final_hidden_states(self, **inputs)
        return states + 0.1 * states.cumsum(1)  # as a running state would

    monkeypatch.setattr(LeapModel, "final_hidden_states", leaking)
    monkeypatch.setattr("lmtp_factory.plugin.training.trainer.LeapTrainer.compute_loss", upstream_batches(seen := []))
    runs.train(llama, data, tmp_path, max_steps=1)
    assert any("pads its batches" in line for line in lines)
    assert seen == [True]


def upstream_batches(seen):
    from lmtp_factory.plugin.training import trainer

    compute_loss = trainer.LeapTrainer.compute_loss

    def remember(self, model, inputs, **kwargs):
        seen.append("attention_mask" in inputs)
        return compute_loss(self, model, inputs, **kwargs)

    return remember


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"streaming": True, "world_size": 2}, "ranks split streamed batches by rows"),
        ({"predict_with_generate": True}, "generation needs padding on the left"),
        ({"zero3": True, "image_token": "<image>"}, "batches without media would not run"),
        ({"streaming": True}, None),
        ({"image_token": "<image>"}, None),
    ],
)
def test_what_keeps_batches_padded(changed, reason, tmp_path, lines, monkeypatch):
    facts = {"streaming": False, "world_size": 1, "predict_with_generate": False, "zero3": False, "image_token": None}
    facts |= changed
    model = attach_heads(load_plain(tiny_models.save_llama(tmp_path), "sdpa"), LMTPConfig(num_heads=1), stage=1)
    monkeypatch.setattr(collator, "is_deepspeed_zero3_enabled", lambda: facts["zero3"])
    plugin = SimpleNamespace(image_token=facts["image_token"], video_token=None, audio_token=None)
    upstream = SimpleNamespace(template=SimpleNamespace(mm_plugin=plugin))
    arguments = SimpleNamespace(**facts)
    collate = packing_collator(upstream, model, tiny_data.build_tokenizer(), arguments, arguments)
    assert (collate is upstream) == (reason is not None)
    assert any(f"pads its batches, because {reason}" in line for line in lines) == (reason is not None)


def test_documents_with_media_or_positions_go_upstream():
    collate = PackingCollator(lambda features: "upstream", 32, "sdpa", 0)
    text = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "images": None, "videos": None, "audios": None}
    assert set(collate([text, text])) == {"input_ids", "labels", "position_ids"}
    assert collate([text, text | {"images": ["a.png"]}]) == "upstream"
    assert collate([text | {"position_ids": [0, 1, 0]}]) == "upstream"


def test_prediction_while_evaluating(llama, data, tmp_path):
    run = {"val_size": 4, "eval_strategy": "steps", "eval_steps": 2, "predict_with_generate": True, "max_new_tokens": 4}
    entries = runs.train(llama, data, tmp_path, max_steps=2, **run)
    assert any("eval_rouge-1" in entry for entry in entries)


def load_plain(path, attention):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader = (
        AutoModelForImageTextToText if "Conditional" in (path / "config.json").read_text() else AutoModelForCausalLM
    )
    return loader.from_pretrained(path, attn_implementation=attention)


def test_a_frozen_backbone_does_not_drop_out(tmp_path):
    model = load_plain(tiny_models.save_llama(tmp_path, attention_dropout=0.5), "eager")
    attach_heads(model, LMTPConfig(num_heads=1), stage=1).train()
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(model(input_ids=ids, labels=ids).losses, model(input_ids=ids, labels=ids).losses)
    assert model.leap_heads.training and not model.base_model.training
