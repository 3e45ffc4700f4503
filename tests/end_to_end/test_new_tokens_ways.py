"""Other ways to add tokens in stage 2, adapters on adapters, and keys that do not fit, on one model."""

import json
import re
import shutil

import pytest
import torch
from helpers import chat_models, tiny_models
from helpers import llamafactory_runs as runs
from helpers.new_tokens import GROWN, KEYS, KNOWN, STAGE2, TOKENS, assert_grown, save_dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lmtp_factory import LMTPError, load_model
from lmtp_factory.modeling.checkpoint import base_fingerprint, load_heads, read_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    save_dataset(directory)
    return directory


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return tiny_models.save_llama(tmp_path_factory.mktemp("models") / "one", tie=True)


@pytest.fixture(scope="module")
def one_stage1(one, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "stage1"
    runs.train(one, data, output)
    return output


@pytest.fixture(scope="module")
def one_adapter(one, one_stage1, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "adapter"
    run = {"finetuning_type": "lora", "stage1_pretrained_path": str(one_stage1), "stage": "lmtp2"}
    runs.train(one, data, output, **run, **KEYS)
    return output


def test_new_rows_begin_as_the_lm_head_s(one, one_stage1, data, tmp_path):
    run = {"stage": "lmtp2", "finetuning_type": "full", "learning_rate": 0.0, "max_steps": 1}
    runs.train(one, data, tmp_path, stage1_pretrained_path=str(one_stage1), **run, **KEYS)
    heads, before = load_heads(tmp_path).state_dict(), load_heads(one_stage1).state_dict()
    embeddings = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    for name, tensor in heads.items():
        assert torch.equal(tensor[:KNOWN] if "unembed" in name else tensor, before[name])
        assert "unembed" not in name or torch.equal(tensor[KNOWN:], embeddings[KNOWN:])


@pytest.mark.parametrize(
    "run",
    [
        {"finetuning_type": "lora", "add_special_tokens": ",".join(TOKENS)},
        {"finetuning_type": "lora", "train_lm_head": True, **KEYS},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1, **KEYS},
        {"finetuning_type": "lora", "additional_target": "embed_tokens,lm_head", **KEYS},
    ],
    ids=lambda run: "-".join(run),
)
def test_other_ways_to_add_them(run, one, one_stage1, data, tmp_path):
    runs.train(one, data, tmp_path / "out", stage="lmtp2", stage1_pretrained_path=str(one_stage1), **run)
    assert_grown(tmp_path / "out")
    assert load_model(str(tmp_path / "out")).leap_heads.config.vocab_size == GROWN
    model = {"model_name_or_path": tmp_path / "out"}
    if run["finetuning_type"] == "lora":
        saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert {tuple(t.shape) for name, t in saved.items() if "embed_tokens" in name} == {(GROWN, 32)}
        added = {key: value for key, value in run.items() if key.startswith("add_")}
        model = {"model_name_or_path": one, "adapter_name_or_path": tmp_path / "out", **added}
    runs.export(**model, export_dir=tmp_path / "export", lmtp_export="heads")
    assert_grown(tmp_path / "export")


def test_fresh_heads(one, data, tmp_path):
    runs.train(one, data, tmp_path, stage="lmtp2", finetuning_type="lora", **KEYS)
    assert_grown(tmp_path)
    assert load_model(str(tmp_path)).leap_heads.config.vocab_size == GROWN


def test_tokens_that_fit_into_padded_embeddings(data, tmp_path):
    """Nothing is resized; ids that meant nothing mean something now."""
    padded = tiny_models.save_llama(tmp_path / "padded", vocab_size=GROWN)
    runs.train(padded, data, tmp_path / "stage1")
    run = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(tmp_path / "stage1")}
    runs.train(padded, data, tmp_path / "out", **run, **KEYS)
    assert_grown(tmp_path / "out")
    runs.export(
        model_name_or_path=padded, adapter_name_or_path=tmp_path / "out", export_dir=tmp_path / "export",
        lmtp_export="heads", **KEYS,
    )  # fmt: skip
    assert_grown(tmp_path / "export")
    assert load_model(str(tmp_path / "export")) and load_model(str(tmp_path / "out"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_template_that_adds_tokens(method, one_stage1, one, data, tmp_path):
    """`gemma2` adds <eos>: a model that is written carries that tokenizer, an adapter stays on its base."""
    run = {"stage": "lmtp2", "finetuning_type": method, "template": "gemma2"}
    runs.train(one, data, tmp_path / "out", stage1_pretrained_path=str(one_stage1), **run)
    fingerprint = read_config(tmp_path / "out" / "lmtp").tokenizer_fingerprint
    assert fingerprint == base_fingerprint(str(one if method == "lora" else tmp_path / "out"))
    assert base_fingerprint(str(one)) != base_fingerprint(str(tmp_path / "out"))
    model = {"model_name_or_path": tmp_path / "out"}
    if method == "lora":
        model = {"model_name_or_path": one, "adapter_name_or_path": tmp_path / "out"}
    runs.export(**model, export_dir=tmp_path / "export", lmtp_export="heads", template="gemma2")
    assert load_model(str(tmp_path / "export")) and load_model(str(tmp_path / "out"))


def test_resuming_with_a_template_that_adds_tokens(one_stage1, one, data, tmp_path):
    """The checkpoint carries the run's tokenizer, the heads that the run began with that of the base."""
    run = {"stage": "lmtp2", "template": "gemma2", "stage1_pretrained_path": str(one_stage1), "max_steps": 4}
    run |= {"save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": None}
    whole = runs.train(one, data, tmp_path / "out", **run)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert runs.step_losses(runs.train(one, data, tmp_path / "out", **run)) == runs.step_losses(whole)


def test_a_template_s_tokens_with_resize_vocab(one, one_stage1, data, tmp_path):
    run = {"template": "gemma2", "resize_vocab": True}
    train = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(one_stage1)}
    runs.train(one, data, tmp_path / "out", **train, **run)
    assert read_config(tmp_path / "out" / "lmtp").vocab_size == GROWN
    model = {"model_name_or_path": one, "adapter_name_or_path": tmp_path / "out"}
    runs.export(**model, **run, export_dir=tmp_path / "export", lmtp_export="heads")
    assert load_model(str(tmp_path / "export")) and load_model(str(tmp_path / "out"))
    with pytest.raises(LMTPError, match=re.escape("were trained with 1 new token (<eos>), which")):
        runs.export(**model, export_dir=tmp_path / "refused", lmtp_export="heads", template="gemma2")


def test_resize_vocab_without_new_tokens_is_an_ordinary_run(one, one_stage1, data, tmp_path):
    run = {"stage": "lmtp2", "finetuning_type": "lora", "resize_vocab": True}
    runs.train(one, data, tmp_path, stage1_pretrained_path=str(one_stage1), **run)
    before, after = read_config(one_stage1 / "lmtp"), read_config(tmp_path / "lmtp")
    assert (after.vocab_size, after.tokenizer_fingerprint) == (before.vocab_size, before.tokenizer_fingerprint)


def test_a_new_adapter_on_one_with_new_tokens(one, one_adapter, data, tmp_path):
    run = {"adapter_name_or_path": str(one_adapter), "finetuning_type": "lora", "create_new_adapter": True}
    trained = runs.train(one, data, tmp_path / "out", **run, **STAGE2, **KEYS)
    assert_grown(tmp_path / "out")
    both = f"{one_adapter},{tmp_path / 'out'}"
    model = {"model_name_or_path": one, "adapter_name_or_path": both, "infer_dtype": "float32"}
    runs.export(**model, **KEYS, export_dir=tmp_path / "export", lmtp_export="heads")
    assert_grown(tmp_path / "export")
    runs.train_only_evaluates(tmp_path / "export", data, tmp_path / "scored", **STAGE2)
    scored = json.loads((tmp_path / "scored" / "eval_results.json").read_text())
    expected = next(entry for entry in trained if "eval_loss" in entry)
    assert scored["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


def test_new_tokens_for_an_adapter_that_has_none(one, one_stage1, data, tmp_path):
    run = {"stage": "lmtp2", "finetuning_type": "lora"}
    runs.train(one, data, tmp_path / "old", stage1_pretrained_path=str(one_stage1), **run)
    runs.train(one, data, tmp_path / "out", adapter_name_or_path=str(tmp_path / "old"), **run, **KEYS)
    assert_grown(tmp_path / "out")
    model = {"model_name_or_path": one, "adapter_name_or_path": tmp_path / "out"}
    runs.export(**model, **KEYS, export_dir=tmp_path / "export", lmtp_export="heads", infer_dtype="float32")
    ours, whole = load_model(str(tmp_path / "out")), load_model(str(tmp_path / "export"))
    ids = torch.tensor([[20, KNOWN, 30]])
    torch.testing.assert_close(ours(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_resuming(one, one_stage1, data, tmp_path):
    run = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(one_stage1), "max_steps": 4,
           "save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": None, **KEYS}  # fmt: skip
    whole = runs.train(one, data, tmp_path, **run)
    resumed = runs.train(one, data, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **run)
    assert runs.step_losses(resumed) == pytest.approx(runs.step_losses(whole), rel=1e-6)
    assert_grown(tmp_path / "checkpoint-2")


def test_keys_that_are_left_out_are_named(one, one_adapter, data, tmp_path, no_model_loads):
    expected = (
        "were trained with 2 new tokens (<think>, <done>), which .* lacks: write add_tokens, add_special_tokens, "
        "resize_vocab and template as in that training."
    )
    model = {"model_name_or_path": str(one), "adapter_name_or_path": str(one_adapter)}
    refused = pytest.raises(LMTPError, match=re.escape(expected).replace(r"\.\*", ".*"))
    with refused:
        runs.export(**model, export_dir=tmp_path / "export", lmtp_export="heads")
    with refused:
        chat_models.chat_model(**{"model": model.pop("model_name_or_path")}, **model)
    with refused:
        runs.train(one, data, tmp_path / "out", stage="lmtp2", finetuning_type="lora", **model)
    with refused:
        run = {"stage": "lmtp2", "finetuning_type": "lora", "add_tokens": TOKENS[0]}
        runs.train(one, data, tmp_path / "out", **run, **model)


def test_heads_without_the_new_tokens_are_refused_where_nothing_trains_them(one, one_stage1, tmp_path, no_model_loads):
    with pytest.raises(
        LMTPError, match="know nothing of the tokens that add_tokens, add_special_tokens or resize_vocab"
    ):
        chat_models.chat_model(one, stage1_pretrained_path=str(one_stage1), **KEYS)


def test_heads_of_another_model_are_refused_with_new_tokens_too(one_stage1, data, tmp_path, no_model_loads):
    other = tiny_models.save_llama(tmp_path / "other", vocab_size=KNOWN + 1)
    with pytest.raises(LMTPError, match=r"vocabulary size 356\), not to .*other \(vocabulary size 357"):
        run = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(one_stage1)}
        runs.train(other, data, tmp_path / "out", **run, **KEYS)


def test_an_adapter_on_another_base_is_refused(one, one_adapter, tmp_path):
    """Its tokenizer is not the other base's with tokens added."""
    config = one_adapter / "adapter_config.json"
    other = tiny_models.save_llama(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(other)
    copy = tmp_path / "adapter"
    shutil.copytree(one_adapter, copy)
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(other)}
    (copy / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(LMTPError, match="These leap heads belong to"):
        load_model(str(copy))
