"""A model's own multi-token prediction layers survive loading, tuning and saving."""

import functools
import json
import logging

import huggingface_hub
import pytest
import torch
from helpers import llamafactory_runs as runs
from helpers import tiny_data
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from lmtp_factory.export import native_mtp
from lmtp_factory.export.native_mtp import NATIVE_MTP_FILE, keep_native_mtp
from lmtp_factory.modeling.checkpoint import find_heads


SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip


def glm(size):
    config = Glm4MoeConfig(
        vocab_size=size, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, num_nextn_predict_layers=1,
        **SHAPE,
    )  # fmt: skip
    names = ["model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight", "model.layers.2.mlp.gate.weight"]
    return Glm4MoeForCausalLM(config), names


def qwen(size):
    config = Qwen3NextConfig(
        vocab_size=size, num_experts=4, shared_expert_intermediate_size=16, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["full_attention"] * 2, mtp_num_hidden_layers=1, **SHAPE,
    )  # fmt: skip
    return Qwen3NextForCausalLM(config), ["mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp.norm.weight"]


@pytest.fixture(params=[glm, qwen], ids=["glm4_moe", "qwen3_next"])
def base(request, tmp_path):
    """A directory of the model with made-up MTP tensors, and these."""
    torch.manual_seed(0)
    tokenizer = tiny_data.build_tokenizer()
    model, names = request.param(len(tokenizer))
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mtp = {name: torch.randn(4, 6, dtype=torch.bfloat16) for name in names}
    weights = load_file(folder / "model.safetensors")
    save_file(weights | mtp, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, mtp


def tensors(folder):
    """All tensors that the index names, or those of the single file."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(weight_map.values())}
    assert sum(map(len, files.values())) == len(weight_map)
    return {name: files[file][name] for name, file in weight_map.items()}


def holds(folder, mtp):
    found = tensors(folder)
    return all(name in found and torch.equal(found[name], tensor) for name, tensor in mtp.items())


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_saving_keeps_them_in_one_file_or_many(base, tmp_path, shard):
    folder, mtp = base
    model = AutoModelForCausalLM.from_pretrained(folder)
    own = set(model.state_dict())
    assert keep_native_mtp(model, str(folder)) == len(mtp)
    for size in (shard, "1GB", shard):  # over an earlier export too
        model.save_pretrained(tmp_path / "saved", max_shard_size=size)
        assert holds(tmp_path / "saved", mtp)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert set(again.state_dict()) == own
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    # From what was saved, once more; and over itself.
    assert keep_native_mtp(again, str(tmp_path / "saved")) == len(mtp)
    again.save_pretrained(tmp_path / "second", max_shard_size=shard)
    assert holds(tmp_path / "second", mtp)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "second"))
    assert {k: v for k, v in before.items() if "mtp" in k or "nextn" in k} == {
        k: v for k, v in after.items() if "mtp" in k or "nextn" in k
    }


def test_a_model_without_them_saves_as_ever(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert keep_native_mtp(model, str(llama)) == 0
    assert "save_pretrained" not in vars(model)


def equal_weights(folder, model):
    """The model of a directory as its loader finds it has these weights."""
    loaded, expected = AutoModelForCausalLM.from_pretrained(folder).state_dict(), model.state_dict()
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("first", ["plain", "kept"])
@pytest.mark.parametrize("sizes", [("20KB", "1GB"), ("1GB", "20KB")], ids=["shards first", "one file first"])
def test_another_save_s_files_are_not_trusted(first, sizes, base, tmp_path):
    """Upstream leaves the index of older shards, or the single file, which loaders would read instead of shards."""
    folder, mtp = base
    model = AutoModelForCausalLM.from_pretrained(folder)
    if first == "kept":
        keep_native_mtp(model, str(folder))
    model.save_pretrained(tmp_path / "saved", max_shard_size=sizes[0])
    keep_native_mtp(model, str(folder))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "saved", max_shard_size=sizes[1])
    assert holds(tmp_path / "saved", mtp)
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    assert equal_weights(tmp_path / "saved", model)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_model_saved_over_itself_keeps_them(base, shard):
    folder, mtp = base
    model = AutoModelForCausalLM.from_pretrained(folder)
    keep_native_mtp(model, str(folder))
    model.save_pretrained(folder, max_shard_size=shard)
    assert holds(folder, mtp) and equal_weights(folder, model)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("older", [None, "1GB", "20KB"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_kill_while_they_are_added_leaves_a_model_that_loads(shard, older, base, tmp_path, monkeypatch):
    """Before each step, over no older export, one in one file and one in shards."""
    folder, mtp = base
    model = AutoModelForCausalLM.from_pretrained(folder)
    if older:
        kept = AutoModelForCausalLM.from_pretrained(folder)
        keep_native_mtp(kept, str(folder))
        kept.save_pretrained(tmp_path / "saved", max_shard_size=older)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    keep_native_mtp(model, str(folder))
    steps = [
        (native_mtp, "save_file"), (native_mtp.Path, "replace"), (native_mtp, "_index"), (native_mtp, "atomic_write"),
        (native_mtp.Path, "rename"), (native_mtp.Path, "unlink"),
    ]  # fmt: skip
    for owner, name in steps:
        for completed in (0, 1):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, killing(getattr(owner, name), completed))
                try:
                    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
                except Killed:
                    assert equal_weights(tmp_path / "saved", model), (name, completed)
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    assert holds(tmp_path / "saved", mtp) and equal_weights(tmp_path / "saved", model)


def killing(function, completed):
    """The function, but a kill after so many calls."""
    left = iter(range(completed))

    @functools.wraps(function)
    def kill(*args, **kwargs):
        if next(left, None) is None:
            raise Killed
        return function(*args, **kwargs)

    return kill


def test_an_incomplete_file_of_them_never_has_its_name(base, tmp_path, monkeypatch):
    folder, mtp = base
    model = AutoModelForCausalLM.from_pretrained(folder)
    keep_native_mtp(model, str(folder))

    def half(tensors, path, **kwargs):
        path.write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(native_mtp, "save_file", half)
    with pytest.raises(Killed):
        model.save_pretrained(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").glob("model*")] == ["model.safetensors"]


COMMITS = {"main": "0" * 40, "tuned": "1" * 40}


def put_on_hub(cache, folder, revision):
    """Put a model of the hub, some/model, into the cache as transformers downloads it."""
    repository = cache / "models--some--model"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(COMMITS[revision])
    snapshot = repository / "snapshots" / COMMITS[revision]
    snapshot.parent.mkdir(exist_ok=True)
    snapshot.symlink_to(folder)
    return snapshot


def test_a_model_of_the_hub_keeps_them_after_heads_were_looked_for(base, tmp_path, monkeypatch):
    """The hub then lists more files of the repository than transformers downloads."""
    folder, mtp = base
    listed = [
        huggingface_hub.hf_api.RepoFile(path=path, size=1, oid="0" * 40, type="file")
        for path in ("README.md", "config.json", "model.safetensors")
    ]
    info = huggingface_hub.hf_api.ModelInfo(id="some/model", sha=COMMITS["tuned"], siblings=[])
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *args, **kwargs: info)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", lambda *args, **kwargs: listed)
    put_on_hub(tmp_path / "hub", folder, "tuned")
    options = {"revision": "tuned", "cache_dir": tmp_path / "hub"}
    assert find_heads("some/model", **options) is None
    model = AutoModelForCausalLM.from_pretrained("some/model", local_files_only=True, **options)
    assert keep_native_mtp(model, "some/model", **options) == len(mtp)
    model.save_pretrained(tmp_path / "saved")
    assert holds(tmp_path / "saved", mtp)


@pytest.mark.parametrize("name", ["nobody/nothing", "no such model"])
def test_a_model_whose_files_are_not_found_is_told_of(name, llama, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(llama)
    with caplog.at_level(logging.WARNING):
        assert keep_native_mtp(model, name, cache_dir=tmp_path) == 0
    assert f"The files of {name} are not found on this machine, so native multi-token prediction layers" in caplog.text


@pytest.mark.parametrize("keep", [True, False])
def test_they_survive_lora_and_export(base, data, tmp_path, keep):
    """Of plain SFT."""
    folder, mtp = base
    runs.train(folder, data, tmp_path / "lora", stage="sft", finetuning_type="lora", lora_target="q_proj", max_steps=1)
    given = {"model_name_or_path": folder, "adapter_name_or_path": tmp_path / "lora", "keep_native_mtp": keep}
    runs.export(export_dir=tmp_path / "export", **given)
    assert holds(tmp_path / "export", mtp) == keep
    assert (tmp_path / "export" / NATIVE_MTP_FILE).exists() == keep
    AutoModelForCausalLM.from_pretrained(tmp_path / "export")


def test_they_survive_full_tuning_and_export(base, data, tmp_path):
    folder, mtp = base
    runs.train(folder, data, tmp_path / "full", stage="sft", max_steps=1)
    assert holds(tmp_path / "full", mtp)
    before, after = tensors(folder), tensors(tmp_path / "full")
    assert not torch.equal(before["lm_head.weight"].float(), after["lm_head.weight"].float())  # it was tuned
    runs.export(model_name_or_path=tmp_path / "full", export_dir=tmp_path / "export")
    assert holds(tmp_path / "export", mtp)
