"""What is read back from ``lmtp/``: every fact that heads need, none that is not known, and weights that are numbers."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import tiny_models
from helpers.tiny_models import llama, randomise_heads
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from lmtp_factory import LeapHeads, LMTPConfig, LMTPError, attach_heads
from lmtp_factory.modeling.checkpoint import find_heads, load_heads, read_config, save_heads, validate_checkpoint


# Written by version 0.1.0: two heads at stride 3 on hidden size 8 and 32 words.
WRITTEN_BY_0_1_0 = Path(__file__).parents[1] / "fixtures" / "heads-0.1.0"


@pytest.fixture
def folder(tmp_path):
    """An ``lmtp/`` folder to spoil."""
    return Path(shutil.copytree(WRITTEN_BY_0_1_0 / "own", tmp_path / "heads")) / "lmtp"


def change(folder, **values):
    """Set facts in ``lmtp/config.json``; None removes one."""
    path = folder / "config.json"
    facts = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_heads_of_version_0_1_0_load(kind):
    heads = load_heads(WRITTEN_BY_0_1_0 / kind)
    assert heads.config.offsets == (1, 4, 7) and heads.config.head_kind == kind and heads.config.head_layers == 1
    assert (heads.config.hidden_size, heads.config.vocab_size) == (8, 32)
    assert (heads.config.base_model, heads.config.tokenizer_fingerprint) == ("some/base", "0123456789abcdef")
    assert all(parameter.abs().sum() > 0 for parameter in heads.parameters())
    assert isinstance(AutoModel.from_pretrained(WRITTEN_BY_0_1_0 / kind / "lmtp"), LeapHeads)
    base = llama(vocab_size=32, hidden_size=8, num_attention_heads=2, num_key_value_heads=1)
    model = attach_heads(base, heads=heads)
    ids = torch.arange(6)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, lmtp_decode="off", **options))


@pytest.mark.parametrize("missing", ["offsets", "head_kind", "head_layers", "hidden_size", "vocab_size"])
def test_a_missing_fact_is_refused(missing, folder):
    change(folder, **{missing: None})
    with pytest.raises(LMTPError, match=f"does not say {missing}: "):
        read_config(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {missing: None}))
    with pytest.raises(LMTPError, match=f"does not say {missing}: "):
        load_heads(folder.parent)


def test_all_missing_facts_are_named(folder):
    change(folder, offsets=None, vocab_size=None)
    with pytest.raises(LMTPError, match="does not say offsets, vocab_size: "):
        read_config(folder)


def test_a_fact_of_a_newer_version_is_refused(folder):
    change(folder, head_colour="blue")
    with pytest.raises(LMTPError, match=r"config.json cannot be used. .* has no head_colour: .* newer version"):
        load_heads(folder.parent)


def test_facts_that_the_first_version_lacked_are_all_there_or_none(folder):
    names = ("head_block", "head_inputs", "head_backs")
    save_heads(load_heads(folder.parent), folder)
    written = json.loads((folder / "config.json").read_text())
    assert all(name in written for name in names)
    for name in names:
        (folder / "config.json").write_text(json.dumps({key: v for key, v in written.items() if key != name}))
        with pytest.raises(LMTPError, match=f"does not say {name}: copy or train the leap heads again"):
            load_heads(folder.parent)
    (folder / "config.json").write_text(json.dumps({key: v for key, v in written.items() if key not in names}))
    assert load_heads(folder.parent).config.head_inputs == "state"


def test_what_transformers_writes_is_no_fact_of_a_newer_version(folder, tmp_path):
    heads = load_heads(folder.parent)
    heads.config.name_or_path = "somewhere"
    save_heads(heads, tmp_path / "again" / "lmtp")
    assert load_heads(tmp_path / "again").config.offsets == (1, 4, 7)
    heads.save_pretrained(tmp_path / "third" / "lmtp")
    assert load_heads(tmp_path / "third").config.offsets == (1, 4, 7)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"offsets": "1,4,7"}, r"leap_offsets is '1,4,7'"),
        ({"offsets": [1, 2.5, 7]}, r"leap_offsets is \[1, 2.5, 7\]"),
        ({"offsets": [1, True, 7]}, r"leap_offsets is \[1, True, 7\]"),
        ({"offsets": 4}, "leap_offsets is 4"),
        ({"offsets": [1, 7, 4]}, "leap_offsets is 7,4, .* have to rise"),
        ({"head_layers": "1"}, "head_layers is '1'"),
        ({"head_layers": 1.0}, r"head_layers is 1\.0"),
        ({"head_layers": 0}, "head_layers is 0"),
        ({"head_kind": 3}, "head_kind is 3"),
        ({"hidden_size": "8"}, "hidden_size is '8'"),
        ({"hidden_size": -8}, "hidden_size is -8"),
        ({"vocab_size": 32.5}, r"vocab_size is 32\.5"),
        ({"base_model": 5}, "base_model is 5"),
    ],
)
def test_impossible_facts_are_refused(values, said, folder):
    change(folder, **values)
    with pytest.raises(LMTPError, match=f"config.json cannot be used. {said}"):
        load_heads(folder.parent)


def test_a_folder_in_place_of_a_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(LMTPError, match=r"model.safetensors is truncated or damaged"):
        load_heads(folder.parent)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(LMTPError, match=r"config.json is damaged \(.*directory"):
        load_heads(folder.parent)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(number, folder):
    weights = load_file(folder / "model.safetensors")
    weights["heads.1.unembed.weight"][3, 2] = number
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(LMTPError, match=r"holds NaN or infinity in heads\.1\.unembed\.weight"):
        load_heads(folder.parent)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")]
)
def test_weights_in_a_dtype_that_heads_cannot_compute_in_are_refused(dtype, name, folder):
    weights = load_file(folder / "model.safetensors")
    weights["heads.1.unembed.weight"] = weights["heads.1.unembed.weight"].to(dtype)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(LMTPError, match=rf"holds heads\.1\.unembed\.weight as {name}, but"):
        validate_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_load(dtype, folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / "model.safetensors")
    assert load_heads(folder.parent).dtype == dtype


def test_heads_of_another_base_are_refused(tmp_path):
    model = attach_heads(llama(), LMTPConfig(base_model="first"), stage=2)
    save_heads(model.leap_heads, tmp_path / "lmtp")
    other = AutoModelForCausalLM.from_pretrained(tiny_models.save_llama(tmp_path / "b", hidden_size=16, head_dim=4))
    with pytest.raises(LMTPError, match=r"belong to first \(hidden size 32\), not to .*b \(hidden size 16\)"):
        attach_heads(other, heads=load_heads(tmp_path))


def test_damaged_heads_are_refused_before_they_load(tmp_path):
    (tmp_path / "base").mkdir()
    save_heads(attach_heads(llama()).leap_heads, tmp_path / "lmtp")
    weights, config = tmp_path / "lmtp" / "model.safetensors", tmp_path / "lmtp" / "config.json"
    validate_checkpoint(tmp_path / "lmtp")

    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LMTPError, match="truncated or damaged"):
        validate_checkpoint(tmp_path / "lmtp")
    weights.write_bytes(whole)

    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if ".2." not in name}, weights)
    with pytest.raises(LMTPError, match="does not fit"):
        load_heads(tmp_path)
    weights.unlink()
    with pytest.raises(LMTPError, match="is missing"):
        validate_checkpoint(tmp_path / "lmtp")

    config.write_text(config.read_text()[:40])
    with pytest.raises(LMTPError, match="is damaged"):
        validate_checkpoint(tmp_path / "lmtp")
    config.unlink()
    with pytest.raises(LMTPError, match="is missing"):
        validate_checkpoint(tmp_path / "lmtp")
    with pytest.raises(LMTPError, match="has no lmtp/ folder"):
        load_heads(tmp_path / "base")


@pytest.mark.parametrize(
    "fails", ["lmtp_factory.modeling.checkpoint.save_file", "lmtp_factory.LMTPConfig.save_pretrained"]
)
def test_a_full_disk_leaves_the_old_heads(fails, tmp_path, monkeypatch):
    """Before the weights, and between them and their configuration."""
    model = attach_heads(llama())
    folder = tmp_path / "lmtp"
    save_heads(model.leap_heads, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    randomise_heads(model)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fails, full)
    with pytest.raises(OSError, match="No space left"):
        save_heads(model.leap_heads, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["lmtp"]


def test_a_failed_replacement_leaves_the_old_heads(tmp_path, monkeypatch):
    """The old folder was renamed already when the new one cannot take its place."""
    model = attach_heads(llama())
    folder = tmp_path / "lmtp"
    save_heads(model.leap_heads, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    randomise_heads(model)
    rename = Path.rename

    def denied(self, target):
        if self.name == "lmtp.writing":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", denied)
        with pytest.raises(PermissionError, match="Permission denied"):
            save_heads(model.leap_heads, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["lmtp"]


def test_a_save_that_was_killed_between_its_renames_leaves_the_old_heads_to_the_next(tmp_path, monkeypatch):
    model = attach_heads(llama())
    folder = tmp_path / "lmtp"
    save_heads(model.leap_heads, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.rename(tmp_path / "lmtp.replaced")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lmtp_factory.modeling.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_heads(model.leap_heads, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached_model(hub_cache, *files, revision="main", commit="0123456789" * 4):
    """Put a model of the hub, some/model, into the cache."""
    folder = hub_cache / "models--some--model"
    for file in files:
        path = folder / "snapshots" / commit / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    return folder / "snapshots" / commit


def test_no_network_is_not_taken_for_no_heads(hub_cache):
    with pytest.raises(
        LMTPError, match=r"No directory some/model exists, and the hub request for it failed \(.*\): .*\.$"
    ) as told:
        find_heads("some/model")
    assert "\n" not in str(told.value)


def test_without_network_a_cached_model_says_whether_it_has_heads(hub_cache):
    snapshot = cached_model(hub_cache, "config.json")
    assert find_heads("some/model") is None
    (snapshot / "lmtp").mkdir()
    assert find_heads("some/model") == snapshot / "lmtp"


def test_heads_are_those_of_the_revision_in_the_cache_that_is_named(hub_cache, tmp_path):
    cached_model(tmp_path / "own", "config.json")
    tuned = cached_model(tmp_path / "own", "lmtp/config.json", revision="tuned", commit="9876543210" * 4)
    assert find_heads("some/model", cache_dir=tmp_path / "own") is None
    assert find_heads("some/model", cache_dir=tmp_path / "own", revision="tuned") == tuned / "lmtp"


@pytest.mark.parametrize("path", ["/no/such/directory", "no/such/directory", "no such model"])
def test_a_path_that_cannot_be_a_hub_id_has_no_heads(path, hub_cache):
    assert find_heads(path) is None


@pytest.mark.parametrize(
    ("status", "code", "found"),
    [(404, "RepoNotFound", True), (403, "GatedRepo", False), (500, None, False)],
    ids=["no such repository", "gated", "server error"],
)
def test_answers_of_the_hub(status, code, found, hub_cache, monkeypatch):
    """Only a repository that does not exist has no heads for certain."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    httpx = pytest.importorskip("httpx")
    request = httpx.Request("GET", "https://huggingface.co/api/models/some/model")
    response = httpx.Response(status, headers={"X-Error-Code": code} if code else {}, request=request)

    def answer(self, *args, **kwargs):
        huggingface_hub.utils.hf_raise_for_status(response)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", answer)
    if found:
        assert find_heads("some/model") is None
    else:
        with pytest.raises(LMTPError, match=r"the hub request for it failed"):
            find_heads("some/model")
