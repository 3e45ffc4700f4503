"""What look-back decoding leaves to stock ``generate``, and how the log says so."""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria

from .verify import MASKED_ATTENTION


# Classes of transformers that know a row by its place in the batch, or mix rows. Each row is shown on its own here.
WHOLE_BATCH_PROCESSORS = {
    "ClassifierFreeGuidanceLogitsProcessor",
    "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "WhisperNoSpeechDetection",
}
WHOLE_BATCH_CRITERIA = {"ConfidenceCriteria"}
# Packages whose other processors and criteria are known to treat every row by itself.
_ROW_SAFE_PACKAGES = ("transformers.", "lmtp_factory.")
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Their frequencies depend on the greatest position of a forward, and a tree looks a few positions ahead.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def obstacle(
    model: nn.Module,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict,
) -> str | None:
    """Why this call cannot be decoded with heads, as the end of a sentence; None where it can."""
    batch, text_config = len(input_ids), model.config.get_text_config()
    kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    attention = text_config._attn_implementation
    uneven = batch > 1 and any(type(c) is not MaxLengthCriteria for c in criteria)  # rows may end before others
    foreign = next((part for part in (*processors, *criteria) if not is_known(part)), None)
    reasons = {
        "use_cache is off": not model_kwargs.get("use_cache") or model_kwargs.get("past_key_values") is None,
        "gradient checkpointing in train mode keeps no cache": model.training and _checkpoints(model),
        "prefill_chunk_size is set": config.prefill_chunk_size is not None,
        "attentions or hidden states are wanted": config.output_attentions or config.output_hidden_states,
        f"attention {attention} takes no tree mask, load with attn_implementation sdpa (flash_attn: sdpa)": attention
        not in MASKED_ATTENTION,
        f"layers of type {', '.join(sorted(kinds - _ATTENTION_LAYERS))} cannot go back": not kinds <= _ATTENTION_LAYERS,
        "its inputs are prepared by somebody else, as in prompt tuning": "prepare_inputs_for_generation" in vars(model),
        "layers share keys and values": bool(getattr(text_config, "num_kv_shared_layers", 0)),
        "the model takes no position_ids": model_kwargs.get("position_ids") is None,
        "generation may pass the length at which this model's rotary embedding changes": _passes_rope_limit(
            text_config, config.max_length - input_ids.shape[1], model_kwargs.get("position_ids")
        ),
        "a logits processor wants the whole batch": batch > 1
        and any(type(p).__name__ in WHOLE_BATCH_PROCESSORS and is_known(p) for p in processors),
        "a stopping criterion wants the whole batch": batch > 1
        and any(type(c).__name__ in WHOLE_BATCH_CRITERIA and is_known(c) for c in criteria),
        "rows of a batch end by a criterion of their own and there is no end-of-sequence token to pad with": uneven
        and not any(isinstance(c, EosTokenCriteria) for c in criteria),
        "scores are wanted of rows that may end before others": uneven
        and config.return_dict_in_generate
        and (config.output_scores or config.output_logits),
        f"{_name(foreign)} is no class of transformers and may want the whole batch": batch > 1 and foreign is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _checkpoints(model: nn.Module) -> bool:
    """Whether some layer recomputes in the backward pass; such a layer drops ``past_key_values`` without an error."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


def is_known(part: Callable) -> bool:
    """Whether a logits processor or stopping criterion is defined by transformers or here, not by a subclass elsewhere."""
    return type(part).__module__.startswith(_ROW_SAFE_PACKAGES)


def _name(part: Callable | None) -> str:
    return getattr(part, "__name__", type(part).__name__)


def _passes_rope_limit(text_config, new_tokens: int, positions: Tensor | None) -> bool:
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    settings = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    for setting in settings:
        if setting.get("rope_type", setting.get("type")) in _LENGTH_DEPENDENT_ROPE:
            limit = setting.get("original_max_position_embeddings") or getattr(
                text_config, "original_max_position_embeddings", text_config.max_position_embeddings
            )
            if positions is not None and int(positions.max()) + 1 + new_tokens > limit:
                return True
    return False
