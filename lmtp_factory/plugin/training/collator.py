"""Batches of stage 1: packed documents instead of padded rows, or documents with their cached hidden states."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations import is_deepspeed_zero3_enabled

from ...modeling.checkpoint import state_size
from ...modeling.packing_probe import keeps_documents_apart
from .. import log
from .hidden_cache import HiddenCache
from .packing import arrange, pack


MEDIA = ("images", "videos", "audios")
# Key of a training example that holds its index in the cache.
CACHE_INDEX = "cache_index"


def packing_collator(upstream: Callable, model, tokenizer, data_args, training_args) -> Callable:
    """A packing collator if packing is supported, otherwise `upstream`; the log says which, and why."""
    for reason in _reasons_to_pad(upstream.template.mm_plugin, model, data_args, training_args):
        log.info(f"Stage 1 pads its batches, because {reason}.")
        return upstream
    log.info("Stage 1 packs the documents of each batch, borders kept, and computes no padding (packing: false pads).")
    config = model.config
    return PackingCollator(
        upstream, state_size(config.get_text_config()), config._attn_implementation, tokenizer.pad_token_id
    )


def _reasons_to_pad(media_plugin, model, data_args, training_args) -> Iterator[str]:
    """Reasons why batches cannot be packed. The last one costs forwards of the model, so the order matters."""
    if data_args.streaming and training_args.world_size > 1:  # packing leaves fewer rows than ranks
        yield "ranks split streamed batches by rows"
    if training_args.predict_with_generate:  # upstream then passes no model
        yield "generation needs padding on the left"
    has_media = any((media_plugin.image_token, media_plugin.video_token, media_plugin.audio_token))
    if is_deepspeed_zero3_enabled() and has_media:  # upstream adds a medium to every batch then
        yield "batches without media would not run what those with media run on other ranks"
    if not keeps_documents_apart(model):
        yield "this model's attention does not stop where a packed document ends"


class PackingCollator:
    """Packs the documents of a batch. `upstream` collates batches with media or with positions of their own.

    Args:
        upstream: Collator that pads.
        hidden_size: Width of the model's hidden states, see `arrange`.
        attention: The model's attention implementation, see `arrange`.
        pad_token_id: Fills the end of a row.
    """

    def __init__(self, upstream: Callable, hidden_size: int, attention: str, pad_token_id: int):
        self.upstream, self.pad_token_id = upstream, pad_token_id
        self.hidden_size, self.attention = hidden_size, attention

    def __call__(self, features: list[dict]) -> dict[str, Tensor]:
        if any(feature.get(key) for feature in features for key in (*MEDIA, "position_ids")):
            return self.upstream(features)
        lengths = [len(feature["input_ids"]) for feature in features]
        return pack(features, arrange(lengths, self.hidden_size, self.attention), self.pad_token_id)


class CachedStatesCollator:
    """Packs all documents of a batch into one row, with cached final hidden states.

    `upstream` collates examples that have no cached states, such as those of evaluation.

    Args:
        upstream: Collator that pads.
        cache: Hidden states of the training set.
        pad_token_id: Fills the end of a row.
    """

    def __init__(self, upstream: Callable, cache: HiddenCache, pad_token_id: int):
        self.upstream, self.cache, self.pad_token_id = upstream, cache, pad_token_id

    def __call__(self, features: list[dict]) -> dict[str, Tensor]:
        if CACHE_INDEX not in features[0]:
            return self.upstream(features)
        batch = pack(features, [list(range(len(features)))], self.pad_token_id)
        states = torch.cat([self.cache.document(feature[CACHE_INDEX]) for feature in features])  # (tokens, hidden)
        padding = batch["input_ids"].shape[1] - len(states)  # the row's length is rounded up
        return batch | {"hidden_states": F.pad(states, (0, 0, 0, padding)).unsqueeze(0)}  # (1, length, hidden)
