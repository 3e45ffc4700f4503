"""Refusals of bad input in one sentence, after parsing and before anything loads.

The functions only raise. Those that need the keys alone run before the source of the heads is resolved; upstream's own
checks, whose advice would be to install what L-MTP cannot use, run after all of them.
"""

import os
from collections.abc import Iterator

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from ..decoding.tree_choice import read_tree
from ..distill.rows import TEMPLATE_NAME, is_self_distilled
from ..errors import LMTPError
from ..files import HEADS_FOLDER, check_writable
from ..modeling.losses.implementation import resolve_implementation
from .heads_source import HeadsSource, decoding_obstacle
from .resume import check_checkpoint, check_head_learning_rate
from .training.layer_keys import check_layer_keys
from .training.optimizer import check_rate_key
from .versions import pads_packed_positions
from .vocabulary import check_heads


def check_training_keys(model_args, data_args, training_args, finetuning_args) -> None:
    """Check the keys of a training run, before its heads are located.

    Raises:
        LMTPError: Keys do not go together.
    """
    _check_datasets(data_args)
    stage = finetuning_args.lmtp_stage
    if stage is None:
        if training_args.predict_with_generate and not training_args.do_train:
            _check_strategy(model_args, finetuning_args)
        return
    from llamafactory.extras.misc import get_current_device

    for backend in _replaced_models(model_args, training_args, finetuning_args):
        raise LMTPError(
            f"L-MTP stages do not run with {backend}, which replaces the model that the heads attach to: leave it out, and "
            "use deepspeed for several GPUs."
        )
    if training_args.deepspeed and "LOCAL_RANK" not in os.environ:
        raise LMTPError(
            "deepspeed needs torchrun: start with FORCE_TORCHRUN=1 llamafactory-cli train, also for one process."
        )
    for loss in _replaced_losses(training_args, finetuning_args):
        raise LMTPError(f"{loss} replaces the loss that L-MTP stages train: leave it out.")
    _check_method(stage, model_args, finetuning_args)
    check_rate_key(stage, training_args, finetuning_args)
    if stage == 1:
        _check_frozen(model_args, training_args, finetuning_args)
    resolve_implementation(finetuning_args.lmtp_loss, torch.device(get_current_device()))
    if finetuning_args.hidden_cache_dir is not None:
        for key, reason in _uncacheable(stage, data_args, training_args):
            raise LMTPError(f"hidden_cache_dir does not go with {key}, because {reason}: leave one of them out.")
    written = data_args.cutoff_len + 1  # with packing upstream has subtracted one
    if data_args.packing and written % 8 and not pads_packed_positions():
        raise LMTPError(
            f"cutoff_len {written} does not go with packing, because upstream pads packed rows to a multiple of 8 but not "
            f"their positions: write cutoff_len: {written // 8 * 8 + 8}."
        )


def check_training(model_args, data_args, training_args, finetuning_args, source: HeadsSource | None) -> None:
    """Check the heads of a training run, and what depends on them.

    Args:
        source: Where the heads come from; None if the run has none.

    Raises:
        LMTPError: The heads, the checkpoint or a key does not fit this run, or the heads' draft tree is damaged.
    """
    stage = finetuning_args.lmtp_stage
    if stage is None:
        if training_args.predict_with_generate and not training_args.do_train:
            _check_decoding(model_args, data_args, finetuning_args, source)
        return
    if finetuning_args.finetuning_type == "freeze":
        _check_lm_head_with_freeze(finetuning_args, source)
    if source.folder is not None:
        check_heads(source, model_args, data_args, may_grow=stage == 2 and training_args.do_train)
        if difference := finetuning_args.first_difference(source.config):
            raise LMTPError(
                f"The heads in {source.folder} do not fit what was written ({difference}): leave the key out to take the "
                "heads' own value, or train stage 1 again."
            )
    if source.resumed is not None:
        named = training_args.resume_from_checkpoint is not None
        check_checkpoint(source.resumed, stage, source.config, source.folder, named)
        check_head_learning_rate(source.resumed, finetuning_args.head_learning_rate, named)
    if source.config.reads_layers:
        check_layer_keys(source.config, training_args, finetuning_args)
    if data_args.cutoff_len <= source.reach:
        raise LMTPError(
            f"cutoff_len {data_args.cutoff_len} leaves the farthest head (+{source.reach} tokens) without a target: write "
            f"cutoff_len: {source.reach + 1} or more."
        )
    if training_args.should_save:
        _check_writable(training_args.output_dir)


def check_inference_keys(model_args, finetuning_args, exports: bool) -> None:
    """Check the keys of chat, api or an export, before their heads are located.

    Args:
        exports: Whether the command is an export. `export_dir` may stand in a YAML of chat too.

    Raises:
        LMTPError: Keys do not go together, or the export would leave old heads beside new weights.
    """
    if not exports:
        _check_strategy(model_args, finetuning_args)
    elif finetuning_args.lmtp_export != "ntp" and model_args.quantization_bit is not None:
        raise LMTPError(
            "An export with leap heads holds the model in full precision, whatever stage 1 has read: leave quantization_bit "
            "out."
        )
    elif finetuning_args.lmtp_export == "ntp" and os.path.isdir(os.path.join(model_args.export_dir, HEADS_FOLDER)):
        raise LMTPError(
            f"export_dir {model_args.export_dir} already holds leap heads, which an export without heads would leave "
            "beside other weights: name another export_dir or write lmtp_export: heads."
        )


