"""The source of a run's heads: resolved once, read everywhere, and no key."""

import json
import pickle
import shutil
from collections import Counter

import huggingface_hub
import pytest
from helpers import chat_models, tiny_models
from helpers import llamafactory_runs as runs

from lmtp_factory import LMTPConfig, LMTPError
from lmtp_factory.modeling import heads_of
from lmtp_factory.plugin import heads_source
from lmtp_factory.plugin.heads_source import HeadsSource


@pytest.fixture
def counted(monkeypatch):
    """Number of resolutions, and of the times that each path was asked for heads."""
    from lmtp_factory.plugin.seams.hparams import parser

    calls = Counter()

    def counting(name, function):
        def count(*args, **kwargs):
            calls[name if name == "resolve" else str(args[0])] += 1
            return function(*args, **kwargs)

        return count

    for name in ("resolve_training", "resolve_inference"):
        monkeypatch.setattr(parser, name, counting("resolve", getattr(parser, name)))
    monkeypatch.setattr(heads_source, "find_heads", counting("find", heads_source.find_heads))
    return calls


def test_training_asks_once(llama, data, stage1, tmp_path, counted, lines):
    stage2 = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(stage1)}
    runs.train(llama, data, tmp_path / "out", hidden_cache_dir=None, **stage2)
    assert counted == {"resolve": 1, str(stage1): 1}
    assert f"Leap heads start from {stage1}/lmtp." in lines


def test_fresh_heads_are_looked_for_once(llama, data, tmp_path, counted):
    runs.train(llama, data, tmp_path / "out", hidden_cache_dir=str(tmp_path / "cache"))
    assert counted == {"resolve": 1, str(llama): 1}


@pytest.mark.parametrize("export", ["heads", "ntp"])
def test_an_export_asks_once(export, llama, stage1, tmp_path, counted, lines):
    runs.export(
        model_name_or_path=llama, stage1_pretrained_path=stage1, export_dir=tmp_path / "export", lmtp_export=export
    )
    assert counted == {"resolve": 1, str(llama): 1, str(stage1): 1}
    said = "with" if export == "heads" else "without"
    assert f"Exporting {said} the leap heads of {stage1}/lmtp." in lines


def test_chat_asks_once(ending, counted):
    model = chat_models.chat_model(ending)
    assert heads_of(model.engine.model) is not None
    assert counted == {"resolve": 1, str(ending): 1}


def test_arguments_other_than_the_source_stay_as_they_are_written(llama, stage1, data, tmp_path):
    from llamafactory.hparams import get_train_args

    written = runs.arguments(llama, data, tmp_path / "out", stage="lmtp2", stage1_pretrained_path=str(stage1))
    model_args, _, training_args, finetuning_args, _ = get_train_args(written)
    source = finetuning_args.heads_source
    assert (source.folder, source.resumed, source.packs_batches) == (stage1 / "lmtp", None, False)
    assert source.config.offsets == (1, 3, 5, 7) and source.reach == 7
    assert model_args.model_name_or_path == source.base.path == str(llama)
    assert training_args.resume_from_checkpoint is None
    assert not (tmp_path / "out").exists()  # checks write nothing
    assert "heads_source" not in finetuning_args.to_dict()
    again = pickle.loads(pickle.dumps(finetuning_args))
    assert again == finetuning_args
    assert again.heads_source.folder == source.folder
    assert again.heads_source.config.to_dict() == source.config.to_dict()


def test_an_output_that_does_not_exist_yet_is_not_looked_for_on_the_hub(llama, data, tmp_path, monkeypatch):
    """The hub cannot be reached here, so a request for the id out/stage1 would fail."""
    from llamafactory.hparams import get_train_args

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    written = runs.arguments(llama, data, "out/stage1", stage1_pretrained_path="out/stage1")
    assert get_train_args(written)[3].heads_source.folder is None
    written = runs.arguments(llama, data, "out/stage1", stage1_pretrained_path="out/other")
    with pytest.raises(LMTPError, match="No directory out/other exists, and the hub request for it failed"):
        get_train_args(written)


@pytest.fixture
def asked(monkeypatch):
    """Options that the hub, which has no heads, was asked with for each repository."""
    options = {}

    def find(path, **hub_options):
        options[str(path)] = hub_options

    monkeypatch.setattr(heads_source, "find_heads", find)
    return options


HUB = {"model_revision": "tuned", "hf_hub_token": "hf_secret", "cache_dir": "/own/cache"}
ACCESS = {"token": "hf_secret", "cache_dir": "/own/cache"}


def inference_arguments(tmp_path, **keys):
    from llamafactory.hparams import get_infer_args

    written = {"model_name_or_path": "some/model", "template": "llama3", "export_dir": str(tmp_path / "export"), **keys}
    return get_infer_args(written)[2]


def test_an_export_asks_the_hub_as_upstream_does(tmp_path, asked):
    """Upstream loads an adapter from the model's revision."""
    named = {"adapter_name_or_path": "some/adapter", "stage1_pretrained_path": "some/heads"}
    assert inference_arguments(tmp_path, **HUB, **named).heads_source is None
    of_model = {"revision": "tuned", **ACCESS}
    assert asked == {"some/adapter": of_model, "some/model": of_model, "some/heads": ACCESS}


