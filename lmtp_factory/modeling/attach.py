"""Giving leap heads to a model that is loaded."""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import LMTPConfig
from ..errors import LMTPError
from ..options import HEAD_DECAY, HEAD_WEIGHT
from .checkpoint import check_base, state_size
from .heads import LeapHeads
from .logits_proof import prove_logits
from .losses.implementation import as_plain_linear
from .model import LeapModel, base_of, leap_class
from .objective import Objective
from .zero3 import fetch_together, gathered


def attach_heads(
    model: nn.Module,
    config: LMTPConfig | None = None,
    stage: int | None = None,
    *,
    heads: LeapHeads | None = None,
    head_weight: float = HEAD_WEIGHT,
    head_decay: float = HEAD_DECAY,
    dtype: torch.dtype | None = None,
    mixins: tuple[type, ...] = (),
) -> nn.Module:
    """Give leap heads to a loaded causal LM, in place.

    Args:
        model: a transformers causal LM (or image-text model with an LM head), or a PEFT model around one.
        config: geometry and kind of fresh heads; default :class:`LMTPConfig`.
        stage: 1 freezes everything but the heads and trains them alone; 2 trains the heads together with whatever of
            the backbone requires gradients; None attaches them for inference.
        heads: trained heads to attach instead of fresh ones.
        head_weight: beta of stage 2.
        head_decay: w_i = head_decay ** (i - 1).
        dtype: of the heads' parameters; default the LM head's.
        mixins: classes to put in front of the model's, see :mod:`lmtp_factory.decoding`.

    Returns:
        ``model``. Given ``labels`` its forward returns a :class:`LeapOutput` with the stage's ``loss``.

    Raises:
        LMTPError: heads of another base model; a base whose logits are not its LM head on its final hidden states, see
            :func:`~.logits_proof.prove_logits`; an LM head that cannot be copied.
    """
    base = base_of(model)
    if isinstance(base, LeapModel):
        raise LMTPError("This model has leap heads already: attach them once.")
    if heads is not None:
        check_base(heads.config, base.config)
    backbone = prove_logits(base)
    if heads is None:
        heads = fresh_heads(base, config or LMTPConfig())

    num_heads = heads.config.num_heads
    objective = None if stage is None else Objective.of_stage(stage, num_heads, head_weight, head_decay)
    weight = base.get_output_embeddings().weight
    device = weight.device if weight.device.type != "meta" else backbone.device
    base.__class__ = leap_class(type(base), mixins)
    base.leap_heads = heads.to(device=device, dtype=dtype or (weight.dtype if weight.is_floating_point() else None))
    base.token_types = backbone.token_types
    base.objective = objective
    if base.trains_heads_only:
        base.requires_grad_(False)
    base.leap_heads.requires_grad_(objective is not None)
    base.train(model.training)

    lm_head = base.get_output_embeddings()
    fetch_together(base.leap_heads, (as_plain_linear(lm_head) or lm_head).parameters())
    return model


def fresh_heads(base: PreTrainedModel, config: LMTPConfig) -> LeapHeads:
    """Untrained heads for ``base``: identity blocks and, for ``own``, copies of its LM head."""
    text_config, lm_head = base.config.get_text_config(), base.get_output_embeddings()
    if lm_head is None:
        raise LMTPError(f"{type(base).__name__} has no LM head to predict tokens with: load a *ForCausalLM class.")
    config = copy.deepcopy(config)
    config.hidden_size, config.vocab_size = state_size(text_config), text_config.vocab_size
    config.base_model = config.base_model or base.config.name_or_path
    heads = LeapHeads(config)
    if config.head_kind == "own":
        if not lm_head.weight.is_floating_point():
            raise LMTPError("The LM head is quantised and cannot be copied into the heads: write head_kind: shared.")
        with gathered([lm_head.weight]), _loaded(getattr(lm_head, "base_layer", lm_head)), torch.no_grad():
            if lm_head.weight.is_meta:
                raise LMTPError(
                    f"The weights of {type(lm_head).__name__}, the LM head, are not loaded and cannot be copied into the "
                    "heads: write head_kind: shared, or load the LM head onto a device."
                )
            for head in heads.heads:
                head.unembed.weight.copy_(lm_head.weight)
    return heads


def _loaded(layer: nn.Module) -> AbstractContextManager:
    """Inside the context a layer that accelerate keeps in host memory or on disk has its weights."""
    if not hasattr(layer, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(layer)
