"""Accepting: the model's own next token at each node decides how far down the tree a step gets (lossless).

Greedy takes the argmax, sampling draws from the processed distribution; if a child carries that token the walk goes on
there, else the token is the step's last. Either way tokens come from the model's own distribution, in order, each seen
by the logits processors and stopping criteria exactly once, as in stock ``generate``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria


@dataclass
class Row:
    """One sequence of the batch.

    Attributes:
        length: tokens so far, padding and prompt counted.
        columns: of the key-value cache that it owns.
        done: whether a stopping criterion ended it.
        scores, logits: (1, vocabulary) of every generated token, where asked for.
    """

    length: int
    columns: int
    done: bool = False
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


class Acceptor:
    """Chooses tokens, writes them to the sequences and says when a row ends.

    Attributes:
        rows: state of each sequence.
        sequences: (batch, capacity) int64 token ids; row b is real below ``rows[b].length``.
    """

    def __init__(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ):
        batch, length = input_ids.shape
        self.processors, self.do_sample = processors, config.do_sample
        self.keep_scores = config.return_dict_in_generate and config.output_scores
        self.keep_logits = config.return_dict_in_generate and config.output_logits
        self.rows = [Row(length, length) for _ in range(batch)]
        self.sequences = torch.cat([input_ids, input_ids.new_zeros(batch, 64)], dim=1)
        # The two criteria that every call has need nothing but the token and the length.
        self.max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=None)
        eos = [c.eos_token_id for c in criteria if type(c) is EosTokenCriteria]
        self.eos = {token for ids in eos for token in ids.flatten().tolist()}
        others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        self.other_criteria = StoppingCriteriaList(others)

    @property
    def only_argmax(self) -> bool:
        """Whether a token is the logits' argmax and nothing else is wanted of them."""
        return not (self.do_sample or self.processors or self.keep_scores or self.keep_logits)

    def walk(self, logits: Tensor, tokens: Tensor, parents: Tensor) -> list[list[int]]:
        """Extend every unfinished row by what the model says along the tree.

        Args:
            logits: (batch, nodes, vocabulary).
            tokens, parents: (batch, nodes) of the tree.

        Returns:
            For each row the numbers of the nodes whose tokens now have a place in the sequence, the root first; as many
            as tokens were added, because the last one added is not in the tree or ended the row. Empty for rows that
            were finished before.
        """
        if self.only_argmax:
            facts = torch.stack([tokens, parents.expand_as(tokens), logits.argmax(-1)]).tolist()
        else:
            facts = [*torch.stack([tokens, parents.expand_as(tokens)]).tolist(), [None] * len(self.rows)]
        return [self._walk_row(b, logits, *fact) for b, fact in enumerate(zip(*facts))]

    def _walk_row(
        self, b: int, logits: Tensor, tokens: Sequence[int], parents: Sequence[int], best: Sequence[int] | None
    ) -> list[int]:
        if self.rows[b].done:
            return []
        children = {(parents[node], tokens[node]): node for node in range(len(tokens) - 1, 0, -1)}
        node, branch = 0, [0]
        while True:
            token = best[node] if best is not None else self._choose(b, logits[b : b + 1, node])
            self._append(b, token)
            child = children.get((node, token))
            if self.rows[b].done or child is None:
                return branch
            branch.append(child)
            node = child

    def _choose(self, b: int, logits: Tensor) -> int:
        row = self.rows[b]
        logits = logits.to(copy=True, dtype=torch.float32, device=self.sequences.device)
        scores = self.processors(self.sequences[b : b + 1, : row.length], logits)
        if self.keep_scores:
            row.scores.append(scores)
        if self.keep_logits:
            row.logits.append(logits)
        if self.do_sample:
            return int(torch.multinomial(scores.softmax(-1), num_samples=1))
        return int(scores.argmax(-1))

    def _append(self, b: int, token: int) -> None:
        row = self.rows[b]
        if row.length == self.sequences.shape[1]:
            more = self.sequences.new_zeros(len(self.rows), row.length)
            self.sequences = torch.cat([self.sequences, more], dim=1)
        self.sequences[b, row.length] = token
        row.length += 1
        row.done = token in self.eos or (self.max_length is not None and row.length >= self.max_length)
        if self.other_criteria:
            scores = tuple(row.scores) if self.keep_scores else None
            row.done |= bool(self.other_criteria(self.sequences[b : b + 1, : row.length], scores).any())

    def wanted(self) -> int:
        """The most tokens that a row may still get."""
        if self.max_length is None:
            return 1 << 20
        return self.max_length - min((row.length for row in self.rows if not row.done), default=self.max_length)

    def finished(self) -> bool:
        """Whether every row has ended."""
        return all(row.done for row in self.rows)

    def padded(self, pad_token: int | None) -> Tensor:
        """(batch, length of the longest row) sequences, padded on the right."""
        longest = max(row.length for row in self.rows)
        sequences = self.sequences[:, :longest].clone()
        for b, row in enumerate(self.rows):
            if row.length < longest:
                sequences[b, row.length :] = pad_token
        return sequences

    def stacked(self, name: str) -> tuple[Tensor, ...]:
        """``scores`` or ``logits`` as stock returns them: (batch, vocabulary) a token; all rows have as many."""
        return tuple(map(torch.cat, zip(*(getattr(row, name) for row in self.rows), strict=True)))
