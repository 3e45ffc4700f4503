"""What look-back decoding leaves to stock `generate`, and how the log says so."""

import functools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PretrainedConfig,
    StoppingCriteriaList,
)
from transformers.generation import EosTokenCriteria

from ..modeling.heads import lm_logits
from .cache import TreeCache
from .compat import attention_implementation
from .row_safety import WHOLE_BATCH_CRITERIA, WHOLE_BATCH_PROCESSORS, is_known
from .state import one_row_state
from .stats import DecodeStats
from .tree import fixed
from .verify import MASKED_ATTENTION, Verifier


logger = logging.getLogger(__name__)

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Their frequencies depend on the greatest position of a forward, and a tree looks a few positions ahead.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# How far logits over a tree may be from those over a branch, as a part of their spread: bf16 noise stays far below,
# wrong masks and heads go far beyond.
_TOLERANCE = 0.1


def unsupported_reason(
    model: nn.Module,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: dict,
) -> str | None:
    """Why this call cannot be decoded with heads, as the end of a sentence; None where it can.

    Args:
        input_ids: (batch, prompt length).
        model_kwargs: the model's inputs as `generate` prepared them.
    """
    return next(_reasons(model, input_ids, processors, criteria, config, synced_gpus, model_kwargs), None)


def _reasons(model, input_ids, processors, criteria, config, synced_gpus, model_kwargs) -> Iterator[str]:
    """One after the other, so that the last, a trial of the model, is made only where nothing else speaks against it."""
    text_config, batch = model.config.get_text_config(), len(input_ids)
    if synced_gpus:
        yield "synced_gpus is on"
    if not model_kwargs.get("use_cache") or model_kwargs.get("past_key_values") is None:
        yield "use_cache is off"
    if model.training and _checkpoints(model):
        yield "gradient checkpointing in train mode keeps no cache"
    if config.prefill_chunk_size is not None:
        yield "prefill_chunk_size is set"
    if config.output_attentions or config.output_hidden_states:
        yield "attentions or hidden states are wanted"
    attention = attention_implementation(text_config)
    if attention not in MASKED_ATTENTION:
        yield f"attention {attention} takes no tree mask, load with attn_implementation sdpa (flash_attn: sdpa)"
    others = set(getattr(text_config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others:
        yield f"layers of type {', '.join(sorted(others))} cannot go back"
    if "prepare_inputs_for_generation" in vars(model):
        yield "its inputs are prepared by another library, as in prompt tuning"
    if getattr(text_config, "num_kv_shared_layers", 0):
        yield "layers share keys and values"
    positions = model_kwargs.get("position_ids")
    if positions is None:
        yield "the model takes no position_ids"
    elif _passes_rope_limit(text_config, config.max_length - input_ids.shape[1], positions):
        yield "generation may pass the length at which this model's rotary embedding changes"
    if batch > 1:
        yield from _batch_reasons(processors, criteria, config)
    if not takes_trees(model):
        yield "a tree-masked forward does not match sequential forwards"


def _batch_reasons(
    processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
) -> Iterator[str]:
    """Rows are walked one by one, and each is shown to processors and criteria on its own."""
    if any(type(p).__name__ in WHOLE_BATCH_PROCESSORS and is_known(p) for p in processors):
        yield "a logits processor wants the whole batch"
    if any(type(c).__name__ in WHOLE_BATCH_CRITERIA and is_known(c) for c in criteria):
        yield "a stopping criterion wants the whole batch"
    if any(type(c) is not MaxLengthCriteria for c in criteria):  # rows may end before others
        if not any(isinstance(c, EosTokenCriteria) for c in criteria):
            yield "rows of a batch end by a criterion of their own and there is no end-of-sequence token to pad with"
        if config.return_dict_in_generate and (config.output_scores or config.output_logits):
            yield "scores are wanted of rows that may end before others"
    foreign = next((part for part in (*processors, *criteria) if not is_known(part)), None)
    if foreign is not None:
        name = getattr(foreign, "__name__", type(foreign).__name__)
        yield f"{name} is no class of transformers and may want the whole batch"


def leave_to_stock(stats: DecodeStats, reason: str) -> None:
    """Note that stock `generate` decodes, and why; the log says it once."""
    stats.strategy, stats.stock_reason = "off", reason
    say_once(f"Decoding without leap heads: {reason}.")


@functools.cache
def say_once(message: str) -> None:
    """A warning, once in this process."""
    logger.warning(message)


def takes_trees(model: nn.Module) -> bool:
    """Whether a forward over a tree gives what forwards over its branches give.

    Some models build their masks by themselves, or have more between the last hidden state and the logits than a matrix.
    The answer is kept for each attention implementation; not in train mode, where dropout may be what differs, and not
    where the trial failed with an error, which may be the device's.
    """
    attention = attention_implementation(model.config.get_text_config())
    answers = vars(model).get("_takes_trees", {})
    if attention in answers and not model.training:
        return answers[attention]
    try:
        with _own_random_numbers(model) if model.training else nullcontext():
            agrees = _agrees_on_a_tree(model)
    except Exception:  # a model may dislike a mask in any way
        return False
    if not model.training:
        model._takes_trees = {**answers, attention: agrees}
    return agrees


def _own_random_numbers(model: nn.Module) -> AbstractContextManager:
    """What dropout draws inside is not missing outside."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return torch.random.fork_rng(devices=devices)


def _agrees_on_a_tree(model: nn.Module) -> bool:
    config = model.config.get_text_config()
    ids = (config.vocab_size // 3 + torch.arange(7, device=model.device)) % config.vocab_size
    prompt, tokens = ids[None, :3], ids[None, 3:]  # (1, 3), (1, 4)
    cache = TreeCache.replacing(DynamicCache(config=config), config, columns=0)
    positions = torch.arange(3, device=model.device)[None]
    model.base_model(input_ids=prompt, position_ids=positions, past_key_values=cache, use_cache=True)
    state = one_row_state(cache, length=3, last_position=9, device=model.device)
    hidden = Verifier(model)(tokens, fixed([(), (0,), (1,), (1, 0)], model.device), state)  # (1, 4, hidden)
    for leaf, branch in ((1, [0, 1]), (3, [0, 2, 3])):
        path = torch.cat([prompt, tokens[:, branch]], dim=1)
        theirs = model(input_ids=path, use_cache=False).logits[0, -1].float()
        ours = lm_logits(model, hidden[0, leaf]).float()
        if not (ours - theirs).norm() <= _TOLERANCE * (theirs - theirs.mean()).norm():
            return False
    return True


def _checkpoints(model: nn.Module) -> bool:
    """Whether some layer recomputes in the backward pass; such a layer drops `past_key_values` without an error."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _passes_rope_limit(text_config: PretrainedConfig, new_tokens: int, positions: Tensor) -> bool:
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    settings = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    for setting in settings:
        if setting.get("rope_type", setting.get("type")) in _LENGTH_DEPENDENT_ROPE:
            limit = setting.get("original_max_position_embeddings") or getattr(
                text_config, "original_max_position_embeddings", text_config.max_position_embeddings
            )
            if int(positions.max()) + 1 + new_tokens > limit:
                return True
    return False
