"""Bad input, refused in one sentence after parsing and before anything loads (``llamafactory.hparams.parser``)."""

import functools
import os
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from ..decoding.tree_config import read_tree
from ..distill.rows import TEMPLATE_NAME, is_self_distilled
from ..errors import LMTPError
from ..files import HEADS_FOLDER
from ..modeling.losses.implementation import resolve_implementation
from . import hooks, log
from .resume import check_checkpoint, choose_checkpoint
from .stages import STAGES
from .start import (
    check_named_heads,
    config_of_run,
    decoding_heads,
    farthest_offset,
    hub_options,
    locate_exported_heads,
    no_decoding,
    starting_heads,
)
from .vocabulary import check_heads


def extend_parser(parser: ModuleType) -> None:
    """Check between upstream's parsing and its own checks, whose advice would be to install what cannot be used."""
    parser._parse_train_args = _checked(hooks.expect(parser, "_parse_train_args", "args"), check_training)
    parser._parse_infer_args = _checked(hooks.expect(parser, "_parse_infer_args", "args"), check_inference)
    parser._parse_train_mca_args = _refusing_megatron(parser, hooks.expect(parser, "_parse_train_mca_args", "args"))
    hooks.expect(parser, "read_args", "args")


def _checked(parse: Callable, check: Callable) -> Callable:
    @functools.wraps(parse)
    def parse_and_check(args=None):
        parsed = parse(args)
        check(*parsed)
        return parsed

    return parse_and_check


def _refusing_megatron(parser: ModuleType, parse: Callable) -> Callable:
    @functools.wraps(parse)
    def parse_and_check(args=None):
        written = parser.read_args(args)
        values = list(written.values()) if isinstance(written, dict) else list(written)
        if any(str(value).split("=")[-1] in STAGES.values() for value in values):
            raise LMTPError("L-MTP stages do not run on Megatron (USE_MCA=1): unset USE_MCA and use deepspeed instead.")
        return parse(args)

    return parse_and_check


def check_training(model_args, data_args, training_args, finetuning_args, generating_args=None) -> None:
    """Everything about an L-MTP stage that can be known before tokenizer, data and model load.

    Raises:
        LMTPError: one sentence that says what is wrong and what to write instead.
    """
    if training_args.do_train:
        _check_datasets(data_args)
    stage = finetuning_args.lmtp_stage
    if stage is None:
        if training_args.predict_with_generate and not training_args.do_train:
            _check_decoding(model_args, data_args, finetuning_args)
        return
    from llamafactory.extras.misc import get_current_device

    _check_backends(model_args, training_args, finetuning_args)
    _check_method(stage, model_args, training_args, finetuning_args)
    resolve_implementation(finetuning_args.lmtp_loss, torch.device(get_current_device()))
    if finetuning_args.hidden_cache_dir is not None:
        _check_hidden_cache(stage, data_args, training_args)
    named = training_args.resume_from_checkpoint is not None
    resumed = choose_checkpoint(training_args)
    heads = starting_heads(model_args, finetuning_args, training_args.do_train)
    if stage == 1 and training_args.do_train and not check_named_heads(finetuning_args, training_args.output_dir):
        start = "fresh ones" if heads is None else f"those in {heads}"
        log.info(
            f"stage1_pretrained_path {finetuning_args.stage1_pretrained_path} has no heads yet: stage 1 starts from "
            f"{start if resumed is None else resumed}."
        )
    if heads is not None:
        grows = stage == 2 and training_args.do_train
        difference = finetuning_args.contradicts(check_heads(heads, model_args, data_args, grows))
        if difference:
            raise LMTPError(
                f"The heads in {heads} do not fit what was written ({difference}): leave the key out to take the heads' "
                "own value, or train stage 1 again."
            )
    if resumed is not None:
        check_checkpoint(resumed, stage, config_of_run(heads, model_args, finetuning_args), heads, named)
    reach = farthest_offset(model_args, finetuning_args, training_args.do_train)
    if data_args.cutoff_len <= reach:
        raise LMTPError(
            f"cutoff_len {data_args.cutoff_len} leaves the farthest head (+{reach} tokens) without a target: write "
            f"cutoff_len: {reach + 1} or more."
        )
    written = data_args.cutoff_len + 1  # with packing upstream has taken one off by now
    if data_args.packing and written % 8:
        raise LMTPError(
            f"cutoff_len {written} does not go with packing, because upstream pads packed rows to a multiple of 8 but not "
            f"their positions: write cutoff_len: {written // 8 * 8 + 8}."
        )
    if training_args.should_save:
        _check_writable(training_args.output_dir)
    finetuning_args.packs_batches = stage == 1 and data_args.packing is None  # upstream makes this a False next


