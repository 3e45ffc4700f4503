"""Every private name of transformers that decoding leans on, in one place and checked.

The public interface of transformers is kept between minor versions; these names are not promised. A version that lacks one
is refused with the name, before it decodes something else.
"""

import inspect
from functools import cache

import transformers
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ..errors import LMTPError


# Of each class the attributes that are used, and of each method the arguments that it is called with.
ATTRIBUTES = {
    GenerationMixin: ("_sample", "_valid_auto_compile_criteria", "prepare_inputs_for_generation"),
    DynamicLayer: ("lazy_initialization", "get_seq_length"),
    DynamicSlidingWindowLayer: ("lazy_initialization", "get_seq_length"),
    StaticLayer: ("update", "get_mask_sizes"),
}
PARAMETERS = {
    GenerationMixin._sample: (
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
    ),
    GenerationMixin.prepare_inputs_for_generation: ("input_ids", "next_sequence_length", "is_first_iteration"),
}


@cache
def check_transformers() -> None:
    """Refuse a version of transformers that lacks what decoding leans on; asked once in this process.

    Raises:
        LMTPError: naming the version and what it lacks.
    """
    missing = [
        f"{owner.__name__}.{name}" for owner, names in ATTRIBUTES.items() for name in names if not hasattr(owner, name)
    ]
    for method, names in PARAMETERS.items():
        known = inspect.signature(method).parameters
        missing += [f"{method.__qualname__}({name})" for name in names if name not in known]
    if missing:
        raise LMTPError(
            f"Decoding with leap heads does not know transformers {transformers.__version__}, which has no "
            f'{", ".join(missing)}: pip install "transformers<5.18".'
        )


def pad_token(config: GenerationConfig) -> int | None:
    """The padding token of a prepared generation config."""
    prepared = config._pad_token_tensor
    return None if prepared is None else int(prepared)


def compiles(model: nn.Module, model_kwargs: dict, config: GenerationConfig) -> bool:
    """Whether `generate` would compile the model's forward for this call."""
    return model._valid_auto_compile_criteria(model_kwargs, config)


def attention_implementation(config: PretrainedConfig) -> str:
    """`sdpa`, `eager`, `flash_attention_2`, ..."""
    return config._attn_implementation