def check_inference(model_args, data_args, finetuning_args, source: HeadsSource | None, exports: bool) -> None:
    """Check the heads that chat and api decode with or an export keeps.

    Args:
        source: Where the heads come from; None without heads.
        exports: Whether the command is an export.

    Raises:
        LMTPError: Heads are asked for and missing, they or their draft tree are damaged, or they are another model's.
    """
    if not exports:
        _check_decoding(model_args, data_args, finetuning_args, source)
    elif finetuning_args.lmtp_export != "ntp":
        if source is None:
            raise LMTPError(
                f"lmtp_export: {finetuning_args.lmtp_export} asks for leap heads, but neither the adapter nor the model "
                "directory has an lmtp/ folder: name the stage-1 output in stage1_pretrained_path or write lmtp_export: ntp."
            )
        check_heads(source, model_args, data_args)


def _replaced_models(model_args, training_args, finetuning_args) -> Iterator[str]:
    """Keys of backends that replace transformers' model."""
    if model_args.use_unsloth:
        yield "use_unsloth"
    if model_args.use_kt:
        yield "use_kt (KTransformers)"
    if model_args.mixture_of_depths is not None:
        yield "mixture_of_depths"
    if finetuning_args.use_hyper_parallel:
        yield "use_hyper_parallel"
    if finetuning_args.use_mca:
        yield "use_mca (Megatron)"
    if getattr(finetuning_args, "use_megatron_bridge", False):  # LLaMA-Factory 0.9.6
        yield "use_megatron_bridge"
    if training_args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        yield "fsdp"


def _replaced_losses(training_args, finetuning_args) -> Iterator[str]:
    """Keys that replace the loss."""
    if finetuning_args.use_asft_loss:
        yield "use_asft_loss"
    if finetuning_args.use_dft_loss:
        yield "use_dft_loss"
    if finetuning_args.use_eaft_loss:
        yield "use_eaft_loss"
    if training_args.label_smoothing_factor:
        yield "label_smoothing_factor"


def _uncacheable(stage: int, data_args, training_args) -> Iterator[tuple[str, str]]:
    """Keys that `hidden_cache_dir` does not work with, and reasons."""
    if stage == 2:
        yield "stage: lmtp2", "the backbone changes in every step"
    if not training_args.do_train:
        yield "do_train: false", "nothing is read twice"
    if data_args.streaming:
        yield "streaming", "a stream has no fixed documents"
    if data_args.packing:
        yield "packing", "the cache holds documents, not rows of several"


def _check_method(stage: int, model_args, finetuning_args) -> None:
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
    if finetuning_args.compute_accuracy:
        raise LMTPError("L-MTP stages report every head's accuracy by themselves: leave compute_accuracy out.")


def _check_lm_head_with_freeze(finetuning_args, source: HeadsSource) -> None:
    extra = "lm_head" in (finetuning_args.freeze_extra_modules or ())
    if not (finetuning_args.train_lm_head or extra):
        return
    # transformers ties by the outer configuration, and freeze then finds no parameter of the name lm_head.
    if getattr(source.base.config(), "tie_word_embeddings", False):
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
    """Refuse keys that need a backbone which is trained and saved."""
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
    if model_args.quantization_bit is not None and is_deepspeed_zero3_enabled():
        raise LMTPError(
            "Stage 1 on a quantised backbone (quantization_bit) does not run under ZeRO-3: use ZeRO-2, or leave "
            "quantization_bit out."
        )
    if model_args.quantization_bit is not None and model_args.quantization_method != "bnb":
        raise LMTPError(
            f"Stage 1 quantises its backbone with bitsandbytes only, not with {model_args.quantization_method}: leave "
            "quantization_method out."
        )
    for key in ("resize_vocab", "add_tokens", "add_special_tokens"):
        if getattr(model_args, key):
            raise LMTPError(
                f"{key} would make embeddings that stage 1 neither trains nor saves: add the tokens to the base model and "
                "save it first."
            )


def _check_datasets(data_args) -> None:
    if data_args.tokenized_path is not None:
        return
    from llamafactory.data.parser import get_dataset_list

    names = [*(data_args.dataset or []), *(data_args.eval_dataset or [])]
    for name, attr in zip(names, get_dataset_list(names, data_args.dataset_dir), strict=True):
        if is_self_distilled(attr) and data_args.template != TEMPLATE_NAME:
            raise LMTPError(
                f"Dataset {name} holds the token ids that a model read and wrote, which template: {data_args.template} "
                f"would read as text: write template: {TEMPLATE_NAME}."
            )


def _check_writable(output_dir: str) -> None:
    try:
        check_writable(output_dir)
    except OSError as error:
        raise LMTPError(f"output_dir {output_dir} cannot be written ({error.strerror}): name another one.") from None


def _check_strategy(model_args, finetuning_args) -> None:
    decode, obstacle = finetuning_args.lmtp_decode, decoding_obstacle(model_args, finetuning_args)
    if decode in ("backward", "forward") and obstacle is not None:
        raise LMTPError(
            f"lmtp_decode: {decode} does not go with {obstacle}, because only the huggingface engine's own generate decodes "
            "with leap heads: leave one of them out."
        )


def _check_decoding(model_args, data_args, finetuning_args, source: HeadsSource | None) -> None:
    decode = finetuning_args.lmtp_decode
    if source is not None:
        check_heads(source, model_args, data_args)
        read_tree(source.folder)
    elif decode in ("backward", "forward"):
        raise LMTPError(
            f"lmtp_decode: {decode} asks for leap heads, but neither the adapter nor the model directory has an lmtp/ "
            "folder: name the stage-1 output in stage1_pretrained_path or write lmtp_decode: auto."
        )
