"""Batches of stage 1: documents side by side without padding, or with their hidden states from the cache."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations import is_deepspeed_zero3_enabled

from ..data.hidden_cache import HiddenCache
from ..data.packing import arrange, pack
from ..modeling.packing_probe import keeps_documents_apart
from . import log


MEDIA = ("images", "videos", "audios")
# Where a document of the cache stands, in a training example.
CACHE_INDEX = "cache_index"


def packing_collator(upstream: Callable, model, tokenizer, data_args, training_args) -> Callable:
    """``upstream``, or where nothing speaks against it one that packs. The log says which and why."""
    plugin = upstream.template.mm_plugin
    obstacles = {
        # Several ranks share out the rows of a streamed batch, and packing leaves fewer rows than ranks.
        "streamed batches are shared out by rows": data_args.streaming and training_args.world_size > 1,
        "generation needs padding on the left": training_args.predict_with_generate,
        # Upstream gives every batch a medium then, so that all ranks run the same modules.
        "batches without media would not run what those with media run on other ranks": (
            is_deepspeed_zero3_enabled() and any((plugin.image_token, plugin.video_token, plugin.audio_token))
        ),
    }
    obstacle = next((words for words, holds in obstacles.items() if holds), None)
    if obstacle is None and not keeps_documents_apart(model):  # upstream passes no model for generation
        obstacle = "this model's attention does not stop where a packed document ends"
    if obstacle is not None:
        log.info(f"Stage 1 pads its batches, because {obstacle}.")
        return upstream
    log.info("Stage 1 packs the documents of each batch, borders kept, and computes no padding (packing: false pads).")
    config = model.config
    return PackingCollator(
        upstream, config.get_text_config().hidden_size, config._attn_implementation, tokenizer.pad_token_id
    )


class PackingCollator:
    """Packs the documents of a batch; one with media, or with positions of its own, goes to ``upstream``.

    Args:
        hidden_size, attention: the model's, see :func:`~lmtp_factory.data.packing.arrange`.
        pad_token_id: for what is left of a row.
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
    """One row of all documents with their final hidden states; those that are not in the cache go to ``upstream``."""

    def __init__(self, upstream: Callable, cache: HiddenCache, pad_token_id: int):
        self.upstream, self.cache, self.pad_token_id = upstream, cache, pad_token_id

    def __call__(self, features: list[dict]) -> dict[str, Tensor]:
        if CACHE_INDEX not in features[0]:
            return self.upstream(features)
        batch = pack(features, [list(range(len(features)))], self.pad_token_id)
        states = torch.cat([self.cache.document(feature[CACHE_INDEX]) for feature in features])
        beyond = batch["input_ids"].shape[1] - len(states)
        return batch | {"hidden_states": F.pad(states, (0, 0, 0, beyond)).unsqueeze(0)}