def _check_backends(model_args, training_args, finetuning_args) -> None:
    refused = {
        "use_unsloth": model_args.use_unsloth,
        "use_kt (KTransformers)": model_args.use_kt,
        "mixture_of_depths": model_args.mixture_of_depths is not None,
        "use_hyper_parallel": finetuning_args.use_hyper_parallel,
        "use_mca (Megatron)": finetuning_args.use_mca,
        "fsdp": bool(training_args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
    }
    for backend, asked in refused.items():
        if asked:
            raise LMTPError(
                f"L-MTP stages do not run with {backend}, which replaces the model that the heads attach to: leave it "
                "out, and use deepspeed for several GPUs."
            )
    if training_args.deepspeed and "LOCAL_RANK" not in os.environ:
        raise LMTPError(
            "deepspeed needs torchrun: start with FORCE_TORCHRUN=1 llamafactory-cli train, also for one process."
        )


def _check_method(stage: int, model_args, training_args, finetuning_args) -> None:
    losses = {
        "use_asft_loss": finetuning_args.use_asft_loss,
        "use_dft_loss": finetuning_args.use_dft_loss,
        "use_eaft_loss": finetuning_args.use_eaft_loss,
        "label_smoothing_factor": bool(training_args.label_smoothing_factor),
    }
    for loss, asked in losses.items():
        if asked:
            raise LMTPError(f"{loss} replaces the loss that L-MTP stages train: leave it out.")
    if finetuning_args.use_badam:
        raise LMTPError("use_badam updates blocks of the backbone in turn and never the leap heads: leave it out.")
    method = finetuning_args.finetuning_type
    if stage == 1 and method != "full":
        raise LMTPError(
            f"Stage 1 trains only the heads, so finetuning_type: {method} has nothing to adapt: write finetuning_type: "
            "full (the backbone stays frozen)."
        )
    if stage == 2 and method not in ("full", "lora", "freeze"):
        raise LMTPError(f"Stage 2 does not run with finetuning_type: {method}: write lora, full or freeze.")
    if stage == 1:
        _check_frozen(model_args, training_args, finetuning_args)
    checkpointing = model_args.use_reentrant_gc and not model_args.disable_gradient_checkpointing
    if stage == 2 and model_args.moe_aux_loss_coef and checkpointing:
        raise LMTPError(
            "moe_aux_loss_coef trains nothing under reentrant gradient checkpointing, which records no gradient of the "
            "router's choices: write use_reentrant_gc: false or disable_gradient_checkpointing: true."
        )
    if "lm_head" in (finetuning_args.lora_target or ()) and is_deepspeed_zero3_enabled():
        raise LMTPError(
            "lora_target: lm_head does not go with ZeRO-3: write train_lm_head: true instead, or use ZeRO-2."
        )
    if method == "freeze":
        _check_lm_head_with_freeze(model_args, finetuning_args)
    if finetuning_args.compute_accuracy:
        raise LMTPError("L-MTP stages report every head's accuracy by themselves: leave compute_accuracy out.")


def _check_lm_head_with_freeze(model_args, finetuning_args) -> None:
    extra = "lm_head" in (finetuning_args.freeze_extra_modules or ())
    if not (finetuning_args.train_lm_head or extra):
        return
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **hub_options(model_args))
    if config.tie_word_embeddings:  # one parameter under the embeddings' name, which freeze looks for in vain
        key = "train_lm_head" if finetuning_args.train_lm_head else "freeze_extra_modules: lm_head"
        raise LMTPError(
            f"{key} does not go with finetuning_type: freeze here, because the model's LM head is tied to its embeddings: "
            "write finetuning_type: lora and train_lm_head: true."
        )
    if finetuning_args.train_lm_head:
        raise LMTPError(
            "train_lm_head goes with finetuning_type: lora: with freeze write freeze_extra_modules: lm_head instead."
        )


