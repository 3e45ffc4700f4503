"""``hidden_cache_dir``: stage 1 from hidden states on disk trains as without, and the backbone runs once."""

import json

import pytest
import runs
import tiny

from lmtp_factory.errors import LMTPError
from lmtp_factory.modeling.checkpoint import weights_fingerprint
from lmtp_factory.plugin import state_cache


RUN = {"max_steps": None, "num_train_epochs": 3, "per_device_train_batch_size": 8}


@pytest.fixture
def backbone(monkeypatch):
    """Tokens of every forward of the backbone."""
    from lmtp_factory.modeling.lmtp import LeapModel

    seen, final_hidden_states = [], LeapModel.final_hidden_states

    def count(self, **inputs):
        seen.append(inputs["input_ids"].numel())
        return final_hidden_states(self, **inputs)

    monkeypatch.setattr(LeapModel, "final_hidden_states", count)
    return seen


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(state_cache, "_LEAST_SHARD", 20_000)
    monkeypatch.setattr(state_cache, "_SHARDS", 8)


def test_trains_as_without_and_runs_the_backbone_once(llama, data, tmp_path, backbone, lines, small_shards):
    plain = runs.train(llama, data, tmp_path / "plain", packing=False, **RUN)
    without, backbone[:] = sum(backbone), []
    folder = tmp_path / "cache"
    cached = runs.train(llama, data, tmp_path / "cached", hidden_cache_dir=str(folder), **RUN)
    assert runs.step_losses(cached) == pytest.approx(runs.step_losses(plain), rel=5e-3)  # bf16 states
    assert sum(backbone) < without / 2.5
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert any("x 32 x 2 bytes = " in line and f"{len(shards)} shards" in line for line in lines)

    backbone.clear()
    again = runs.train(llama, data, tmp_path / "again", hidden_cache_dir=str(folder), **RUN)
    assert runs.step_losses(again) == runs.step_losses(cached)
    only_the_trial = sum(backbone)
    shards[1].unlink()  # a kill before it was written
    backbone.clear()
    resumed = runs.train(llama, data, tmp_path / "resumed", hidden_cache_dir=str(folder), **RUN)
    assert runs.step_losses(resumed) == runs.step_losses(cached)
    assert only_the_trial < sum(backbone) < only_the_trial + without / 6


def test_evaluation_reads_the_backbone(llama, data, tmp_path, backbone):
    run = {"val_size": 6, "eval_strategy": "epoch", "num_train_epochs": 2, "max_steps": None}
    plain = runs.train(llama, data, tmp_path / "plain", **run)
    cached = runs.train(llama, data, tmp_path / "cached", hidden_cache_dir=str(tmp_path / "cache"), **run)
    losses = [[entry["eval_loss"] for entry in entries if "eval_loss" in entry] for entries in (plain, cached)]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_a_model_that_mixes_documents(llama, data, tmp_path, monkeypatch):
    monkeypatch.setattr(state_cache, "keeps_documents_apart", lambda model: False)
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


def test_other_data_is_refused_before_a_model_loads(llama, data, tmp_path, no_model_loads_later):
    folder = str(tmp_path / "cache")
    runs.train(llama, data, tmp_path / "a", hidden_cache_dir=folder)
    no_model_loads_later()
    with pytest.raises(LMTPError, match=r"were computed with documents = .* write another hidden_cache_dir"):
        runs.train(llama, data, tmp_path / "b", hidden_cache_dir=folder, cutoff_len=24)


@pytest.fixture
def no_model_loads_later(monkeypatch):
    def forbid():
        from llamafactory.model import loader

        def load(*args, **kwargs):
            raise AssertionError("a model was about to load")

        monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", load)

    return forbid


def test_weights_of_another_training_have_another_fingerprint(tmp_path, monkeypatch):
    from transformers import AutoConfig

    one = tiny.tiny_llama(tmp_path / "one")
    monkeypatch.setattr(tiny, "SEED", 1)
    two = tiny.tiny_llama(tmp_path / "two")
    prints = [weights_fingerprint(str(path), AutoConfig.from_pretrained(path)) for path in (one, one, two)]
    assert prints[0] == prints[1] != prints[2]
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert weights_fingerprint(str(one), AutoConfig.from_pretrained(one)) != prints[0]


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
