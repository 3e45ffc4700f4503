"""Accepting: the model's own next token at each node decides how far down the tree a step gets (lossless).

Greedy takes the argmax, sampling draws from the processed distribution; if a child carries that token the walk goes on
there, else the token is the step's last. Either way tokens come from the model's own distribution, in order, each seen
by the logits processors and stopping criteria exactly once, as in stock `generate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria

from .row_safety import is_known


@dataclass
class Row:
    """One sequence of the batch.

    Attributes:
        length: tokens so far, padding and prompt counted.
        columns: of the key-value cache that it owns.
        last: its newest token, the root of the next step; -1 before the first.
        done: whether a stopping criterion ended it.
        scores, logits: (1, vocabulary) of every generated token, where asked for.
    """

    length: int
    columns: int
    last: int = -1
    done: bool = False
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


class Acceptor:
    """Chooses tokens, writes them to the sequences and says when a row ends.

    The rows walk down their trees side by side. A GPU is waited for once a walk where tokens are the logits' argmax, and
    once for each token of the longest branch where they are drawn or processed.

    Attributes:
        rows: state of each sequence.
        sequences: (batch, capacity) int64 token ids on the host; row b is real below `rows[b].length`.
        on_device: the same on the model's device, where logits processors or custom criteria read them; else None.
    """

    def __init__(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ):
        batch, length = input_ids.shape
        self.device = input_ids.device
        self.processors, self.do_sample = processors, config.do_sample
        self.keep_scores = config.return_dict_in_generate and config.output_scores
        self.keep_logits = config.return_dict_in_generate and config.output_logits
        self.rows = [Row(length, length) for _ in range(batch)]
        # The two criteria that every call has need nothing but the token and the length.
        self.max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=None)
        eos = [c.eos_token_id for c in criteria if type(c) is EosTokenCriteria]
        self.eos = {token for ids in eos for token in ids.flatten().tolist()}
        others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        # Known ones answer on the device of what they are shown: on the host nobody waits for the answer. Custom ones may
        # hold tensors on the model's device.
        self.host_criteria = StoppingCriteriaList(c for c in others if is_known(c))
        self.custom_criteria = StoppingCriteriaList(c for c in others if not is_known(c))
        self.sequences = torch.cat([input_ids.cpu(), torch.zeros(batch, 64, dtype=torch.long)], dim=1)
        self.on_device = None
        if processors or self.custom_criteria:
            self.on_device = self.sequences.to(self.device)  # on a CPU it is the same tensor

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
        branches = [[] if row.done else [0] for row in self.rows]
        facts = [tokens, parents.expand_as(tokens)]
        if self.only_argmax:
            facts.append(logits.argmax(-1))
        # What is read from the device is read together: the tree with the first tokens.
        read = torch.stack(facts).tolist() if self.only_argmax and not self.custom_criteria else None
        at_once, children = read is not None, None
        walking = [(b, 0) for b, row in enumerate(self.rows) if not row.done]  # rows, and the nodes where they are
        while walking:
            self._make_room()
            ends = [False] * len(walking)
            if at_once:
                chosen = [read[2][b][node] for b, node in walking]
            else:
                answers = [self._choose(logits, facts[2] if self.only_argmax else None, walking)]
                if self.custom_criteria:
                    answers.append(self._ask_custom(walking))
                chosen, *answers = _lists(*answers, *(facts if read is None else ()))
                if self.custom_criteria:
                    ends, *answers = answers
                read = read or answers
            if children is None:
                children = [_children(*row) for row in zip(*read[:2])]
            still = []
            for (b, node), token, end in zip(walking, chosen, ends):
                self._append(b, token, bool(end))
                child = children[b].get((node, token))
                if child is not None and not self.rows[b].done:
                    branches[b].append(child)
                    still.append((b, child))
            walking = still
        return branches

    def _choose(self, logits: Tensor, best: Tensor | None, walking: Sequence[tuple[int, int]]) -> Tensor:
        """(rows,) the next token of each row that walks, written behind it for those who read it there.

        Args:
            best: (batch, nodes) the logits' argmax, where that is all.
        """
        if best is not None:
            chosen = torch.stack([best[b, node] for b, node in walking])
        else:
            rows = _joined([logits[b : b + 1, node] for b, node in walking])
            rows = rows.to(copy=True, dtype=torch.float32, device=self.device)
            scores = _joined([self._processed(b, rows[i : i + 1]) for i, (b, _) in enumerate(walking)])
            drawn = torch.multinomial(scores.softmax(-1), num_samples=1) if self.do_sample else scores.argmax(-1)
            chosen = drawn.flatten()
        if self.on_device is not None:
            for i, (b, _) in enumerate(walking):
                self.on_device[b, self.rows[b].length] = chosen[i]
        return chosen

    def _processed(self, b: int, logits: Tensor) -> Tensor:
        row, scores = self.rows[b], logits
        if self.processors:
            scores = self.processors(self.on_device[b : b + 1, : row.length], logits)
        if self.keep_scores:
            row.scores.append(scores)
        if self.keep_logits:
            row.logits.append(logits)
        return scores

    def _ask_custom(self, walking: Sequence[tuple[int, int]]) -> Tensor:
        """(rows,) 1 where a custom criterion ends a row behind the token that has just been chosen, else 0."""
        ids = {b: self.on_device[b : b + 1, : self.rows[b].length + 1] for b, _ in walking}
        return torch.stack([self.custom_criteria(ids[b], self._scores(b)).any().long() for b in ids])

    def _scores(self, b: int) -> tuple[Tensor, ...] | None:
        return tuple(self.rows[b].scores) if self.keep_scores else None

    def _append(self, b: int, token: int, ends: bool) -> None:
        row = self.rows[b]
        self.sequences[b, row.length] = row.last = token
        row.length += 1
        row.done = ends or token in self.eos or (self.max_length is not None and row.length >= self.max_length)
        if self.host_criteria:
            row.done |= bool(self.host_criteria(self.sequences[b : b + 1, : row.length], self._scores(b)).any())

    def _make_room(self) -> None:
        """A place for one more token in every row."""
        batch, capacity = self.sequences.shape
        if max(row.length for row in self.rows) < capacity:
            return
        same = self.on_device is self.sequences
        self.sequences = torch.cat([self.sequences, self.sequences.new_zeros(batch, capacity)], dim=1)
        if same:
            self.on_device = self.sequences
        elif self.on_device is not None:
            self.on_device = torch.cat([self.on_device, self.on_device.new_zeros(batch, capacity)], dim=1)

    def remaining_tokens(self) -> int:
        """The most tokens that a row may still get."""
        if self.max_length is None:
            return 1 << 20
        return self.max_length - min((row.length for row in self.rows if not row.done), default=self.max_length)

    def finished(self) -> bool:
        """Whether every row has ended."""
        return all(row.done for row in self.rows)

    def padded(self, pad_token: int | None) -> Tensor:
        """(batch, length of the longest row) sequences, padded on the right, where the prompt is."""
        longest = max(row.length for row in self.rows)
        sequences = self.sequences[:, :longest].clone()
        for b, row in enumerate(self.rows):
            if row.length < longest:
                sequences[b, row.length :] = pad_token
        return sequences.to(self.device)

    def stacked(self, name: str) -> tuple[Tensor, ...]:
        """`scores` or `logits` as stock returns them: (batch, vocabulary) a token; all rows have as many."""
        return tuple(map(torch.cat, zip(*(getattr(row, name) for row in self.rows), strict=True)))


def _children(tokens: Sequence[int], parents: Sequence[int]) -> dict[tuple[int, int], int]:
    """(node, token) -> the child of the node that carries the token, the first where siblings are equal."""
    return {(parents[node], tokens[node]): node for node in range(len(tokens) - 1, 0, -1)}


def _joined(rows: list[Tensor]) -> Tensor:
    """One tensor of the (1, n) rows; a single one is not copied."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _lists(*tensors: Tensor) -> list[list]:
    """The numbers in tensors of one or two dimensions, read from the device at once."""
    numbers = iter(torch.cat([tensor.flatten().to(tensors[0].device) for tensor in tensors]).tolist())
    return [
        list(islice(numbers, len(tensor)))
        if tensor.dim() == 1
        else [list(islice(numbers, tensor.shape[1])) for _ in range(len(tensor))]
        for tensor in tensors
    ]