def _check_frozen(model_args, training_args, finetuning_args) -> None:
    """What stage 1 cannot do because it neither trains nor saves the backbone."""
    if training_args.neftune_noise_alpha:
        raise LMTPError(
            "neftune_noise_alpha disturbs embeddings that are tuned, and stage 1 keeps them frozen: leave it out here, or "
            "write it in stage 2."
        )
    if model_args.moe_aux_loss_coef:
        raise LMTPError(
            "moe_aux_loss_coef trains the router, which stage 1 keeps frozen: leave it out here, or write it in stage 2."
        )
    if finetuning_args.train_lm_head:
        raise LMTPError("Stage 1 keeps the LM head frozen: leave train_lm_head out, or train stage 2.")
    if model_args.quantization_bit is not None:
        raise LMTPError(
            "Stage 1 does not run with quantization_bit: leave it out here, and write it in stage 2, with LoRA."
        )
    for key in ("resize_vocab", "add_tokens", "add_special_tokens"):
        if getattr(model_args, key):
            raise LMTPError(
                f"{key} would make embeddings that stage 1 neither trains nor saves: add the tokens to the base model and "
                "save it first."
            )


def _check_hidden_cache(stage: int, data_args, training_args) -> None:
    refused = {
        "stage: lmtp2": stage == 2 and "the backbone changes in every step",
        "do_train: false": not training_args.do_train and "nothing is read twice",
        "streaming": data_args.streaming and "a stream has no fixed documents",
        "packing": data_args.packing and "the cache holds documents, not rows of several",
    }
    for key, reason in refused.items():
        if reason:
            raise LMTPError(f"hidden_cache_dir does not go with {key}, because {reason}: leave one of them out.")


def _check_datasets(data_args) -> None:
    if data_args.tokenized_path is not None:
        return
    from llamafactory.data.parser import get_dataset_list

    names = [*(data_args.dataset or []), *(data_args.eval_dataset or [])]
    for name, attr in zip(names, get_dataset_list(names, data_args.dataset_dir), strict=True):
        if is_self_distilled(attr) and data_args.template != TEMPLATE_NAME:
            raise LMTPError(
                f"Dataset {name} holds the token ids that a model read and wrote, which template: {data_args.template} "
                f"would train as text: write template: {TEMPLATE_NAME}."
            )


def _check_writable(output_dir: str) -> None:
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise LMTPError(f"output_dir {output_dir} cannot be written ({error.strerror}): name another one.") from None


def _check_decoding(model_args, data_args, finetuning_args) -> None:
    decode = finetuning_args.lmtp_decode
    asked_for = decode in ("backward", "forward")
    obstacle = no_decoding(model_args, finetuning_args)
    if asked_for and obstacle is not None:
        raise LMTPError(
            f"lmtp_decode: {decode} does not go with {obstacle}, because only the huggingface engine's own generate decodes "
            "with leap heads: leave one of them out."
        )
    heads = decoding_heads(model_args, finetuning_args)
    if heads is not None:
        check_heads(heads, model_args, data_args)
        read_tree(heads)
    elif asked_for:
        raise LMTPError(
            f"lmtp_decode: {decode} asks for leap heads, but neither the adapter nor the model directory has an lmtp/ "
            "folder: name the stage-1 output in stage1_pretrained_path or write lmtp_decode: auto."
        )
    if asked_for:
        hooks.require_all()


def check_inference(model_args, data_args, finetuning_args, generating_args: Any = None) -> None:
    """What chat and its kin, or an export with or without heads, need.

    Raises:
        LMTPError: heads that are asked for and missing, damaged or another model's; heads in the target that an NTP export
            would leave lying there.
    """
    if model_args.export_dir is None:
        _check_decoding(model_args, data_args, finetuning_args)
    elif finetuning_args.lmtp_export != "ntp":
        hooks.require_all()
        heads = locate_exported_heads(model_args, finetuning_args)
        if heads is None:
            raise LMTPError(
                f"lmtp_export: {finetuning_args.lmtp_export} asks for leap heads, but neither the adapter nor the model "
                "directory has an lmtp/ folder: name the stage-1 output in stage1_pretrained_path or write lmtp_export: ntp."
            )
        check_heads(heads, model_args, data_args)
    elif os.path.isdir(os.path.join(model_args.export_dir, HEADS_FOLDER)):
        raise LMTPError(
            f"export_dir {model_args.export_dir} already holds leap heads, which an export without heads would leave "
            "beside other weights: name another export_dir or write lmtp_export: heads."
        )
