"""Vocabulary growth: extending heads by tokens that stage 2 adds, and checking that all other tokens are unchanged."""

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
    """A model's number of embeddings and the fingerprint of its tokenizer.

    Attributes:
        size: Number of rows of the embeddings, padding included.
        fingerprint: Fingerprint of the tokenizer, or None if there is no tokenizer.
    """

    size: int
    fingerprint: str | None

    @classmethod
    def of_files(cls, base: str, **hub_options: Any) -> "Vocabulary":
        """Read the vocabulary of a model directory or hub id."""
        config = AutoConfig.from_pretrained(base, **hub_options).get_text_config()
        return cls(config.vocab_size, base_fingerprint(base, **hub_options))

    def fits(self, config: LMTPConfig) -> bool:
        """Return whether heads were trained with this vocabulary, by the rules of `check_base`."""
        same_tokens = None in (self.fingerprint, config.tokenizer_fingerprint) or (
            self.fingerprint == config.tokenizer_fingerprint
        )
        return config.vocab_size in (None, self.size) and same_tokens


def grow_heads(heads: LeapHeads, base: PreTrainedModel) -> None:
    """Extend heads in place by the tokens that `base` has and they lack.

    New rows of a head's own unembedding are copies of the LM head's rows, as all rows are when heads are created. Heads
    with a draft vocabulary keep it: they draft no new tokens. This is a collective operation under ZeRO-3.
    """
    lm_head, size = base.get_output_embeddings(), base.config.get_text_config().vocab_size
    known = heads.config.vocab_size
    if size == known:
        return
    if heads.t2d is not None:
        heads.t2d = torch.cat([heads.t2d, heads.t2d.new_zeros(size - known)])
        heads.config.vocab_size = size
        return
    with gathered([lm_head.weight]), torch.no_grad():
        for head in heads.heads:
            if head.unembed is not None:
                rows = head.unembed.weight  # (known tokens, hidden)
                new = lm_head.weight[known:].to(rows.device, rows.dtype)
                head.unembed.weight = nn.Parameter(torch.cat([rows, new]))
                head.unembed.out_features = size
    heads.config.vocab_size = size


def new_tokens(folder: str | Path, config: LMTPConfig, base: str, **hub_options: Any) -> list[str]:
    """Return the tokens that were added to the base model's tokenizer before the heads were trained.

    Args:
        folder: Directory with `lmtp/` and the tokenizer of the training run.
        config: Configuration of the heads.
        base: Model directory or hub id of the base model.
        hub_options: Passed to `from_pretrained` for `base`.

    Returns:
        The tokens in the order of their ids. The list is empty if the heads were trained with another tokenizer, or if
        the tokenizer is not the base model's with added tokens: the heads then do not belong to the base model.
    """
    try:
        grown, own = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base, **hub_options)
    except (OSError, ValueError):
        return []
    words, known = grown.get_vocab(), own.get_vocab()
    if config.tokenizer_fingerprint != tokenizer_fingerprint(grown) or not known.items() <= words.items():
        return []
    return sorted(words.keys() - known.keys(), key=words.__getitem__)
