"""Attaches leap heads to the model that LLaMA-Factory loads for training or export."""

import functools
from types import ModuleType

from transformers import PreTrainedModel

from ....errors import LMTPError
from ....export.native_mtp import keep_native_mtp
from ....modeling.model import base_of
from ... import hooks, log
from ...inference import attach_for_export
from ...training.attach import attach_for_training, cast_backbone, save_lm_head_with_adapter


def extend(loader: ModuleType) -> None:
    """Attach heads after upstream's `init_adapter` and before its count of trainable parameters."""
    upstream = hooks.expect(loader, "load_model", "tokenizer", "model_args", "finetuning_args", "is_trainable")
    init_adapter = hooks.expect(
        loader, "init_adapter", "config", "model", "model_args", "finetuning_args", "is_trainable"
    )
    patch_model = hooks.expect(loader, "patch_model", "model")

    @functools.wraps(upstream)
    def load_model(tokenizer, *args, **kwargs):
        parts = {
            "init_adapter": functools.partial(_init_adapter, init_adapter, tokenizer),
            "patch_model": functools.partial(_patch_model, patch_model),
        }
        with hooks.replaced(loader, **parts):
            model = upstream(tokenizer, *args, **kwargs)
        _keep_native_mtp(model, *args, **kwargs)
        return model

    loader.load_model = load_model


def _keep_native_mtp(model, model_args, finetuning_args, is_trainable=False, *args, **kwargs):
    """Let exports and fully tuned models keep the native MTP layers of the model that was loaded."""
    saves_all = finetuning_args.finetuning_type in ("full", "freeze") if is_trainable else model_args.export_dir
    if not (finetuning_args.keep_native_mtp and saves_all and isinstance(base_of(model), PreTrainedModel)):
        return
    options = {"revision": model_args.model_revision, "cache_dir": model_args.cache_dir}
    count = keep_native_mtp(base_of(model), model_args.model_name_or_path, **options)
    if count:
        log.info(
            f"Keeping {count} tensors of {model_args.model_name_or_path}'s own multi-token prediction layers as they are: "
            "they are not tuned with it."
        )


def _patch_model(upstream, model, *args, **kwargs):
    """Call `upstream` without the `generate` of an export's `custom_generate/` on the instance.

    transformers puts it there with `trust_remote_code`, which the web UI always sets. Upstream cannot patch such a model.
    """
    if isinstance(vars(model).get("generate"), functools.partial):
        del model.generate
    return upstream(model, *args, **kwargs)


def _init_adapter(upstream, tokenizer, config, model, model_args, finetuning_args, is_trainable):
    stage, source = finetuning_args.lmtp_stage, finetuning_args.heads_source
    if stage is None:
        model = upstream(config, model, model_args, finetuning_args, is_trainable)
        if source is not None and source.exports:
            attach_for_export(model, tokenizer, source, finetuning_args.lmtp_export)
        return model
    if source is None:
        raise LMTPError("The arguments of an L-MTP stage lack the source of its heads: make them with get_train_args.")
    cast_backbone(model, model_args, frozen=stage == 1)
    if stage == 2:
        if finetuning_args.train_lm_head and finetuning_args.finetuning_type == "lora":
            save_lm_head_with_adapter(model, model_args, finetuning_args)
        model = upstream(config, model, model_args, finetuning_args, is_trainable)
    # Upstream's full tuning would keep fp32 master weights of the backbone that stage 1 freezes, so stage 1 skips it.
    attach_for_training(model, tokenizer, source, model_args, finetuning_args, is_trainable)
    return model
