"""Batches of stage 1: documents side by side without padding, or with their hidden states from the cache."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..data.packing import arrange, pack
from ..modeling.documents import keeps_documents_apart
from . import log


MEDIA = ("images", "videos", "audios")


def packing_collator(upstream: Callable, model, tokenizer) -> Callable:
    """``upstream``, or where ``model`` allows it one that packs. The log says which and why."""
    flash = model.config._attn_implementation == "flash_attention_2"
    if not keeps_documents_apart(model):
        log.info("Stage 1 pads its batches, because this model's attention does not stop where a packed document ends.")
        return upstream
    log.info(
        "Stage 1 packs the documents of each batch, borders kept, so that it computes no padding (packing: false pads)."
    )
    return PackingCollator(upstream, model.config.get_text_config().hidden_size, flash, tokenizer.pad_token_id)


class PackingCollator:
    """Packs the documents of a batch; what it cannot pack goes to ``upstream``.

    Args:
        upstream: the collator for documents with media or with positions of their own.
        hidden_size: the model's.
        one_row: all documents in one row, see :func:`~lmtp_factory.data.packing.arrange`.
        pad_token_id: for what is left of a row.
    """

    def __init__(self, upstream: Callable, hidden_size: int, one_row: bool, pad_token_id: int):
        self.upstream, self.hidden_size, self.one_row, self.pad_token_id = upstream, hidden_size, one_row, pad_token_id

    def __call__(self, features: list[dict]) -> dict[str, Tensor]:
        if any(feature.get(key) for feature in features for key in (*MEDIA, "position_ids")):
            return self.upstream(features)
        lengths = [len(feature["input_ids"]) for feature in features]
        return pack(features, arrange(lengths, self.hidden_size, self.one_row), self.pad_token_id)


class CachedStatesCollator:
    """One row of all documents with their final hidden states; documents without go to ``upstream``."""

    def __init__(self, upstream: Callable, pad_token_id: int):
        self.upstream, self.pad_token_id = upstream, pad_token_id

    def __call__(self, features: list[dict]) -> dict[str, Tensor]:
        if "hidden_states" not in features[0]:
            return self.upstream(features)
        batch = pack(features, [list(range(len(features)))], self.pad_token_id)
        states = torch.cat([feature["hidden_states"] for feature in features])
        beyond = batch["input_ids"].shape[1] - len(states)
        return batch | {"hidden_states": torch.nn.functional.pad(states, (0, 0, 0, beyond)).unsqueeze(0)}
