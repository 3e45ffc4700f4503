"""What look-back decoding leaves to stock ``generate``, and how the log says so."""

from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .verify import MASKED_ATTENTION


# They know a row by its place in the batch, and rows are processed one by one here.
_WHOLE_BATCH_PROCESSORS = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
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
    reasons = {
        "use_cache is off": not model_kwargs.get("use_cache") or model_kwargs.get("past_key_values") is None,
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
        and any(isinstance(p, _WHOLE_BATCH_PROCESSORS) for p in processors),
        "rows of a batch end by a criterion of their own and there is no end-of-sequence token to pad with": uneven
        and not any(isinstance(c, EosTokenCriteria) for c in criteria),
        "scores are wanted of rows that may end before others": uneven
        and config.return_dict_in_generate
        and (config.output_scores or config.output_logits),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


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
