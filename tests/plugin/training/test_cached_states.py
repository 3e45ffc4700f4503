"""``hidden_cache_dir``: stage 1 from hidden states on disk trains as without, and the backbone runs once."""

import json
import os

import pytest
import torch
from helpers import llamafactory_runs as runs
from helpers import tiny_data, tiny_models

from lmtp_factory.errors import LMTPError
from lmtp_factory.modeling import model_facts
from lmtp_factory.plugin.training import cached_states


RUN = {"max_steps": None, "num_train_epochs": 3, "per_device_train_batch_size": 8}


@pytest.fixture
def backbone(monkeypatch):
    """Tokens of every forward of the backbone."""
    from lmtp_factory.modeling.model import LeapModel

    seen, final_hidden_states = [], LeapModel.final_hidden_states

    def count(self, **inputs):
        seen.append(inputs["input_ids"].numel())
        return final_hidden_states(self, **inputs)

    monkeypatch.setattr(LeapModel, "final_hidden_states", count)
    return seen


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cached_states, "_LEAST_SHARD", 20_000)
    monkeypatch.setattr(cached_states, "_SHARDS", 8)


NEW_HEADS = {"head_inputs": "state_token", "head_block": "mlp", "draft_vocab_size": 64}


@pytest.mark.parametrize("heads", [{}, NEW_HEADS], ids=["the paper's heads", "heads that read a token"])
def test_trains_as_without_and_runs_the_backbone_once(heads, llama, data, tmp_path, backbone, lines, small_shards):
    run = RUN | heads
    plain = runs.train(llama, data, tmp_path / "plain", packing=False, **run)
    without, backbone[:] = sum(backbone), []
    folder = tmp_path / "cache"
    cached = runs.train(llama, data, tmp_path / "cached", hidden_cache_dir=str(folder), **run)
    assert runs.step_losses(cached) == pytest.approx(runs.step_losses(plain), rel=5e-3)  # bf16 states
    assert sum(backbone) < without / 2.5
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert any("x 32 x 2 bytes = " in line and f"{len(shards)} shards" in line for line in lines)

    backbone.clear()
    again = runs.train(llama, data, tmp_path / "again", hidden_cache_dir=str(folder), **run)
    assert runs.step_losses(again) == runs.step_losses(cached)
    only_the_trial = sum(backbone)
    shards[1].unlink()  # a kill before it was written
    backbone.clear()
    resumed = runs.train(llama, data, tmp_path / "resumed", hidden_cache_dir=str(folder), **run)
    assert runs.step_losses(resumed) == runs.step_losses(cached)
    assert only_the_trial < sum(backbone) < only_the_trial + without / 6


def test_evaluation_reads_the_backbone(llama, data, tmp_path, backbone):
    run = {"val_size": 6, "eval_strategy": "epoch", "num_train_epochs": 2, "max_steps": None}
    plain = runs.train(llama, data, tmp_path / "plain", **run)
    cached = runs.train(llama, data, tmp_path / "cached", hidden_cache_dir=str(tmp_path / "cache"), **run)
    losses = [[entry["eval_loss"] for entry in entries if "eval_loss" in entry] for entries in (plain, cached)]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_a_model_that_mixes_documents(llama, data, tmp_path, monkeypatch):
    monkeypatch.setattr(cached_states, "keeps_documents_apart", lambda model: False)
    alone = runs.train(llama, data, tmp_path / "a", hidden_cache_dir=str(tmp_path / "one"), max_steps=3)
    monkeypatch.undo()
    packed = runs.train(llama, data, tmp_path / "b", hidden_cache_dir=str(tmp_path / "two"), max_steps=3)
    assert runs.step_losses(alone) == pytest.approx(runs.step_losses(packed), rel=1e-3)


def test_in_loader_workers(llama, data, tmp_path):
    folder = str(tmp_path / "cache")
    here = runs.train(llama, data, tmp_path / "a", hidden_cache_dir=folder)
    workers = runs.train(llama, data, tmp_path / "b", hidden_cache_dir=folder, dataloader_num_workers=2)
    assert runs.step_losses(workers) == runs.step_losses(here)


def test_sampling_by_length_reads_no_states_before_they_are_there(llama, data, tmp_path):
    run = {"hidden_cache_dir": str(tmp_path / "cache"), "train_sampling_strategy": "group_by_length"}
    assert len(runs.step_losses(runs.train(llama, data, tmp_path / "out", **run))) == 4


def test_resuming_from_a_checkpoint(llama, data, tmp_path):
    run = {
        "hidden_cache_dir": str(tmp_path / "cache"),
        "save_strategy": "steps",
        "save_steps": 2,
        "overwrite_output_dir": None,
    }
    whole = runs.train(llama, data, tmp_path / "out", **run)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    resumed = runs.train(llama, data, tmp_path / "out", resume_from_checkpoint=checkpoint, **run)
    assert runs.step_losses(resumed) == pytest.approx(runs.step_losses(whole), rel=1e-6)


