"""Which calls look-back decoding supports. Other calls use transformers' own decoding, and the log says why."""

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

from ..errors import first_line
from ..modeling.heads import lm_logits
from .cache import TreeCache
from .compat import CACHE, TAKES_COLUMNS, attention_implementation, compiles, mask_length
from .row_safety import is_known, wants_whole_batch
from .state import one_row_state, prompt_length
from .stats import DecodeStats
from .tree import fixed
from .verify import MASKED_ATTENTION, verify


logger = logging.getLogger(__name__)

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# RoPE types whose frequencies depend on the largest position of a forward, which a tree's draft would raise.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# Largest distance between the logits of a tree forward and of a sequential forward, relative to the logits' spread.
# bf16 noise is far below it, wrong masks are far above it.
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
    """Return why this call cannot be decoded with heads, as a clause for the log, or None if it can.

    Args:
        model: A model with leap heads.
        input_ids: (batch, prompt length).
        processors: Logits processors.
        criteria: Stopping criteria.
        config: Generation config.
        synced_gpus: The argument of `generate`.
        model_kwargs: The model's inputs as `generate` prepared them.
    """
    return next(_reasons(model, input_ids, processors, criteria, config, synced_gpus, model_kwargs), None)


def _reasons(model, input_ids, processors, criteria, config, synced_gpus, model_kwargs) -> Iterator[str]:
    """Yield reasons lazily: the last check runs the model, so it is made only if all others pass."""
    batch = len(input_ids)
    if synced_gpus:
        yield "synced_gpus is on"
    if not model_kwargs.get("use_cache") or model_kwargs.get(CACHE) is None:
        yield "use_cache is off"
    if model.training and _checkpoints(model):
        yield "gradient checkpointing in train mode keeps no cache"
    if model.leap_heads.config.reads_layers and compiles(model, model_kwargs, config):
        yield "a compiled forward does not show the inner layers that these heads read"
    if TAKES_COLUMNS and _holds_whole_prompt(model_kwargs, config, prompt_length(input_ids, model_kwargs)):
        yield "the cache holds the whole prompt"
    if config.prefill_chunk_size is not None:
        yield "prefill_chunk_size is set"
    if config.output_attentions or config.output_hidden_states:
        yield "attentions or hidden states are wanted"
    yield from _model_reasons(model)
    positions = model_kwargs.get("position_ids")
    if positions is None:
        yield "the model takes no position_ids"
    elif _passes_rope_limit(model.config.get_text_config(), config.max_length - input_ids.shape[1], positions):
        yield "generation may pass the length at which this model's rotary embedding changes"
    if batch > 1:
        yield from _batch_reasons(processors, criteria, config)
    if (failure := trial_failure(model)) is not None:
        yield failure


def _model_reasons(model: nn.Module) -> Iterator[str]:
    """Yield reasons that concern the model alone and need no forward."""
    text_config = model.config.get_text_config()
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
    if TAKES_COLUMNS and "llama_4_scaling_beta" in (getattr(text_config, "rope_parameters", None) or {}):
        yield "before transformers 5.4 this model scales queries by columns, which are not a tree's positions"


def no_tree_forward_reason(model: nn.Module, length: int) -> str | None:
    """Return why a tree-masked forward over texts of up to `length` tokens is not possible, as a clause, or None if it is.

    Args:
        model: A causal LM, with or without leap heads.
        length: Number of tokens of the longest text, the tree's levels included.
    """
    if (reason := next(_model_reasons(model), None)) is not None:
        return reason
    if _passes_rope_limit(model.config.get_text_config(), 0, torch.tensor(length - 1)):
        return "the text passes the length at which this model's rotary embedding changes"
    return trial_failure(model)


def _holds_whole_prompt(model_kwargs: dict, config: GenerationConfig, length: int) -> bool:
    """Return whether the cache holds all `length` tokens of the prompt, so that its forward would be empty."""
    cache = model_kwargs.get(CACHE)
    known = 0 if cache is None else int(cache.get_seq_length())
    return 0 < known == length == mask_length(model_kwargs.get("attention_mask"), config, length)


