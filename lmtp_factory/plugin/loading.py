"""Leap heads on the model that LLaMA-Factory loads (``llamafactory.model.loader``)."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from llamafactory.extras.misc import get_current_device
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ..decoding import attach_heads
from ..export.custom_generate import write_custom_generate
from ..modeling import load_heads
from ..modeling.attach import fresh_heads
from ..modeling.checkpoint import tokenizer_fingerprint
from ..modeling.losses.chunked import LOGIT_BYTES
from ..modeling.losses.implementation import as_plain_linear, resolve_implementation
from ..modeling.model import base_of
from . import hooks, log
from .start import decoding_heads, locate_exported_heads, starting_heads
from .vocabulary import fit_heads, saved_fingerprint


@contextmanager
def replaced(module: ModuleType, **attributes: Any) -> Iterator[None]:
    """Module attributes set to other values inside the context."""
    before = {name: getattr(module, name) for name in attributes}
    vars(module).update(attributes)
    try:
        yield
    finally:
        vars(module).update(before)


def extend_loader(loader: ModuleType) -> None:
    """Attach heads between upstream's ``init_adapter`` and its count of trainable parameters."""
    upstream = hooks.expect(loader, "load_model", "tokenizer", "model_args", "finetuning_args", "is_trainable")
    init_adapter = hooks.expect(
        loader, "init_adapter", "config", "model", "model_args", "finetuning_args", "is_trainable"
    )
    patch_model = hooks.expect(loader, "patch_model", "model")

    @functools.wraps(upstream)
    def load_model(tokenizer, *args, **kwargs):
        ours = {
            "init_adapter": functools.partial(_init_adapter, init_adapter, tokenizer),
            "patch_model": functools.partial(_patch_model, patch_model),
        }
        with replaced(loader, **ours):
            return upstream(tokenizer, *args, **kwargs)

    loader.load_model = load_model


def _patch_model(upstream, model, *args, **kwargs):
    """Without the ``generate`` that an export's ``custom_generate/`` has put on the instance.

    transformers does that with ``trust_remote_code``, which the web UI always sets; upstream cannot patch such a model, and
    the heads are attached here anyway.
    """
    if isinstance(vars(model).get("generate"), functools.partial):
        del model.generate
    return upstream(model, *args, **kwargs)


def _init_adapter(upstream, tokenizer, config, model, model_args, finetuning_args, is_trainable):
    exporting = model_args.export_dir is not None
    stage = None if exporting else finetuning_args.lmtp_stage
    if stage is not None:
        _cast_backbone(model, model_args, frozen=stage == 1)
    if stage == 1:
        # Not upstream's full tuning, which would make fp32 masters of the frozen backbone.
        return _attach_for_training(model, tokenizer, model_args, finetuning_args, is_trainable)
    if stage == 2 and finetuning_args.train_lm_head and finetuning_args.finetuning_type == "lora":
        _save_lm_head_with_adapter(model, model_args, finetuning_args)
    model = upstream(config, model, model_args, finetuning_args, is_trainable)
    if stage == 2:
        return _attach_for_training(model, tokenizer, model_args, finetuning_args, is_trainable)
    heads = locate_exported_heads(model_args, finetuning_args) if exporting else None
    if heads is not None:
        _keep_untied_lm_head(model)
        if finetuning_args.lmtp_export != "ntp":
            log.info(f"Exporting with the leap heads of {heads}.")
            attach_heads(model, heads=load_heads(heads.parent))
            model.leap_heads.config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)  # saved beside them
            if finetuning_args.lmtp_export == "custom_generate":
                base_of(model).after_export = write_custom_generate
        else:
            log.info(f"Exporting without the leap heads of {heads}.")
    return model


def _attach_for_training(model: nn.Module, tokenizer, model_args, finetuning_args, is_trainable: bool) -> nn.Module:
    base, start = base_of(model), starting_heads(model_args, finetuning_args, do_train=is_trainable)
    if start is not None:
        heads = load_heads(start.parent)
        fit_heads(heads, base, tokenizer, model_args)
        _warn_if_renamed(heads.config.base_model, model_args.model_name_or_path, start)
        log.info(f"Leap heads start from {start}.")
    else:
        heads = fresh_heads(base, finetuning_args.heads_config(base_model=model_args.model_name_or_path))
        if finetuning_args.lmtp_stage == 2:
            log.warning(
                "Stage 2 starts from fresh leap heads, which disturbs the backbone: train stage 1 first and name its "
                "output in stage1_pretrained_path."
            )
    heads.config.tokenizer_fingerprint = saved_fingerprint(tokenizer, model_args, finetuning_args)
    attach_heads(
        model,
        stage=finetuning_args.lmtp_stage,
        heads=heads,
        head_weight=finetuning_args.head_weight,
        head_decay=finetuning_args.head_decay,
        dtype=_trainable_dtype(base, model_args, finetuning_args) if is_trainable else None,
    )
    base.decode_strategy, base.loss_implementation = finetuning_args.lmtp_decode, finetuning_args.lmtp_loss
    log.info(f"Leap loss: {_loss_in_words(base)}.")
    log.info(
        f"Leap heads predict {', '.join(f'+{offset}' for offset in heads.config.offsets[1:])} beside the LM head's +1."
    )
    return model


