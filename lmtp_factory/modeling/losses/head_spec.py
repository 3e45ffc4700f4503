"""The interface between a head and the loss."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class HeadSpec:
    """What the loss needs to know about one head. The LM head is a head whose `features` is the identity.

    Attributes:
        features: Maps (rows, hidden) final hidden states to the unembedding's (rows, hidden) inputs.
        unembedding: Maps (rows, hidden) to (rows, vocabulary) raw logits. Heads may share it.
        vocab_size: Output size of the unembedding.
        parameters: Parameters that `features` uses.
    """

    features: Callable[[Tensor], Tensor]
    unembedding: nn.Module
    vocab_size: int
    parameters: tuple[nn.Parameter, ...] = ()
