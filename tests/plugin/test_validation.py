"""Every mistake ends in one sentence that says what to write instead, before the model loads."""

import json
import re
import shutil
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import llamafactory_runs as runs
from helpers import tiny_models
from transformers import PretrainedConfig, Qwen2_5_VLConfig

from lmtp_factory import LMTPError
from lmtp_factory.plugin import validation
from lmtp_factory.plugin.seams.hparams.parser import extend
from lmtp_factory.plugin.versions import pads_packed_positions


CONFIGURATION = [
    ({"num_heads": 0}, "num_heads is 0, but L-MTP needs at least one extra head: write num_heads: 1 or more."),
    ({"leap_stride": 0}, "leap_stride is 0"),
    ({"leap_offsets": "3,2"}, "leap_offsets is 3,2, but the extra heads' offsets have to rise"),
    ({"leap_offsets": "1,3"}, "have to rise and to be above 1"),
    (
        {"leap_offsets": "two"},
        "leap_offsets is 'two', but it has to be whole numbers: write for instance leap_offsets: 2",
    ),
    ({"leap_offsets": "2.5,3"}, "leap_offsets is '2.5,3'"),
    ({"leap_offsets": [2.5, 4]}, "leap_offsets is [2.5, 4]"),
    ({"leap_offsets": [True, 4]}, "leap_offsets is [True, 4]"),
    ({"leap_offsets": 2.5}, "leap_offsets is 2.5"),
    ({"leap_offsets": True}, "leap_offsets is True"),
    ({"leap_offsets": {"near": 2}}, "leap_offsets is {'near': 2}"),
    ({"leap_offsets": ""}, "leap_offsets is ''"),
    ({"leap_offsets": "2,3,6", "num_heads": 2}, "names 3 heads but num_heads says 2"),
    ({"leap_offsets": "2,3,6", "leap_stride": 2}, "does not leap by leap_stride 2"),
    ({"head_kind": "both"}, "head_kind is 'both', but it has to be one of own, shared"),
    ({"head_kind": ["own"]}, "head_kind is ['own'], but it has to be one of own, shared"),
    ({"head_layers": 0}, "head_layers is 0"),
    ({"head_layers": "1"}, "head_layers is '1', but it has to be a whole number: write for instance head_layers: 1."),
    ({"head_weight": -1.0, "stage": "lmtp2"}, "head_weight is -1.0, but it has to be a number of 0 or more"),
    ({"head_weight": float("nan"), "stage": "lmtp2"}, "head_weight is nan, but it has to be a number of 0 or more"),
    ({"head_weight": float("inf"), "stage": "lmtp2"}, "head_weight is inf"),
    ({"head_weight": True, "stage": "lmtp2"}, "head_weight is True"),
    ({"head_weight": "0.1", "stage": "lmtp2"}, "head_weight is '0.1'"),
    ({"mtp_type": "lmtp3", "stage": "sft"}, "mtp_type is 'lmtp3'"),
    ({"mtp_type": "lmtp2"}, "stage says lmtp1 but mtp_type says lmtp2"),
    ({"mtp_type": "lmtp1", "stage": "dpo"}, "goes with stage: sft"),
    ({"lmtp_export": "both"}, "lmtp_export is 'both'"),
    ({"cutoff_len": 7}, "cutoff_len 7 leaves the farthest head (+7 tokens) without a target: write cutoff_len: 8"),
    ({"packing": True, "cutoff_len": 100}, "write cutoff_len: 104"),
    ({"finetuning_type": "lora"}, "write finetuning_type: full"),
    ({"finetuning_type": "oft", "stage": "lmtp2"}, "write lora, full or freeze"),
    ({"train_lm_head": True}, "Stage 1 keeps the LM head frozen"),
    (
        {"train_lm_head": True, "stage": "lmtp2", "finetuning_type": "freeze"},
        "train_lm_head does not go with finetuning_type: freeze here, because the model's LM head is tied to its "
        "embeddings: write finetuning_type: lora and train_lm_head: true.",
    ),
    (
        {"freeze_extra_modules": "lm_head", "stage": "lmtp2", "finetuning_type": "freeze"},
        "freeze_extra_modules: lm_head does not go with finetuning_type: freeze here",
    ),
    ({"resize_vocab": True}, "resize_vocab would make embeddings that stage 1 neither trains nor saves"),
    ({"add_tokens": "<new>"}, "add_tokens would make embeddings"),
    ({"num_heads": 2.5}, "num_heads is 2.5, but it has to be a whole number"),
    ({"leap_stride": "two"}, "leap_stride is 'two', but it has to be a whole number"),
    ({"num_heads": True}, "num_heads is True, but it has to be a whole number"),
    ({"num_heads": float("nan")}, "num_heads is nan, but it has to be a whole number"),
    ({"num_heads": [3]}, "num_heads is [3], but it has to be a whole number"),
    ({"leap_stride": False}, "leap_stride is False, but it has to be a whole number"),
    ({"head_decay": "x"}, "head_decay is 'x', but it has to be a number above 0: write for instance head_decay: 1.0."),
    ({"head_decay": float("nan")}, "head_decay is nan, but it has to be a number above 0"),
    ({"head_decay": float("-inf")}, "head_decay is -inf"),
    ({"head_decay": 0.0}, "head_decay is 0.0"),
    ({"head_decay": True}, "head_decay is True"),
    (
        {"head_learning_rate": 0, "stage": "lmtp2"},
        "head_learning_rate is 0, but it has to be a number above 0: write for",
    ),
    ({"head_learning_rate": "1e-3", "stage": "lmtp2"}, "head_learning_rate is '1e-3'"),
    ({"head_learning_rate": True, "stage": "lmtp2"}, "head_learning_rate is True"),
    (
        {"head_learning_rate": 1e-3},
        "Stage 1 trains only the heads, so head_learning_rate: 0.001 stands beside no other: write learning_rate: 0.001 "
        "instead.",
    ),
    *(
        (
            {"head_learning_rate": 1e-3, "stage": "lmtp2", "finetuning_type": "full"} | keys,
            f"head_learning_rate does not go with {name}, because its optimizer has one learning rate for all",
        )
        for name, keys in (
            ("use_galore", {"use_galore": True}),
            ("use_apollo", {"use_apollo": True}),
            ("use_adam_mini", {"use_adam_mini": True}),
            ("use_muon", {"use_muon": True}),
            ("optim: lomo", {"optim": "lomo"}),
            ("optim: apollo_adamw", {"optim": "apollo_adamw", "optim_target_modules": "all-linear"}),
        )
    ),
    (
        {"loraplus_lr_ratio": 16.0, "stage": "lmtp2", "finetuning_type": "lora"},
        "loraplus_lr_ratio would also multiply the learning rate of the heads' biases: leave it out, or tune with it in",
    ),
    (
        {"head_inputs": "layers", "hidden_cache_dir": "cache"},
        "hidden_cache_dir does not go with head_inputs: layers, because 2 states of 32 x 2 bytes would be kept of each "
        "token (128 bytes, 122.07 MB a million tokens): leave hidden_cache_dir out, or write head_inputs: state.",
    ),
    ({"head_inputs": "layers", "torch_compile": True}, "torch_compile does not go with head_inputs: layers"),
    ({"head_inputs": "layers", "head_backs": 2}, "head_backs is 2, but heads that read the state alone fit any place"),
    ({"train_lm_head": "false", "stage": "lmtp2"}, "train_lm_head is 'false', but it has to be true or false"),
    ({"train_lm_head": 1, "stage": "lmtp2"}, "train_lm_head is 1, but it has to be true or false"),
    (
        {"stage1_pretrained_path": ["a", "b"]},
        "stage1_pretrained_path is ['a', 'b'], but it has to be the path of one dir",
    ),
    ({"stage1_pretrained_path": ""}, "stage1_pretrained_path is ''"),
    ({"stage1_pretrained_path": 1}, "stage1_pretrained_path is 1"),
    ({"hidden_cache_dir": True}, "hidden_cache_dir is True, but it has to be the path of one directory: write for"),
    ({"hidden_cache_dir": ""}, "hidden_cache_dir is ''"),
    ({"hidden_cache_dir": " "}, "hidden_cache_dir is ' '"),
    ({"lmtp_loss": 3}, "lmtp_loss is 3, but it has to be one of auto, triton, torch, eager"),
    ({"lmtp_loss": ["torch"]}, "lmtp_loss is ['torch'], but it has to be one of auto, triton, torch, eager"),
    ({"lmtp_export": ["heads"]}, "lmtp_export is ['heads'], but it has to be one of ntp, heads"),
    ({"lmtp_decode": 1}, "lmtp_decode is 1, but it has to be one of auto, backward, forward, off"),
    ({"mtp_type": ["lmtp1"], "stage": "sft"}, "mtp_type is ['lmtp1'], but it has to be one of lmtp1, lmtp2"),
    ({"do_train": None, "do_eval": True, "val_size": 4}, "There are no leap heads to evaluate"),
    ({"lmtp_loss": "fast"}, "lmtp_loss is 'fast', but it has to be one of auto, triton, torch, eager"),
    ({"use_unsloth": True}, "do not run with use_unsloth"),
    ({"use_kt": True}, "do not run with use_kt"),
    ({"mixture_of_depths": "convert"}, "do not run with mixture_of_depths"),
    ({"use_hyper_parallel": True}, "do not run with use_hyper_parallel"),
    ({"use_mca": True}, "do not run with use_mca"),
    ({"use_asft_loss": True}, "use_asft_loss replaces the loss"),
    ({"use_dft_loss": True}, "use_dft_loss replaces the loss"),
    ({"use_eaft_loss": True}, "use_eaft_loss replaces the loss"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor replaces the loss"),
    ({"use_badam": True}, "use_badam updates blocks of the backbone in turn and never the leap heads"),
    ({"use_badam": True, "stage": "lmtp2"}, "use_badam updates blocks of the backbone in turn"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha disturbs embeddings that are tuned"),
    ({"moe_aux_loss_coef": 0.01}, "moe_aux_loss_coef trains the router, which stage 1 keeps frozen"),
    ({"moe_aux_loss_coef": 0.01, "stage": "lmtp2"}, "write use_reentrant_gc: false or disable_gradient_checkpointing"),
    ({"compute_accuracy": True}, "leave compute_accuracy out"),
    ({"stage1_pretrained_path": "no/such/place", "stage": "lmtp2"}, "no/such/place has no lmtp/ folder"),
    (
        {"stage1_pretrained_path": "no/such/place"},
        "stage1_pretrained_path no/such/place has no lmtp/ folder: name the output_dir of a finished stage 1, or leave the "
        "key out to start from fresh heads.",
    ),
    ({"dataset": "mixed_Q25_3B"}, "mixed_Q25_3B"),
    ({"dataset": "self_distilled_smollm2_train"}, "write template: lmtp"),
]


@pytest.mark.parametrize(("overrides", "message"), CONFIGURATION, ids=[str(c[0]) for c in CONFIGURATION])
def test_keys_that_do_not_work_are_refused_in_one_sentence(overrides, message, llama, data, tmp_path, no_model_loads):
    if "packing" in overrides and pads_packed_positions():
        pytest.skip("this LLaMA-Factory pads packed rows whole, so every cutoff_len goes with packing")
    with pytest.raises(LMTPError, match=re.escape(message)) as caught:
        runs.train(llama, data, tmp_path, **overrides)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("key", ["dataset", "eval_dataset"])
@pytest.mark.parametrize("stage", ["sft", "lmtp2"])
@pytest.mark.parametrize("purpose", ["do_eval", "do_predict"])
def test_token_ids_are_not_read_as_text_without_training_either(
    purpose, stage, key, llama, data, stage1, tmp_path, no_model_loads
):
    """Evaluation and prediction would score digits."""
    run = {"stage": stage, "stage1_pretrained_path": str(stage1), "do_train": None, "dataset": None, purpose: True}
    run |= {"predict_with_generate": purpose == "do_predict", key: "self_distilled_smollm2_heldout"}
    run |= {"val_size": 0.5} if key == "dataset" else {}
    with pytest.raises(LMTPError, match="self_distilled_smollm2_heldout holds the token ids .* write template: lmtp"):
        runs.train(llama, data, tmp_path, **run)


def test_values_of_another_kind_outside_of_training(llama, tmp_path, no_model_loads):
    with pytest.raises(LMTPError, match="stage1_pretrained_path is 1, but it has to be the path of one directory"):
        runs.export(model_name_or_path=llama, stage1_pretrained_path=1, export_dir=tmp_path / "out")


def test_a_weight_of_nan_in_a_yaml_file_is_refused(llama, data, tmp_path, monkeypatch, no_model_loads):
    from llamafactory.train.tuner import run_exp

    path = tmp_path / "x.yaml"
    runs.write_yaml(path, runs.arguments(llama, data, tmp_path / "out", stage="lmtp2"))
    path.write_text(path.read_text().replace('"stage"', '"head_weight": .nan, "stage"'))
    monkeypatch.setattr(sys, "argv", ["train", str(path)])
    with pytest.raises(LMTPError, match="a number of 0 or more: write for instance head_weight: 0.1."):
        run_exp()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs here")
def test_a_kernel_that_the_device_cannot_run_is_refused(llama, data, tmp_path, no_model_loads):
    with pytest.raises(LMTPError, match="lmtp_loss: triton needs a CUDA device and Triton, and this is cpu"):
        runs.train(llama, data, tmp_path, lmtp_loss="triton")


def test_deepspeed_without_torchrun_is_refused_on_the_last_line(llama, data, tmp_path, no_model_loads):
    config = tmp_path / "zero2.json"
    config.write_text('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}')
    result = runs.cli(
        "train", runs.write_yaml(tmp_path / "x.yaml", runs.arguments(llama, data, tmp_path / "out", deepspeed=str(config))),
        check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "FORCE_TORCHRUN=1 llamafactory-cli train" in result.stderr.splitlines()[-1]


def test_megatron_is_refused(llama, data, tmp_path, monkeypatch, no_model_loads):
    monkeypatch.setenv("USE_MCA", "1")
    with pytest.raises(LMTPError, match=r"do not run on Megatron \(USE_MCA=1\): unset"):
        runs.train(llama, data, tmp_path)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("_parse_train_mbridge_args", r"Megatron Bridge \(USE_MEGATRON_BRIDGE=1\)"),
        ("_parse_train_new_args", "the backend of LLaMA-Factory's _parse_train_new_args"),
    ],
)
def test_the_parser_of_another_backend_refuses_the_stages(name, backend):
    """An L-MTP stage is `sft` to upstream, so a backend that takes it would train plain SFT."""
    parser = ModuleType("parser")
    parser.read_args = lambda args=None: args
    parser._verify_model_args = lambda model_args, data_args, finetuning_args: None
    for own in ("_parse_train_args", "_parse_infer_args", name):
        exec(f"def {own}(args=None):\n    return args", vars(parser))
    extend(parser)
    with pytest.raises(LMTPError, match=f"L-MTP stages do not run on {backend}: unset"):
        getattr(parser, name)({"stage": "lmtp1"})
    with pytest.raises(LMTPError, match=backend):
        getattr(parser, name)(["mtp_type=lmtp2"])
    assert getattr(parser, name)({"stage": "sft"}) == {"stage": "sft"}


def test_an_output_dir_that_cannot_be_written_is_refused(llama, data, tmp_path, no_model_loads):
    (tmp_path / "file").write_text("")
    with pytest.raises(LMTPError, match=r"output_dir .*file/out cannot be written \(Not a directory\)"):
        runs.train(llama, data, tmp_path / "file" / "out")


def test_stage_two_with_other_heads_than_stage_one_is_refused(llama, data, stage1, tmp_path, no_model_loads):
    run = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(stage1)}
    for wrong, message in [
        ({"leap_stride": 3}, "leap_stride 3, the heads have 2"),
        ({"num_heads": 2}, "num_heads 2, the heads have 3"),
        ({"leap_offsets": "2,3,6"}, "leap_offsets 2,3,6, the heads have 3,5,7"),
        ({"head_kind": "shared"}, "head_kind shared, the heads have own"),
    ]:
        with pytest.raises(LMTPError, match=message):
            runs.train(llama, data, tmp_path, **run, **wrong)