def _loss_in_words(base: nn.Module) -> str:
    device = torch.device(get_current_device())
    implementation = resolve_implementation(base.loss_implementation, device)
    if implementation == "eager":
        return "eager, every head's logits at once"
    size = LOGIT_BYTES.get(device.type, LOGIT_BYTES["cpu"]) // 2**20
    softmax = {"torch": "plain torch", "triton": "a Triton kernel"}[implementation]
    lm_head = base.get_output_embeddings()
    backward = (
        "" if as_plain_linear(lm_head) else f"; {type(lm_head).__name__}, the LM head, takes its gradients by itself"
    )
    return f"chunks of at most {size} MB of logits, softmax in {softmax}{backward}"


def with_heads(upstream: Callable) -> Callable:
    """``load_model`` for callers that generate: the model comes with its heads, if any and unless they are off."""

    @functools.wraps(upstream)
    def load_model(tokenizer, model_args, finetuning_args, *args, **kwargs):
        folder = decoding_heads(model_args, finetuning_args)
        inference = copy.copy(finetuning_args)
        inference.mtp_type = None  # a stage's YAML serves here too, and nothing is trained
        model = upstream(tokenizer, model_args, inference, *args, **kwargs)
        if folder is not None:
            _attach_for_decoding(model, folder, finetuning_args.lmtp_decode)
        return model

    return load_model


def _attach_for_decoding(model: nn.Module, folder: Path, strategy: str) -> None:
    base = base_of(model)
    if "generate" in vars(base):  # upstream's patcher does not trust the generate of this class
        log.warning(f"{type(base).__name__} has a generate of its own: decoding without the leap heads of {folder}.")
        return
    attach_heads(model, heads=load_heads(folder.parent))
    base.decode_strategy = strategy
    plan = base.tree_config()
    size = f"{'up to ' if plan.kind == 'dynamic' else ''}{plan.nodes} nodes"
    log.info(
        f"Decoding with the leap heads of {folder}: {'backward' if strategy == 'auto' else strategy}, {plan.kind} tree of "
        f"{size} ({plan.source})."
    )


def _cast_backbone(model: nn.Module, model_args, frozen: bool) -> None:
    """The backbone in the dtype that it computes in; sharded and quantised weights stay as they are.

    Only a frozen one loses nothing by it, except on a CPU, where a bf16 backward takes minutes a step.
    """
    if is_deepspeed_zero3_enabled() or getattr(model, "quantization_method", None) is not None:
        return
    if frozen or (model.device.type == "cpu" and model_args.compute_dtype == torch.float32):
        model.to(model_args.compute_dtype)


def _trainable_dtype(base: nn.Module, model_args, finetuning_args) -> torch.dtype | None:
    """What upstream does with trainable parameters: fp32 masters, unless something else keeps them."""
    if finetuning_args.pure_bf16 or (is_deepspeed_zero3_enabled() and model_args.quantization_bit is None):
        return base.dtype
    return torch.float32


def _save_lm_head_with_adapter(model: nn.Module, model_args, finetuning_args) -> None:
    saved = [model.get_output_embeddings()]
    if model_args.resize_vocab and finetuning_args.additional_target is None:
        saved.append(model.get_input_embeddings())  # upstream's own choice, which it makes only where nothing is named
    names = {name.split(".")[-1] for name, module in model.named_modules() if any(module is one for one in saved)}
    finetuning_args.additional_target = sorted({*(finetuning_args.additional_target or []), *names})


def _keep_untied_lm_head(model: nn.Module) -> None:
    """An LM head tuned beside LoRA is no longer the embedding that it was tied to: say so, or saving would drop it."""
    lm_head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.get_text_config().tie_word_embeddings and lm_head.weight is not embeddings.weight:
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        log.info(
            "The tuned LM head differs from the embeddings now: the export is saved with tie_word_embeddings: false."
        )


def _warn_if_renamed(trained_on: str | None, base: str, heads: Path) -> None:
    if trained_on and Path(trained_on).name != Path(base).name:
        log.warning(
            f"The leap heads in {heads} were trained on {trained_on}; they fit {base} in shape and tokenizer only."
        )
