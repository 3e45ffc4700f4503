"""The files under ``configs/``: one naming scheme, known to upstream's parser, and each model's three fit together."""

import contextlib
import re

import pytest
import torch
from helpers import tiny_data
from helpers.recipes import CONFIGS, KINDS, MODELS, ROOT, STAND_INS, read, stand_in
from transformers import AutoConfig
from transformers.integrations import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

from lmtp_factory import LMTPConfig
from lmtp_factory.modeling import LeapHeads, save_heads
from lmtp_factory.plugin.dataset_names import dataset_info


GEOMETRY = ("num_heads", "leap_stride", "head_layers", "head_kind")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny stand-ins, and ``data``."""
    directory = tmp_path_factory.mktemp("bases")
    tiny_data.save_dataset(directory / "data")
    return {name: model.save(directory / name) for name, model in STAND_INS.items()} | {"data": directory / "data"}


def write_heads(folder, keys, base):
    """Untrained heads of the geometry in ``keys``, as stage 1 would leave them."""
    text = AutoConfig.from_pretrained(base).get_text_config()
    config = LMTPConfig(
        keys["num_heads"], keys["leap_stride"], hidden_size=text.hidden_size, vocab_size=text.vocab_size
    )
    save_heads(LeapHeads(config), folder / "lmtp")


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_for_each_model(kind):
    assert {path.name for path in (CONFIGS / kind).iterdir()} == {f"{model}.yaml" for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_three_files_chain(model):
    s1, s2, merge = (read(kind, model) for kind in KINDS)
    assert (s1["stage"], s2["stage"]) == ("lmtp1", "lmtp2")
    assert s2["stage1_pretrained_path"] == s1["output_dir"]
    assert merge["adapter_name_or_path"] == s2["output_dir"]
    assert len({s1["output_dir"], s2["output_dir"], merge["export_dir"]}) == 3
    for key in ("model_name_or_path", "template"):
        assert s1[key] == s2[key] == merge[key], key
    assert [s1[key] for key in GEOMETRY] == [s2[key] for key in GEOMETRY]
    assert LMTPConfig(s1["num_heads"], s1["leap_stride"]).offsets == (1, 3, 5, 7)
    assert not any(str(value).startswith(("/", "..", "~")) for keys in (s1, s2, merge) for value in keys.values())


def test_models_share_nothing_that_one_would_overwrite():
    outputs = (("s1", "output_dir"), ("s2", "output_dir"), ("merge", "export_dir"))
    written = [read(kind, model)[key] for kind, key in outputs for model in MODELS]
    assert len(set(written)) == len(written)
    assert len({read("s1", model)["dataset"] for model in MODELS}) == len(MODELS)  # each model's own answers


@pytest.mark.parametrize("model", MODELS)
def test_datasets_are_registered(model):
    assert read("s1", model)["dataset"] in dataset_info()
    assert read("s2", model)["dataset"] in dataset_info()


@pytest.mark.parametrize("kind", ["s1", "s2"])
@pytest.mark.parametrize("model", MODELS)
def test_upstream_parses_training(kind, model, bases, tmp_path, monkeypatch):
    from llamafactory.hparams import get_train_args

    monkeypatch.chdir(tmp_path)
    keys = read(kind, model)
    if kind == "s2":
        write_heads(tmp_path / read("s1", model)["output_dir"], keys, bases[model])
    # bf16 is refused without a GPU unless the CPU is asked for
    parsed = get_train_args(stand_in(keys, bases[model], bases["data"]) | {"use_cpu": True})
    model_args, data_args, training_args, finetuning_args, _ = parsed

    assert finetuning_args.stage == "sft" and finetuning_args.lmtp_stage == KINDS.index(kind) + 1
    assert finetuning_args.heads_config().offsets == (1, 3, 5, 7)
    assert model_args.compute_dtype == torch.bfloat16
    assert data_args.template == keys["template"]
    assert isinstance(training_args.learning_rate, float) and training_args.learning_rate == keys["learning_rate"]
    assert training_args.get_warmup_steps(1000) == 100  # warmup_ratio is an old name that may stop counting
    assert training_args.resume_from_checkpoint is None
    assert training_args.report_to in ([], ["none"])


@pytest.mark.parametrize("model", MODELS)
def test_upstream_parses_export(model, bases, tmp_path, monkeypatch):
    from llamafactory.hparams import get_infer_args

    monkeypatch.chdir(tmp_path)
    model_args, data_args, finetuning_args, _ = get_infer_args(stand_in(read("merge", model), bases[model]))
    assert model_args.adapter_name_or_path == [read("s2", model)["output_dir"]]
    assert finetuning_args.lmtp_export == "ntp" and finetuning_args.lmtp_stage is None
    assert data_args.template == read("s1", model)["template"]


def test_a_key_that_nobody_knows_is_refused(bases, tmp_path):
    """Or the two tests above would prove little."""
    from llamafactory.hparams import get_train_args

    keys = stand_in(read("s1", MODELS[0]), bases[MODELS[0]], bases["data"]) | {
        "use_cpu": True,
        "output_dir": str(tmp_path),
    }
    with pytest.raises(ValueError, match="leap_strides"):
        get_train_args(keys | {"leap_strides": 2})


def test_commands_in_comments_name_files_that_exist():
    files = [*CONFIGS.glob("*/*.yaml"), CONFIGS / "README.md"]
    named = {path for file in files for path in re.findall(r"configs/[\w./-]+\.(?:yaml|json)", file.read_text("utf-8"))}
    assert len(named) > len(MODELS) * len(KINDS)
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []


@contextlib.contextmanager
def deepspeed_config(path):
    """As the Trainer reads it; while it exists, transformers takes the whole process for a DeepSpeed run."""
    try:
        yield HfTrainerDeepSpeedConfig(str(path))
    finally:
        unset_hf_deepspeed_config()


@pytest.mark.parametrize("model", ["qwen2.5-3b", "gemma3-4b"])  # Gemma's width is one level deeper
@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_trainer_fills_every_auto_of_deepspeed(name, model, bases, tmp_path):
    from transformers import AutoModelForCausalLM, TrainingArguments

    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, bf16=True, per_device_train_batch_size=3, gradient_accumulation_steps=5
    )
    network = AutoModelForCausalLM.from_pretrained(bases[model])
    with deepspeed_config(CONFIGS / "deepspeed" / f"{name}.json") as config:
        config.trainer_config_process(arguments)
        config.trainer_config_finalize(arguments, network, num_training_steps=10)
        assert "auto" not in str(config.config)
        assert config.config["bf16"]["enabled"] and not config.config["fp16"]["enabled"]
        assert config.config["train_batch_size"] == 15
        assert config.config["zero_optimization"]["stage"] == (2 if name == "zero2" else 3)
        assert config.is_offload() == name.endswith("offload")
        if name != "zero2":  # or a full stage 2 would save nothing but shards
            assert config.config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
