"""What decoding uses of transformers beyond its documented interface: a check that it exists, and where versions differ.

Such names may change in any version of transformers. A version that lacks one is refused before heads attach. Only
`_pad_token_tensor` and `_mask_length` of `GenerationConfig`, which `generate` sets, are checked when they are read.
"""

import inspect
from functools import cache

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ..errors import LMTPError


# The first version that has the names below.
OLDEST = "5.2"
_REMEDY = f'pip install "transformers>={OLDEST}"'
_PREPARED = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
# Name of the key-value cache among the arguments and outputs of a model. It is `cache` since transformers 5.24.
CACHE = "cache" if "cache" in _PREPARED else "past_key_values"
# Until transformers 5.3 a forward and its cache are told the columns of the new tokens, since 5.4 only how many there are.
TAKES_COLUMNS = "cache_position" in inspect.signature(DynamicLayer.get_mask_sizes).parameters
# Since 5.3 the inputs of a forward are cut to a number of new tokens, until 5.2 to their columns.
TAKES_LENGTH = "next_sequence_length" in _PREPARED

# Attributes of classes.
ATTRIBUTES = {
    GenerationMixin: ("_sample", "_valid_auto_compile_criteria", "prepare_inputs_for_generation"),
    PretrainedConfig: ("_attn_implementation",),
    DynamicLayer: ("lazy_initialization", "get_seq_length"),
    DynamicSlidingWindowLayer: ("lazy_initialization", "get_seq_length"),
    StaticLayer: ("update", "get_mask_sizes"),
}
# Attributes that instances get in their `__init__`, and how to make an instance.
INSTANCE_ATTRIBUTES = {
    DynamicCache: ("layers", "offloading"),
    DynamicLayer: ("keys", "values", "is_initialized"),
    DynamicSlidingWindowLayer: ("sliding_window", "cumulative_length"),
    StaticLayer: ("is_initialized", "max_cache_len", *(() if TAKES_COLUMNS else ("cumulative_length",))),
}
INSTANCES = {
    DynamicCache: DynamicCache,
    DynamicLayer: DynamicLayer,
    DynamicSlidingWindowLayer: lambda: DynamicSlidingWindowLayer(sliding_window=1),
    StaticLayer: lambda: StaticLayer(max_cache_len=1),
}
# Parameters of methods.
PARAMETERS = {
    (GenerationMixin, "_sample"): (
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
    ),
    (GenerationMixin, "prepare_inputs_for_generation"): (
        "input_ids",
        "cache_position" if TAKES_COLUMNS else "next_sequence_length",
        "is_first_iteration",
    ),
    (StaticLayer, "get_mask_sizes"): ("cache_position" if TAKES_COLUMNS else "query_length",),
}


@cache
def check_transformers() -> None:
    """Check once per process that the installed transformers has every name listed above.

    Raises:
        LMTPError: A name is missing.
    """
    missing = [
        f"{owner.__name__}.{name}" for owner, names in ATTRIBUTES.items() for name in names if not hasattr(owner, name)
    ]
    for owner, names in INSTANCE_ATTRIBUTES.items():
        instance = INSTANCES[owner]()
        missing += [f"{owner.__name__}.{name}" for name in names if not hasattr(instance, name)]
    for (owner, method), names in PARAMETERS.items():
        function = getattr(owner, method, None)
        known = inspect.signature(function).parameters if function else ()
        missing += [f"{owner.__name__}.{method}({name})" for name in names if name not in known]
    if missing:
        raise _unsupported(missing)


def _unsupported(missing: list[str]) -> LMTPError:
    return LMTPError(
        f"Decoding with leap heads does not support transformers {transformers.__version__}, which has no "
        f"{', '.join(missing)}: {_REMEDY}."
    )


def pad_token(config: GenerationConfig) -> int | None:
    """Return the padding token of a prepared generation config.

    Raises:
        LMTPError: `generate` has not set it under this name.
    """
    if not hasattr(config, "_pad_token_tensor"):
        raise _unsupported(["GenerationConfig._pad_token_tensor"])
    prepared = config._pad_token_tensor
    return None if prepared is None else int(prepared)


def mask_length(mask: Tensor | None, config: GenerationConfig, length: int) -> int:
    """Return the number of columns of the prompt's attention mask, cached tokens included.

    Args:
        mask: (batch, columns) attention mask, or None if it masks nothing.
        config: Prepared generation config, where transformers 5.24 notes the length of a mask that it leaves out.
        length: Number of prompt tokens, for versions that leave no mask out.

    Raises:
        LMTPError: The mask was left out, and its length is not noted.
    """
    if mask is not None:
        return mask.shape[1]
    if CACHE == "cache" and not hasattr(config, "_mask_length"):
        raise _unsupported(["GenerationConfig._mask_length"])
    return getattr(config, "_mask_length", length)


def prompt_inputs(model: nn.Module, input_ids: Tensor, known: int, new: int, model_kwargs: dict) -> dict:
    """Return the inputs of the prompt's forward.

    Args:
        model: A causal LM.
        input_ids: (batch, tokens). Its last `new` tokens, or those of the embeddings in their place, are not cached.
        known: Number of tokens in the cache.
        new: Number of tokens of the forward.
        model_kwargs: The model's inputs as `generate` prepared them.
    """
    length = {"next_sequence_length": new} if TAKES_LENGTH else {}
    columns = column_arguments(known, new, input_ids.device)
    return model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **(model_kwargs | length | columns))


def column_arguments(first: int | Tensor, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Return the keyword arguments that tell a forward the columns of its tokens: none since transformers 5.4.

    Args:
        first: Column of the first token; a tensor of one number does too.
        tokens: Number of tokens.
        device: Device of the columns.
    """
    return {"cache_position": first + torch.arange(tokens, device=device)} if TAKES_COLUMNS else {}


def query_length(query: int | Tensor) -> int:
    """Return the number of new tokens that a cache is asked about: the number itself, or the length of their columns."""
    return len(query) if isinstance(query, Tensor) else query


def forget_cache(model: nn.Module, cache: object) -> None:
    """Let `generate` make a new static cache in its next call, if it keeps `cache` with the model.

    Not every version keeps one: transformers 5.24 makes one per call.
    """
    if vars(model).get("_cache") is cache:
        del model._cache


def compiles(model: nn.Module, model_kwargs: dict, config: GenerationConfig) -> bool:
    """Return whether `generate` would compile the model's forward for this call."""
    return model._valid_auto_compile_criteria(model_kwargs, config)


def attention_implementation(config: PretrainedConfig) -> str:
    """Return the name of the attention implementation, e.g. `sdpa`, `eager` or `flash_attention_2`."""
    return config._attn_implementation
