"""Draft vocabulary: the tokens that heads can draft (EAGLE-3, arXiv 2503.01840; FR-Spec, arXiv 2502.14856).

The tables have EAGLE-3's names. `d2t[i]` is the token of draft index `i` minus `i`; `t2d[token]` says whether the token can
be drafted. Draft indices are in the order of token ids.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LMTPError
from .losses.implementation import as_plain_linear
from .losses.targets import IGNORE_INDEX


def most_frequent(labels: Iterable[Sequence[int]], size: int, vocab_size: int) -> list[int]:
    """Return the `size` most frequent tokens of a training text, by increasing id. Tokens that do not occur come last.

    Args:
        labels: Token ids of each example, -100 where masked.
        size: Number of tokens.
        vocab_size: Number of tokens of the model.
    """
    counts: Counter[int] = Counter()
    for row in labels:
        counts.update(row)
    by_frequency = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    return sorted(by_frequency[:size])


def tables(tokens: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return `d2t`, (draft vocabulary,) int64, and `t2d`, (vocabulary,) bool, of increasing token ids."""
    t2d = torch.zeros(vocab_size, dtype=torch.bool, device=tokens.device)
    t2d[tokens] = True
    return tokens - torch.arange(len(tokens), device=tokens.device), t2d


def tokens_of(d2t: Tensor) -> Tensor:
    """Return the (draft vocabulary,) token ids."""
    return d2t + torch.arange(len(d2t), device=d2t.device)


def to_draft(labels: Tensor, t2d: Tensor) -> Tensor:
    """Map token ids to draft indices. Tokens outside the draft vocabulary and masked labels become -100."""
    index = torch.where(t2d, t2d.cumsum(0) - 1, IGNORE_INDEX)  # (vocabulary,)
    return torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, index[labels.clamp(min=0)])


def check_tables(d2t: Tensor, t2d: Tensor, where: str) -> None:
    """Check that the tables agree.

    Raises:
        LMTPError: They do not.
    """
    if not torch.equal(tokens_of(d2t), t2d.nonzero()[:, 0]):
        raise LMTPError(f"The tables d2t and t2d in {where} contradict each other: copy or train the leap heads again.")


class LMHeadRows(nn.Module):
    """Some rows of an LM head that is trained, quantised, wrapped or offloaded. Maps (..., hidden) to (..., rows)."""

    def __init__(self, lm_head: nn.Module, tokens: Tensor):
        super().__init__()
        self.lm_head, self.tokens = lm_head, tokens

    @property
    def weight(self) -> Tensor:
        """The weight of the whole LM head."""
        return self.lm_head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute the logits."""
        linear = as_plain_linear(self.lm_head)
        if linear is None or linear.weight.is_meta:  # an offloaded layer has weights only while it is called
            logits = self.lm_head(hidden)
            return logits.index_select(-1, self.tokens.to(logits.device))
        bias = None if linear.bias is None else linear.bias.index_select(0, self.tokens)
        return F.linear(hidden, linear.weight.index_select(0, self.tokens), bias)


def rows_of(lm_head: nn.Module, tokens: Tensor) -> nn.Module:
    """Return a layer that computes the logits of `tokens` only: a copy of these rows, if they need no gradient."""
    linear = as_plain_linear(lm_head)
    trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in lm_head.parameters())
    if linear is None or linear.weight.is_meta or trains:
        return LMHeadRows(lm_head, tokens)
    rows = nn.Linear(linear.in_features, len(tokens), bias=linear.bias is not None, device="meta")
    for name, parameter in linear.named_parameters():
        chosen = parameter.detach().index_select(0, tokens.to(parameter.device))
        setattr(rows, name, nn.Parameter(chosen, requires_grad=False))
    return rows
