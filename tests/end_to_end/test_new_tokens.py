"""Stage 2 with new tokens: heads grow with the vocabulary, and all that reads its output goes on from there."""

import json
from itertools import product

import pytest
import torch
from helpers import chat_models, tiny_models
from helpers import llamafactory_runs as runs
from helpers.new_tokens import GROWN, KEYS, KNOWN, STAGE2, assert_grown, save_dataset
from safetensors.torch import load_file
from transformers import AutoConfig

from lmtp_factory import load_model
from lmtp_factory.modeling.checkpoint import load_heads


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    save_dataset(directory)
    return directory


COMBINATIONS = [
    ("tied", "own", "lora"),
    ("untied", "shared", "full"),
    *(
        pytest.param(combination, marks=pytest.mark.slow)
        for combination in product(("tied", "untied"), ("own", "shared"), ("lora", "full"))
        if combination not in (("tied", "own", "lora"), ("untied", "shared", "full"))
    ),
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda combination: "-".join(combination))
def combination(request):
    """Embeddings, kind of the heads, and how stage 2 tunes."""
    return request.param


@pytest.fixture(scope="module")
def base(combination, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / f"{combination[0]}-llama"
    return tiny_models.save_llama(directory, tie=combination[0] == "tied")


@pytest.fixture(scope="module")
def stage1(combination, base, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "stage1"
    runs.train(base, data, output, head_kind=combination[1])
    return output


@pytest.fixture(scope="module")
def trained(combination, base, stage1, data, tmp_path_factory):
    """How the output of stage 2 with new tokens is written in a YAML, and the directory."""
    output, method = tmp_path_factory.mktemp("runs") / combination[2], combination[2]
    runs.train(base, data, output, finetuning_type=method, stage1_pretrained_path=str(stage1), **STAGE2, **KEYS)
    adapter = {"model_name_or_path": str(base), "adapter_name_or_path": str(output), **KEYS}
    return (adapter if method == "lora" else {"model_name_or_path": str(output)}), output


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "export"
    runs.export(**trained[0], export_dir=directory, lmtp_export="heads", infer_dtype="float32")
    return directory


def steps(entries):
    return [entry for entry in entries if "loss" in entry]


def test_heads_grow_with_the_vocabulary(stage1, trained):
    heads, before = assert_grown(trained[1]), load_heads(stage1)
    assert before.config.vocab_size == KNOWN
    for old, new in zip(before.heads, heads.heads, strict=True):
        if new.unembed is not None:
            torch.testing.assert_close(new.unembed.weight[:KNOWN], old.unembed.weight, rtol=0, atol=0.2)
            assert new.unembed.weight[KNOWN : KNOWN + 2].abs().sum() > 0


def test_evaluation_gives_what_training_did(combination, trained, data, tmp_path):
    model, method = dict(trained[0]), combination[2]
    expected = next(entry for entry in runs.history(trained[1]) if "eval_loss" in entry)
    runs.train_only_evaluates(
        model.pop("model_name_or_path"), data, tmp_path, finetuning_type=method, **STAGE2, **model
    )
    scored = json.loads((tmp_path / "eval_results.json").read_text())
    for head in range(4):
        assert scored[f"eval_loss_head_{head}"] == pytest.approx(expected[f"eval_loss_head_{head}"], rel=1e-4)


def test_exports(trained, exported, tmp_path):
    runs.export(**trained[0], export_dir=tmp_path / "ntp", infer_dtype="float32")
    heads, kept = assert_grown(exported), load_heads(trained[1])
    assert all(torch.equal(heads.state_dict()[name], tensor) for name, tensor in kept.state_dict().items())
    one, two = (load_file(directory / "model.safetensors") for directory in (exported, tmp_path / "ntp"))
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)
    assert AutoConfig.from_pretrained(exported).vocab_size == GROWN
    assert not (tmp_path / "ntp" / "lmtp").exists()


def test_load_model_is_the_export(trained, exported):
    ids = torch.tensor([[20, 30, KNOWN, 40, KNOWN + 1, 50]])
    ours, whole = load_model(str(trained[1])), load_model(str(exported))
    with torch.no_grad():
        logits = ours(input_ids=ids).logits
        torch.testing.assert_close(logits, whole(input_ids=ids).logits)
    assert logits.shape[-1] == GROWN
    answers = [whole.generate(ids, max_new_tokens=12, do_sample=False, lmtp_decode=how) for how in ("backward", "off")]
    assert torch.equal(*answers)


def test_chat(trained, exported):
    answers = []
    for args in (trained[0], {"model_name_or_path": str(exported)}):
        args = dict(args)
        model = chat_models.chat_model(args.pop("model_name_or_path"), lmtp_decode="backward", **args)
        answers.append(chat_models.ask(model, max_new_tokens=8))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_further_tuning_from_the_export(method, trained, exported, data, tmp_path):
    entries = runs.train(exported, data, tmp_path, finetuning_type=method, **STAGE2)
    assert steps(entries)[0]["loss_head_0"] < steps(runs.history(trained[1]))[0]["loss_head_0"] - 1
    assert_grown(tmp_path)
    assert load_model(str(tmp_path)).leap_heads.config.vocab_size == GROWN


def test_a_second_stage_two(combination, base, trained, data, tmp_path):
    """From the output itself, and from its heads on the base model with the same new tokens."""
    model, method = dict(trained[0]), combination[2]
    entries = runs.train(
        model.pop("model_name_or_path"), data, tmp_path / "on", finetuning_type=method, **STAGE2, **model
    )
    before = steps(runs.history(trained[1]))
    assert steps(entries)[0]["loss_head_1"] < before[0]["loss_head_1"] - 0.3
    assert_grown(tmp_path / "on")
    run = {"finetuning_type": "lora", "stage1_pretrained_path": str(trained[1])}
    runs.train(base, data, tmp_path / "again", **run, **STAGE2, **KEYS)
    assert_grown(tmp_path / "again")