def _batch_reasons(
    processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
) -> Iterator[str]:
    """Yield reasons that concern batches: processors and criteria are called with one row at a time."""
    if any(map(wants_whole_batch, processors)):
        yield "a logits processor wants the whole batch"
    if any(map(wants_whole_batch, criteria)):
        yield "a stopping criterion wants the whole batch"
    if any(type(c) is not MaxLengthCriteria for c in criteria):  # rows may end at different lengths
        if not any(isinstance(c, EosTokenCriteria) for c in criteria):
            yield "rows of a batch end by a criterion of their own and there is no end-of-sequence token to pad with"
        if config.return_dict_in_generate and (config.output_scores or config.output_logits):
            yield "scores are wanted of rows that may end before others"
    third_party = next((part for part in (*processors, *criteria) if not is_known(part)), None)
    if third_party is not None:
        name = getattr(third_party, "__name__", type(third_party).__name__)
        yield f"{name} is no class of transformers and may want the whole batch"


def fall_back(stats: DecodeStats, reason: str) -> None:
    """Record that transformers' own decoding is used, and why. Each reason is logged once."""
    stats.strategy, stats.stock_reason = "off", reason
    warn_once(f"Decoding without leap heads: {reason}.")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning once per process."""
    logger.warning(message)


def trial_failure(model: nn.Module) -> str | None:
    """Try whether a tree-masked forward matches sequential forwards over the tree's branches.

    Some models ignore a given mask, or compute more than a matmul between the last hidden state and the logits. The
    result is cached per attention implementation. It is not cached in train mode, where dropout may cause the
    difference, or after an exception, which may be temporary (out of memory).

    Returns:
        How the trial failed, as a clause for the log, or None if the forwards match.
    """
    attention = attention_implementation(model.config.get_text_config())
    results = vars(model).get("_takes_trees", {})
    agrees = None if model.training else results.get(attention)
    if agrees is None:
        try:
            with _preserve_rng(model) if model.training else nullcontext():
                agrees = _agrees_on_a_tree(model)
        except Exception as error:  # models reject masks with exceptions of any type
            return f"the trial of a tree-masked forward failed ({type(error).__name__}: {first_line(error)})"
        if not model.training:
            model._takes_trees = {**results, attention: agrees}
    return None if agrees else "a tree-masked forward does not match sequential forwards"


def _preserve_rng(model: nn.Module) -> AbstractContextManager:
    """Restore the random number generators on exit, because dropout draws from them."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return torch.random.fork_rng(devices=devices)


def _agrees_on_a_tree(model: nn.Module) -> bool:
    """Compare the logits of a tree of four nodes behind a prompt of three tokens with those of sequential forwards."""
    config = model.config.get_text_config()
    ids = (config.vocab_size // 3 + torch.arange(7, device=model.device)) % config.vocab_size
    prompt, tokens = ids[None, :3], ids[None, 3:]  # (1, 3), (1, 4)
    cache = TreeCache.replacing(DynamicCache(config=config), config, columns=0)
    positions = torch.arange(3, device=model.device)[None]
    model.base_model(input_ids=prompt, position_ids=positions, use_cache=True, **{CACHE: cache})
    state = one_row_state(cache, length=3, last_position=9, device=model.device)
    hidden = verify(model, tokens, fixed([(), (0,), (1,), (1, 0)], model.device), state)  # (1, 4, hidden)
    for leaf, branch in ((1, [0, 1]), (3, [0, 2, 3])):
        sequence = torch.cat([prompt, tokens[:, branch]], dim=1)  # (1, 3 + branch)
        expected = model(input_ids=sequence, use_cache=False).logits[0, -1].float()  # (vocabulary,)
        actual = lm_logits(model, hidden[0, leaf]).float()  # (vocabulary,)
        if not (actual - expected).norm() <= _TOLERANCE * (expected - expected.mean()).norm():
            return False
    return True


def _checkpoints(model: nn.Module) -> bool:
    """Return whether a layer uses gradient checkpointing, which silently drops the key-value cache."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _passes_rope_limit(text_config: PretrainedConfig, new_tokens: int, positions: Tensor) -> bool:
    """Return whether generation may pass the length at which a length-dependent RoPE changes its frequencies."""
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