def test_a_directory_without_heads_is_refused_unless_it_is_the_output(llama, data, tmp_path, no_model_loads):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LMTPError, match="empty has no lmtp/ folder"):
        runs.train(llama, data, tmp_path / "out", stage1_pretrained_path=str(tmp_path / "empty"))


def test_heads_of_another_model_are_refused(data, stage1, tmp_path, no_model_loads):
    other = tiny_models.save_llama(tmp_path / "other", hidden_size=16, head_dim=4)
    run = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(stage1)}
    with pytest.raises(
        LMTPError, match=r"belong to .*tiny-llama \(hidden size 32\), not to .*other \(hidden size 16\)"
    ):
        runs.train(other, data, tmp_path / "out", **run)


def test_heads_of_another_tokenizer_are_refused(llama, data, stage1, tmp_path, no_model_loads):
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    run = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(stage1)}
    with pytest.raises(LMTPError, match=r"belong to .*tiny-llama \(tokenizer \w+\), not to .*other \(tokenizer \w+\)"):
        runs.train(other, data, tmp_path / "out", **run)


@pytest.mark.parametrize("damage", ["truncated", "no weights", "no config", "broken config"])
def test_damaged_heads_are_refused(damage, llama, data, stage1, tmp_path, no_model_loads):
    broken = tmp_path / "broken"
    shutil.copytree(stage1 / "lmtp", broken / "lmtp")
    weights, config = broken / "lmtp" / "model.safetensors", broken / "lmtp" / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    else:
        config.write_text("{")
    run = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(broken)}
    with pytest.raises(LMTPError, match="truncated or damaged|is missing|is damaged"):
        runs.train(llama, data, tmp_path / "out", **run)


def test_a_dataset_without_a_target_for_the_last_head_is_refused(llama, data, tmp_path, no_model_loads):
    with pytest.raises(LMTPError, match="No training example has a valid target 300 tokens ahead"):
        runs.train(llama, data, tmp_path, leap_offsets="2,300", cutoff_len=512)


def test_fsdp_is_refused(llama, data, tmp_path, monkeypatch, no_model_loads):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LMTPError, match="do not run with fsdp"):
        runs.train(llama, data, tmp_path)


@pytest.mark.parametrize("tied", [None, False, True])
def test_an_lm_head_is_tied_as_the_outer_configuration_says(tied):
    """As in transformers. A configuration without the key ties nothing."""
    outer = PretrainedConfig() if tied is None else Qwen2_5_VLConfig(tie_word_embeddings=tied)
    source = SimpleNamespace(base=SimpleNamespace(config=lambda: outer))
    arguments = SimpleNamespace(train_lm_head=False, freeze_extra_modules=["lm_head"])
    with pytest.raises(LMTPError, match="is tied to its embeddings") if tied else nullcontext():
        validation._check_lm_head_with_freeze(arguments, source)