@pytest.fixture
def no_model_loads_later(monkeypatch):
    def forbid():
        from llamafactory.model import loader

        def load(*args, **kwargs):
            raise AssertionError("a model was about to load")

        monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", load)

    return forbid


def scale_norm(model, factor=4.0, keep_time=False):
    """Edit one norm's weights in the file, where the fingerprint's samples of it do not look."""
    path = model / "model.safetensors"
    before, content = path.stat(), bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start, end = (
        8 + int.from_bytes(content[:8], "little") + place for place in header["model.norm.weight"]["data_offsets"]
    )
    content[start:end] = (torch.frombuffer(content[start:end], dtype=torch.float32) * factor).numpy().tobytes()
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def set_in_config(model, **values):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def sparse_samples(monkeypatch):
    """Samples so sparse that no edit is in one, as in a large file."""
    monkeypatch.setattr(model_facts, "_SAMPLES", 1)
    monkeypatch.setattr(model_facts, "_SAMPLE_BYTES", 64)


CHANGES = {
    "model.safetensors": lambda model, data: scale_norm(model),
    "configuration": lambda model, data: set_in_config(model, rms_norm_eps=1e-3),
    "compute dtype": lambda model, data: {"bf16": True, "use_cpu": True},
    "documents": lambda model, data: tiny_data.save_dataset(data, rows=47) and None,
    "documents ": lambda model, data: {"cutoff_len": 24},
    "documents  ": lambda model, data: {"template": "llama3"},
    "rope scaling": lambda model, data: {"rope_scaling": "linear"},
}


@pytest.mark.parametrize("fact", CHANGES)
def test_every_fact_that_changes_is_refused_before_a_model_loads(fact, tmp_path, sparse_samples, no_model_loads_later):
    model, data, folder = tiny_models.save_llama(tmp_path / "model"), tmp_path / "data", str(tmp_path / "cache")
    tiny_data.save_dataset(data)
    runs.train(model, data, tmp_path / "out", hidden_cache_dir=folder, max_steps=1)
    written = CHANGES[fact](model, data) or {}
    no_model_loads_later()
    with pytest.raises(
        LMTPError, match=rf"computed with {fact.strip()} = .*, now it is .*: write another hidden_cache_dir"
    ):
        runs.train(model, data, tmp_path / "out", hidden_cache_dir=folder, max_steps=1, **written)


def test_an_edit_that_kept_size_time_and_samples_is_seen_in_the_states(tmp_path, data, sparse_samples, small_shards):
    model, folder = tiny_models.save_llama(tmp_path / "model"), tmp_path / "cache"
    run = {"hidden_cache_dir": str(folder), "max_steps": 1}
    runs.train(model, data, tmp_path / "out", **run)
    runs.train(model, data, tmp_path / "out", **run)
    sorted(folder.glob("*.safetensors"))[1].unlink()  # what is computed now is the edited model's, the rest is not
    scale_norm(model, 1.05, keep_time=True)
    with pytest.raises(LMTPError, match=r"are not this model's \(they differ by \d\.\d%, rounding explains 0\.\d%\)"):
        runs.train(model, data, tmp_path / "out", **run)


@pytest.mark.parametrize("precision", [{}, {"bf16": True, "use_cpu": True}], ids=["fp32", "bf16"])
def test_rounding_alone_stays_below_what_is_allowed(precision, tmp_path, data, monkeypatch):
    """States of packed rows, stored in bf16, against documents computed alone."""
    dtype = torch.bfloat16 if precision else torch.float32
    model, asked = tiny_models.save_llama(tmp_path / "model", num_hidden_layers=12), []

    def note(*args):
        asked.append(args)
        return rounding_error(*args)

    rounding_error = cached_states.rounding_error
    monkeypatch.setattr(cached_states, "rounding_error", note)
    for _ in range(2):
        runs.train(model, data, tmp_path / "out", hidden_cache_dir=str(tmp_path / "cache"), max_steps=1, **precision)
    assert set(asked) == {(dtype, 12)}
    assert (
        rounding_error(torch.float32, 12)
        < rounding_error(torch.bfloat16, 12)
        < rounding_error(torch.bfloat16, 80)
        < 0.1
    )


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ({"stage": "lmtp2", "finetuning_type": "lora"}, "stage: lmtp2, because the backbone changes in every step"),
        ({"packing": True}, "packing, because the cache holds documents"),
        ({"streaming": True}, "streaming, because"),
    ],
)
def test_what_does_not_go_with_it(written, sentence, llama, data, tmp_path, no_model_loads):
    with pytest.raises(LMTPError, match=f"hidden_cache_dir does not go with {sentence}"):
        runs.train(llama, data, tmp_path / "out", hidden_cache_dir=str(tmp_path / "cache"), **written)
    assert not (tmp_path / "cache").exists()
