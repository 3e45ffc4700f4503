"""Generation without the rest of a model's generation_config.json: of what it asks for, only the token ids are kept.

Many models ship sampling, penalties, forbidden tokens, a smallest length or beams. Leap heads learn and are measured on
the model's own distribution, which these change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def plain_config(saved: GenerationConfig, **options: Any) -> GenerationConfig:
    """Return a greedy generation config with the token ids of another one.

    It has to take the place of `model.generation_config`: `generate` fills what an argument `generation_config` leaves
    at None from there, for instance `suppress_tokens`.

    Args:
        saved: The model's generation config.
        options: Further options, which overrule token ids and greedy search.
    """
    ids = {name: getattr(saved, name) for name in _TOKEN_IDS}
    return GenerationConfig(**{"do_sample": False, **ids, **options})


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Replace the model's generation config by its `plain_config` inside the context."""
    saved = model.generation_config
    model.generation_config = plain_config(saved)
    try:
        yield
    finally:
        model.generation_config = saved
