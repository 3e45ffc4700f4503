"""Vocabularies that grow: heads for tokens that stage 2 has added, and the check that nothing else has changed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..config import LMTPConfig
from .checkpoint import base_fingerprint, tokenizer_fingerprint
from .heads import LeapHeads
from .zero3 import gathered


@dataclass(frozen=True)
class Vocabulary:
    """What token ids mean to a model, and how many of them it has embeddings for.

    Attributes:
        size: rows of the embeddings, padding included.
        fingerprint: of the tokenizer; None where there is none.
    """

    size: int
    fingerprint: str | None

    @classmethod
    def of_files(cls, base: str, **hub_options: Any) -> "Vocabulary":
        """That of a model directory or hub id."""
        config = AutoConfig.from_pretrained(base, **hub_options).get_text_config()
        return cls(config.vocab_size, base_fingerprint(base, **hub_options))

    def fits(self, config: LMTPConfig) -> bool:
        """Whether heads were trained on it, by the rules of :func:`~.checkpoint.check_base`."""
        same_tokens = None in (self.fingerprint, config.tokenizer_fingerprint) or (
            self.fingerprint == config.tokenizer_fingerprint
        )
        return config.vocab_size in (None, self.size) and same_tokens


def grow_heads(heads: LeapHeads, base: PreTrainedModel) -> None:
    """Give heads the words that `base` has beyond theirs, in place; nothing where it has none.

    An unembedding of a head's own takes the LM head's new rows, as all of its rows once were copies of the LM head's.
    Under ZeRO-3 a collective operation.
    """
    lm_head, size = base.get_output_embeddings(), base.config.get_text_config().vocab_size
    known = heads.config.vocab_size
    if size == known:
        return
    with gathered([lm_head.weight]), torch.no_grad():
        for head in heads.heads:
            if head.unembed is not None:
                rows = head.unembed.weight  # (known words, hidden)
                new = lm_head.weight[known:].to(rows.device, rows.dtype)
                head.unembed.weight = nn.Parameter(torch.cat([rows, new]))
                head.unembed.out_features = size
    heads.config.vocab_size = size


def new_tokens(folder: str | Path, config: LMTPConfig, base: str, **hub_options: Any) -> list[str]:
    """Tokens that heads know and their base model does not, as the tokenizer saved beside the heads tells.

    Args:
        folder: directory that holds `lmtp/` and the tokenizer of the training.
        config: the heads'.
        base: model directory or hub id; `hub_options` are for it.

    Returns:
        The tokens in the order of their ids. Empty where the heads were not trained with that tokenizer, or it is not the
        base model's own with tokens added: then heads and base do not belong together.
    """
    try:
        grown, own = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base, **hub_options)
    except (OSError, ValueError):
        return []
    words, known = grown.get_vocab(), own.get_vocab()
    if config.tokenizer_fingerprint != tokenizer_fingerprint(grown) or not known.items() <= words.items():
        return []
    return sorted(words.keys() - known.keys(), key=words.__getitem__)
