"""Attaching leap heads to a loaded model."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import LMTPConfig
from ..errors import LMTPError
from ..options import HEAD_DECAY, HEAD_WEIGHT
from . import draft_vocabulary
from .checkpoint import check_base, state_size
from .heads import LeapHeads
from .layer_states import watch_layers
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
    draft_tokens: Sequence[int] | None = None,
    head_weight: float = HEAD_WEIGHT,
    head_decay: float = HEAD_DECAY,
    dtype: torch.dtype | None = None,
    mixins: tuple[type, ...] = (),
) -> nn.Module:
    """Attach leap heads to a loaded causal LM, in place.

    Args:
        model: A transformers causal LM (or image-text model with an LM head), or a PEFT model around one.
        config: Geometry and kind of new heads. Default `LMTPConfig()`.
        stage: 1 trains only the heads and freezes the rest. 2 trains the heads and every backbone parameter that
            requires gradients. None attaches the heads for inference.
        heads: Trained heads to attach instead of new ones.
        draft_tokens: The draft vocabulary of new heads: increasing token ids, `config.draft_vocab_size` of them.
        head_weight: The paper's beta, used in stage 2.
        head_decay: `w_i = head_decay ** (i - 1)`.
        dtype: Dtype of the heads' parameters. Default: the LM head's.
        mixins: Classes to place before the model's class, see `lmtp_factory.decoding`.

    Returns:
        `model`. With `labels`, its forward returns a `LeapOutput` with the stage's `loss`.

    Raises:
        LMTPError: The heads belong to another base model, the base model's logits are not its LM head applied to its
            final hidden states (see `prove_logits`), the LM head cannot be copied, the draft vocabulary is impossible, or
            heads cannot read its layers (see `watch_layers`).
    """
    base = base_of(model)
    if isinstance(base, LeapModel):
        raise LMTPError("This model has leap heads already: attach them once.")
    if heads is not None:
        if draft_tokens is not None:
            raise LMTPError("These heads have their draft vocabulary already: leave draft_tokens out.")
        check_base(heads.config, base.config)
    backbone = prove_logits(base)
    if heads is None:
        heads = fresh_heads(base, config or LMTPConfig(), draft_tokens)
    _check_embeddings(base, heads.config)
    if heads.config.reads_layers:
        watch_layers(base)

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


def fresh_heads(base: PreTrainedModel, config: LMTPConfig, draft_tokens: Sequence[int] | None = None) -> LeapHeads:
    """Return untrained heads for `base`: identity blocks and, for kind `own`, copies of its LM head.

    Random weights follow from torch's initial seed, which LLaMA-Factory sets from `seed`.

    Args:
        base: The base model.
        config: Geometry and kind of the heads.
        draft_tokens: See `attach_heads`.

    Raises:
        LMTPError: There is no LM head, its weights cannot be copied, or the draft vocabulary is missing or of another
            size than the configuration says.
    """
    text_config, lm_head = base.config.get_text_config(), base.get_output_embeddings()
    if lm_head is None:
        raise LMTPError(f"{type(base).__name__} has no LM head to predict tokens with: load a *ForCausalLM class.")
    config = copy.deepcopy(config)
    config.hidden_size, config.vocab_size = state_size(text_config), text_config.vocab_size
    config.base_layers = text_config.num_hidden_layers if config.reads_layers else None
    config.base_model = config.base_model or base.config.name_or_path
    tokens = None if config.draft_vocab_size is None and not draft_tokens else list(draft_tokens or ())
    if tokens is not None and len(tokens) != config.draft_vocab_size:
        raise LMTPError(
            f"draft_vocab_size is {config.draft_vocab_size}, but {len(tokens)} tokens are given: give as many."
        )
    if tokens is not None and not all(a < b for a, b in zip([-1, *tokens], [*tokens, config.vocab_size])):
        raise LMTPError(
            f"The draft vocabulary has to rise from 0 to at most {config.vocab_size - 1}: give sorted token ids without "
            "repetition."
        )
    with torch.random.fork_rng(devices=()):  # layers draw random numbers before `reset` sets their weights
        heads = LeapHeads(config)
    heads.reset(torch.initial_seed())
    if tokens is not None:
        heads.d2t, heads.t2d = draft_vocabulary.tables(torch.tensor(tokens), config.vocab_size)
    if config.head_kind == "own":
        with gathered([lm_head.weight]), _loaded(getattr(lm_head, "base_layer", lm_head)), torch.no_grad():
            if lm_head.weight.is_meta:
                raise LMTPError(
                    f"The weights of {type(lm_head).__name__}, the LM head, are not loaded and cannot be copied into the "
                    "heads: write head_kind: shared, or load the LM head onto a device."
                )
            weight = _dequantised(lm_head, config.hidden_size)
            for head in heads.heads:
                head.unembed.weight.copy_(weight if tokens is None else weight[tokens])
    return heads


def _dequantised(lm_head: nn.Module, hidden_size: int) -> Tensor:
    """Return the (vocabulary, hidden) weight of an LM head, in floating point.

    Whatever the quantisation, the rows of the identity give its columns.
    """
    weight = lm_head.weight
    if weight.is_floating_point() and weight.shape[-1] == hidden_size:
        return weight
    columns = lm_head(torch.eye(hidden_size, device=weight.device))  # (hidden, vocabulary)
    bias = getattr(lm_head, "bias", None)
    return (columns if bias is None else columns - bias).t()


def _check_embeddings(base: PreTrainedModel, config: LMTPConfig) -> None:
    """Check that heads that read a token's embedding can read it beside a state: both have the same width."""
    width = getattr(base.get_input_embeddings(), "embedding_dim", config.hidden_size)
    if config.reads_token and width != config.hidden_size:
        raise LMTPError(
            f"The embeddings of {type(base).__name__} have width {width} and its final hidden states {config.hidden_size}, "
            "so a head cannot read both: write head_inputs: state."
        )


def _loaded(layer: nn.Module) -> AbstractContextManager:
    """Load the weights of a layer that accelerate has offloaded to host memory or disk, inside the context."""
    if not hasattr(layer, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(layer)
