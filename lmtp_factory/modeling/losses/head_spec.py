"""The interface between a head and the loss."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class HeadSpec:
    """What the loss needs to know about one head. The LM head is a head whose `features` is the identity.

    Attributes:
        features: Maps (rows, hidden) hidden states and the (rows,) numbers of these rows in the batch to the
            unembedding's (rows, hidden) inputs.
        unembedding: Maps (rows, hidden) to (rows, vocabulary) raw logits. Heads may share it.
        vocab_size: Size of the largest logits that the unembedding computes for a row.
        parameters: Parameters that `features` uses.
        first_row: Row of the loss's hidden states at which the head's rows begin. Heads that read other states than the
            rest have rows of their own.
    """

    features: Callable[[Tensor, Tensor], Tensor]
    unembedding: nn.Module
    vocab_size: int
    parameters: tuple[nn.Parameter, ...] = ()
    first_row: int = 0
