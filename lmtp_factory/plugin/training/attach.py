"""Attaches the heads of an L-MTP stage to a loaded model, in the dtypes that upstream trains in."""

from pathlib import Path

import torch
from llamafactory.extras.misc import get_current_device
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.quantization_config import QuantizationMethod

from ...decoding import attach_heads
from ...modeling import load_heads
from ...modeling.attach import fresh_heads
from ...modeling.losses.chunked import LOGIT_BYTES
from ...modeling.losses.implementation import as_plain_linear, resolve_implementation
from ...modeling.model import base_of
from .. import log
from ..heads_source import HeadsSource
from ..vocabulary import fit_heads, saved_fingerprint


_ORDINARY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attach_for_training(
    model: nn.Module, tokenizer, source: HeadsSource, model_args, finetuning_args, is_trainable: bool
) -> None:
    """Attach trained or fresh heads, in place, as an L-MTP stage trains or evaluates them.

    Raises:
        LMTPError: The heads belong to another model, or the model cannot have heads.
    """
    base = base_of(model)
    if source.folder is not None:
        heads = load_heads(source.folder.parent)
        fit_heads(heads, base, tokenizer, source.base, model_args.resize_vocab)
        _warn_if_renamed(heads.config.base_model, source)
        log.info(f"Leap heads start from {source.folder}.")
    else:
        heads = fresh_heads(base, source.config, source.draft_tokens)
        if finetuning_args.lmtp_stage == 2:
            log.warning(
                "Stage 2 starts from fresh leap heads, which disturbs the backbone: train stage 1 first and name its "
                "output in stage1_pretrained_path."
            )
    heads.config.tokenizer_fingerprint = saved_fingerprint(
        tokenizer, source.base, model_args.resize_vocab, finetuning_args
    )
    attach_heads(
        model,
        stage=finetuning_args.lmtp_stage,
        heads=heads,
        head_weight=finetuning_args.head_weight,
        head_decay=finetuning_args.head_decay,
        dtype=_trainable_dtype(base, model_args, finetuning_args) if is_trainable else None,
    )
    base.decode_strategy, base.loss_implementation = finetuning_args.lmtp_decode, finetuning_args.lmtp_loss
    log.info(f"Leap loss: {_describe_loss(base)}.")
    log.info(
        f"Leap heads predict {', '.join(f'+{offset}' for offset in heads.config.offsets[1:])} beside the LM head's +1."
    )


def cast_backbone(model: nn.Module, model_args, frozen: bool) -> None:
    """Cast the backbone's weights to the dtype that it computes in, unless they are sharded.

    On a CPU a trained backbone is cast to fp32 too: a bf16 backward takes minutes a step there. Of a frozen backbone that
    bitsandbytes has quantised, what is not quantised is cast; of other trained or quantised backbones nothing. What
    transformers or `upcast_layernorm` keeps in fp32 stays so, and so do rotary frequencies and other buffers: rounded
    frequencies turn far positions by a radian, which a model does not do where it decodes.
    """
    if is_deepspeed_zero3_enabled():
        return
    dtype, method = model_args.compute_dtype, getattr(model, "quantization_method", None)
    if method is not None:
        casts = frozen and method == QuantizationMethod.BITS_AND_BYTES
    else:
        casts = frozen or (model.device.type == "cpu" and dtype == torch.float32)
    if not casts:
        return
    kept = _kept_in_fp32(model, dtype)
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype not in _ORDINARY_DTYPES:
            continue  # quantised numbers, whatever their dtype
        if model_args.upcast_layernorm and parameter.dtype == torch.float32 and parameter.dim() == 1:
            continue  # a norm that upstream has cast
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point() and torch.promote_types(buffer.dtype, dtype) == dtype:
            buffer.data = buffer.data.to(dtype)


def _kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return parts of the names of weights that transformers loads in fp32 where the others are in `dtype`."""
    names: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        names.update(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names.update(getattr(model, "_keep_in_fp32_modules", None) or ())
    return names


def save_lm_head_with_adapter(model: nn.Module, model_args, finetuning_args) -> None:
    """Add the LM head to `additional_target`, the modules that LoRA tunes in full."""
    saved = [model.get_output_embeddings()]
    if model_args.resize_vocab and finetuning_args.additional_target is None:
        saved.append(model.get_input_embeddings())  # upstream's own choice, which it makes only if the key is left out
    names = {name.split(".")[-1] for name, module in model.named_modules() if any(module is one for one in saved)}
    finetuning_args.additional_target = sorted({*(finetuning_args.additional_target or []), *names})


def _describe_loss(base: nn.Module) -> str:
    device = torch.device(get_current_device())
    implementation = resolve_implementation(base.loss_implementation, device)
    if implementation == "eager":
        return "eager, every head's logits at once"
    size = LOGIT_BYTES.get(device.type, LOGIT_BYTES["cpu"]) // 2**20
    softmax = {"torch": "plain torch", "triton": "a Triton kernel"}[implementation]
    lm_head = base.get_output_embeddings()
    backward = (
        "" if as_plain_linear(lm_head) else f"; autograd computes the gradient of {type(lm_head).__name__}, the LM head"
    )
    return f"chunks of at most {size} MB of logits, softmax in {softmax}{backward}"


def _trainable_dtype(base: nn.Module, model_args, finetuning_args) -> torch.dtype:
    """Dtype of upstream's trainable parameters: fp32, unless DeepSpeed keeps master weights or `pure_bf16` forgoes them."""
    if finetuning_args.pure_bf16 or (is_deepspeed_zero3_enabled() and model_args.quantization_bit is None):
        return base.dtype
    return torch.float32


def _warn_if_renamed(trained_on: str | None, source: HeadsSource) -> None:
    base = source.base.path
    if trained_on and Path(trained_on).name != Path(base).name:
        log.warning(
            f"The leap heads in {source.folder} were trained on {trained_on}; they fit {base} in shape and tokenizer only."
        )
