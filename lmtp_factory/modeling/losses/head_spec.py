"""One head as a loss sees it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class HeadSpec:
    """What a loss needs to know of one head; the LM head is one whose features are the hidden states themselves.

    Attributes:
        features: (rows, hidden) final hidden states -> (rows, hidden) what the unembedding reads.
        unembedding: (rows, hidden) -> (rows, vocabulary) raw logits; heads may share one.
        vocab_size: of the unembedding.
        parameters: what ``features`` computes with.
    """

    features: Callable[[Tensor], Tensor]
    unembedding: nn.Module
    vocab_size: int
    parameters: tuple[nn.Parameter, ...] = ()