def test_training_asks_the_hub_as_upstream_does(data, tmp_path, asked, monkeypatch):
    from llamafactory.hparams import get_train_args

    monkeypatch.setattr(heads_source, "_fresh_config", lambda *args: LMTPConfig(hidden_size=32, vocab_size=512))
    get_train_args(runs.arguments("some/model", data, tmp_path / "out", **HUB))
    assert asked == {"some/model": {"revision": "tuned", **ACCESS}}
    asked.clear()
    run = HUB | {"stage": "lmtp2", "adapter_name_or_path": "some/adapter", "stage1_pretrained_path": "some/heads"}
    with pytest.raises(LMTPError, match="some/heads has no lmtp/ folder"):
        get_train_args(runs.arguments("some/model", data, tmp_path / "out", finetuning_type="lora", **run))
    assert asked == {"some/adapter": {"revision": "tuned", **ACCESS}, "some/heads": ACCESS}


def test_a_plain_export_does_without_an_answer_of_the_hub(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = {"cache_dir": str(tmp_path / "empty")}
    assert inference_arguments(tmp_path, **cache).heads_source is None
    assert any("the hub request for it failed" in line and "Exporting as a model without" in line for line in lines)
    for keys in ({"lmtp_export": "heads"}, {"stage1_pretrained_path": "some/heads"}, {"stage": "lmtp2"}):
        with pytest.raises(LMTPError, match="the hub request for it failed"):
            inference_arguments(tmp_path, **cache, **keys)


@pytest.fixture
def with_other_heads(llama, stage1, tmp_path):
    """The base model with heads of its own, as an export leaves it."""
    model = shutil.copytree(llama, tmp_path / "with_other_heads")
    shutil.copytree(stage1 / "lmtp", model / "lmtp")
    return model


EVALUATES = {"do_train": None, "do_eval": True, "val_size": 4}


@pytest.mark.parametrize("purpose", [{}, EVALUATES], ids=["training", "evaluation"])
@pytest.mark.parametrize("stage", ["lmtp1", "lmtp2"])
def test_named_heads_come_before_the_model_s(stage, purpose, with_other_heads, stage1, data, tmp_path):
    from llamafactory.hparams import get_train_args

    def folder(**keys):
        written = runs.arguments(with_other_heads, data, tmp_path / "out", stage=stage, **purpose, **keys)
        return get_train_args(written)[3].heads_source.folder

    assert folder() == with_other_heads / "lmtp"
    assert folder(stage1_pretrained_path=str(stage1)) == stage1 / "lmtp"


def test_an_adapter_s_heads_come_first_in_stage_two(adapter, with_other_heads, stage1, data, tmp_path):
    from llamafactory.hparams import get_train_args

    for purpose in ({}, EVALUATES):
        keys = {"adapter_name_or_path": str(adapter), "stage1_pretrained_path": str(stage1), "finetuning_type": "lora"}
        written = runs.arguments(with_other_heads, data, tmp_path / "out", stage="lmtp2", **keys, **purpose)
        assert get_train_args(written)[3].heads_source.folder == adapter / "lmtp"


@pytest.mark.parametrize("stage", ["lmtp1", "lmtp2"])
def test_an_evaluation_of_named_heads_that_are_not_there(stage, with_other_heads, data, tmp_path, no_model_loads):
    """The model's own heads would give figures of something else."""
    run = EVALUATES | {"stage": stage, "stage1_pretrained_path": str(tmp_path / "out")}
    with pytest.raises(
        LMTPError, match=r"out has no lmtp/ folder: name the output_dir of a finished stage 1, or leave the key out\.$"
    ):
        runs.train(with_other_heads, data, tmp_path / "out", **run)


def test_the_source_is_frozen(llama):
    source = HeadsSource(heads_source.BaseModel(str(llama)), None, None)
    with pytest.raises(AttributeError):
        source.folder = llama


def test_the_yaml_of_a_stage_exports_too_although_export_dir_trains_nothing(llama, data, stage1, tmp_path, lines):
    """`export_dir` in a training YAML changes nothing; `stage` in an export's neither."""
    run = {"stage": "lmtp2", "finetuning_type": "full", "stage1_pretrained_path": str(stage1)}
    runs.train(llama, data, tmp_path / "out", export_dir=str(tmp_path / "unused"), max_steps=1, **run)
    assert (tmp_path / "out" / "lmtp" / "model.safetensors").is_file() and not (tmp_path / "unused").exists()
    runs.export(model_name_or_path=llama, export_dir=tmp_path / "export", lmtp_export="heads", **run)
    assert (tmp_path / "export" / "lmtp" / "model.safetensors").is_file()


def test_arguments_that_were_not_parsed_are_refused_for_a_stage(llama):
    from llamafactory.hparams import FinetuningArguments, ModelArguments
    from llamafactory.model import load_model, load_tokenizer

    model_args = ModelArguments(model_name_or_path=str(llama))
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    with pytest.raises(ValueError, match="lack the source of its heads: make them with get_train_args"):
        load_model(tokenizer, model_args, FinetuningArguments(stage="lmtp2", finetuning_type="full"))


def test_a_backbone_that_projects_its_embeddings(data, tmp_path):
    """The LM head of such an OPT reads states of the embeddings' width, so fresh heads and cached states have that width."""
    opt = tiny_models.save(tiny_models.opt(), tmp_path / "opt")
    run = {"hidden_cache_dir": str(tmp_path / "cache"), "save_strategy": "steps", "save_steps": 2}
    runs.train(opt, data, tmp_path / "out", overwrite_output_dir=None, **run | {"max_steps": 2})
    runs.train(opt, data, tmp_path / "out", overwrite_output_dir=None, **run)
    assert runs.history(tmp_path / "out")[-1]["step"] == 4
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["hidden_size"] == 16
    assert json.loads((tmp_path / "out" / "lmtp" / "config.json").read_text())["hidden_size"] == 16
