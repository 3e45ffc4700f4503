"""Private names of transformers that decoding uses, and a check that they exist.

Private names may change in any version of transformers. A version that lacks one is refused before it can decode
wrongly.
"""

import inspect
from functools import cache

import transformers
from packaging import version
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ..errors import LMTPError


# The first version that does not work: it passes the key-value cache under another name.
TOO_NEW = "5.24"

# Attributes used of each class, and arguments passed to each method of `GenerationMixin`.
ATTRIBUTES = {
    GenerationMixin: ("_sample", "_valid_auto_compile_criteria", "prepare_inputs_for_generation"),
    DynamicLayer: ("lazy_initialization", "get_seq_length"),
    DynamicSlidingWindowLayer: ("lazy_initialization", "get_seq_length"),
    StaticLayer: ("update", "get_mask_sizes"),
}
PARAMETERS = {
    "_sample": (
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
    ),
    "prepare_inputs_for_generation": ("input_ids", "next_sequence_length", "is_first_iteration"),
}


@cache
def check_transformers() -> None:
    """Check once per process that the installed transformers has every private name that decoding uses.

    Raises:
        LMTPError: A name is missing, or the version is too new.
    """
    if version.parse(transformers.__version__) >= version.parse(TOO_NEW):
        raise LMTPError(
            f"Decoding with leap heads does not work with transformers {transformers.__version__}: "
            f'pip install "transformers<{TOO_NEW}".'
        )
    missing = [
        f"{owner.__name__}.{name}" for owner, names in ATTRIBUTES.items() for name in names if not hasattr(owner, name)
    ]
    for method, names in PARAMETERS.items():
        function = getattr(GenerationMixin, method, None)
        known = inspect.signature(function).parameters if function else ()
        missing += [f"GenerationMixin.{method}({name})" for name in names if name not in known]
    if missing:
        raise LMTPError(
            f"Decoding with leap heads does not support transformers {transformers.__version__}, which has no "
            f'{", ".join(missing)}: pip install "transformers<{TOO_NEW}".'
        )


def pad_token(config: GenerationConfig) -> int | None:
    """Return the padding token of a prepared generation config."""
    prepared = config._pad_token_tensor
    return None if prepared is None else int(prepared)


def compiles(model: nn.Module, model_kwargs: dict, config: GenerationConfig) -> bool:
    """Return whether `generate` would compile the model's forward for this call."""
    return model._valid_auto_compile_criteria(model_kwargs, config)


def attention_implementation(config: PretrainedConfig) -> str:
    """Return the name of the attention implementation, e.g. `sdpa`, `eager` or `flash_attention_2`."""
    return config._attn_implementation
