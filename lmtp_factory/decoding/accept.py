"""Acceptance: a walk down the tree along the tokens that the model itself chooses (lossless).

At each node the next token is chosen from the model's logits, by argmax or by sampling from the processed distribution.
If a child of the node has this token, the walk continues there; else the token is the last of the step. So every token
comes from the model's distribution. Logits processors and stopping criteria are called once per token, as in `generate`.
In a batch they are called with one row at a time, because rows have different lengths (support.py leaves those that want
the whole batch to stock). Criteria for the length and the end-of-sequence token are not called but applied on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria

from .branches import Branches, follow
from .row_safety import is_known
from .tree import Tree


@dataclass
class Row:
    """One sequence of the batch.

    Attributes:
        length: Number of tokens, including padding and prompt.
        columns: Number of key-value cache columns that the row owns.
        last: The newest token, root of the next step; -1 before the first token.
        done: Whether a stopping criterion has ended the row.
        scores: (1, vocabulary) processed logits of each generated token, if the caller requests them.
        logits: (1, vocabulary) raw logits of each generated token, if the caller requests them.
    """

    length: int
    columns: int
    last: int = -1
    done: bool = False
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


class Acceptor:
    """Chooses tokens, appends them to the sequences and applies stopping criteria.

    All rows walk down their trees in parallel. If tokens are the argmax of the logits, the device walks, and the host reads
    the result once. If tokens are sampled, logits are processed or criteria are the user's, the host walks, and waits for
    the device once per token of the longest branch.

    Args:
        input_ids: (batch, prompt length) token ids on the model's device.
        processors: Logits processors.
        criteria: Stopping criteria.
        config: Generation config.

    Attributes:
        rows: State of each sequence.
        sequences: (batch, capacity) int64 token ids on the host. Row b is valid below `rows[b].length`.
        on_device: A copy of `sequences` on the model's device for processors and custom criteria; None if there are
            none.
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
        # The length and end-of-sequence criteria need only the token and the length, so they are applied on the host.
        self.max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=None)
        eos = [c.eos_token_id for c in criteria if type(c) is EosTokenCriteria]
        self.eos = {token for ids in eos for token in ids.flatten().tolist()}
        others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        # Criteria of transformers run on the device of their inputs, so host tensors avoid a synchronisation. Custom
        # criteria may hold tensors on the model's device.
        self.host_criteria = StoppingCriteriaList(c for c in others if is_known(c))
        self.custom_criteria = StoppingCriteriaList(c for c in others if not is_known(c))
        self.sequences = torch.cat([input_ids.cpu(), torch.zeros(batch, 64, dtype=torch.long)], dim=1)
        self.on_device = None
        if processors or self.custom_criteria:
            self.on_device = self.sequences.to(self.device)  # on a CPU it is the same tensor

    @property
    def only_argmax(self) -> bool:
        """Whether tokens are the argmax of unprocessed logits, and scores and logits are not returned."""
        return not (self.do_sample or self.processors or self.keep_scores or self.keep_logits)

    @property
    def follows_argmax(self) -> bool:
        """Whether the device can walk down a tree alone, see `branches.follow`."""
        return self.only_argmax and not self.custom_criteria

    def accept(
        self, logits: Tensor, tokens: Tensor, tree: Tree, goes_on: Tensor | None = None
    ) -> tuple[Branches, list[list[int]]]:
        """Append the accepted tokens, and one more chosen token, to every row that has not ended.

        As many tokens are appended as a branch has nodes: the root's token was in the sequence before, and the last appended
        token is not yet in the cache.

        Args:
            logits: (batch, nodes, vocabulary) logits of the tree's nodes.
            tokens: (batch, nodes) token ids of the nodes.
            tree: The tree.
            goes_on: (batch, 1) bool, False for rows that have ended; None if there are none.

        Returns:
            The accepted branches on the device and, as indices, on the host: empty for rows that had ended before, and only
            as long as the tokens that were appended.
        """
        if self.follows_argmax:
            branches, read = follow(logits.argmax(-1), tokens, tree, goes_on)
            return branches, self.append_followed(read)
        walked = self._walk(logits, tokens, tree.parents)
        return Branches.sent(walked, [row.last for row in self.rows], logits.device), walked

    def append_followed(self, read: Tensor) -> list[list[int]]:
        """Append what the device has accepted.

        Args:
            read: (batch, 1 + 2 (height + 1)) second result of `branches.follow`.

        Returns:
            The accepted branches, as in `accept`.
        """
        branches, width = [], read.shape[1] // 2
        # Each read from the device waits for it, so there is one.
        for b, (count, *numbers) in enumerate(read.tolist()):
            branch, tokens = numbers[:count], numbers[width : width + count]
            for place, token in enumerate(tokens):
                self._make_room()
                self._append(b, token, ends=False)
                if self.rows[b].done:
                    branch = branch[: place + 1]
                    break
            branches.append(branch)
        return branches

    def _walk(self, logits: Tensor, tokens: Tensor, parents: Tensor) -> list[list[int]]:
        """Walk on the host, see `accept`.

        Args:
            logits: (batch, nodes, vocabulary) logits of the tree's nodes.
            tokens: (batch, nodes) token ids of the nodes.
            parents: (batch, nodes) indices of the nodes' parents.

        Returns:
            Indices of each row's accepted nodes, root first. Empty for rows that had ended before.
        """
        branches = [[] if row.done else [0] for row in self.rows]
        tree_tensors, best = (tokens, parents.expand_as(tokens)), None  # (batch, nodes) each
        if self.only_argmax:
            best = logits.argmax(-1)  # (batch, nodes)
        children: list[dict[tuple[int, int], int]] | None = None
        walking = [(b, 0) for b, row in enumerate(self.rows) if not row.done]  # (row, node that it has reached)
        while walking:
            self._make_room()
            ends = [False] * len(walking)
            results = [self._choose(logits, best, walking)]
            if self.custom_criteria:
                results.append(self._apply_custom_criteria(walking))
            # Each read from the device waits for it, so the tree is read together with the first tokens.
            chosen, *results = _lists(*results, *(tree_tensors if children is None else ()))
            if self.custom_criteria:
                ends, *results = results
            if children is None:
                children = [_children(*row) for row in zip(*results)]
            still_walking = []
            for (b, node), token, end in zip(walking, chosen, ends):
                self._append(b, token, bool(end))
                # The walk continues if the tree has drafted the chosen token as a child of this node.
                child = children[b].get((node, token))
                if child is not None and not self.rows[b].done:
                    branches[b].append(child)
                    still_walking.append((b, child))
            walking = still_walking
        return branches

    def _choose(self, logits: Tensor, best: Tensor | None, walking: Sequence[tuple[int, int]]) -> Tensor:
        """Choose the next token of each walking row and write it to `on_device`, where custom criteria read it.

        Args:
            logits: (batch, nodes, vocabulary) logits of the nodes.
            best: (batch, nodes) argmax of the logits if `only_argmax`, else None.
            walking: Pairs of a row and the node that it has reached.

        Returns:
            (walking rows,) token ids.
        """
        if best is not None:
            chosen = torch.stack([best[b, node] for b, node in walking])
        else:
            rows = _joined([logits[b : b + 1, node] for b, node in walking])  # (walking rows, vocabulary)
            # A copy in fp32, as `generate` makes one.
            rows = rows.to(copy=True, dtype=torch.float32, device=self.device)
            # Each row is processed alone, because rows have different lengths.
            scores = _joined([self._processed(b, rows[i : i + 1]) for i, (b, _) in enumerate(walking)])
            drawn = torch.multinomial(scores.softmax(-1), num_samples=1) if self.do_sample else scores.argmax(-1)
            chosen = drawn.flatten()
        if self.on_device is not None:
            for i, (b, _) in enumerate(walking):
                self.on_device[b, self.rows[b].length] = chosen[i]
        return chosen

    def _processed(self, b: int, logits: Tensor) -> Tensor:
        """Apply the logits processors to the (1, vocabulary) logits of row b, and store what the caller requests."""
        row, scores = self.rows[b], logits
        if self.processors:
            scores = self.processors(self.on_device[b : b + 1, : row.length], logits)
        if self.keep_scores:
            row.scores.append(scores)
        if self.keep_logits:
            row.logits.append(logits)
        return scores

    def _apply_custom_criteria(self, walking: Sequence[tuple[int, int]]) -> Tensor:
        """Return a (walking rows,) tensor: 1 if a custom criterion ends the row after the token just chosen, else 0."""
        ids = {b: self.on_device[b : b + 1, : self.rows[b].length + 1] for b, _ in walking}
        return torch.stack([self.custom_criteria(ids[b], self._scores(b)).any().long() for b in ids])

    def _scores(self, b: int) -> tuple[Tensor, ...] | None:
        return tuple(self.rows[b].scores) if self.keep_scores else None

    def _append(self, b: int, token: int, ends: bool) -> None:
        """Append a token to row b and apply the host's criteria; `ends` is the result of the custom criteria."""
        row = self.rows[b]
        self.sequences[b, row.length] = row.last = token
        row.length += 1
        row.done = ends or token in self.eos or (self.max_length is not None and row.length >= self.max_length)
        if self.host_criteria:
            row.done |= bool(self.host_criteria(self.sequences[b : b + 1, : row.length], self._scores(b)).any())

    def _make_room(self) -> None:
        """Double the capacity of the sequences if a row is full."""
        batch, capacity = self.sequences.shape
        if max(row.length for row in self.rows) < capacity:
            return
        same = self.on_device is self.sequences  # one tensor on a CPU
        self.sequences = torch.cat([self.sequences, self.sequences.new_zeros(batch, capacity)], dim=1)
        if same:
            self.on_device = self.sequences
        elif self.on_device is not None:
            self.on_device = torch.cat([self.on_device, self.on_device.new_zeros(batch, capacity)], dim=1)

    def remaining_tokens(self) -> int:
        """Return the largest number of tokens that a row can still generate."""
        if self.max_length is None:
            return 1 << 20  # no maximum length
        return self.max_length - min((row.length for row in self.rows if not row.done), default=self.max_length)

    def finished(self) -> bool:
        """Return whether every row has ended."""
        return all(row.done for row in self.rows)

    def padded(self, pad_token: int | None) -> Tensor:
        """Return the (batch, longest row) sequences, padded on the right, on the device of the prompt."""
        longest = max(row.length for row in self.rows)
        sequences = self.sequences[:, :longest].clone()
        for b, row in enumerate(self.rows):
            if row.length < longest:
                sequences[b, row.length :] = pad_token
        return sequences.to(self.device)

    def stacked(self, name: str) -> tuple[Tensor, ...]:
        """Return `scores` or `logits` as `generate` does: one (batch, vocabulary) tensor per token.

        All rows must have equally many tokens.
        """
        return tuple(map(torch.cat, zip(*(getattr(row, name) for row in self.rows), strict=True)))


def _children(tokens: Sequence[int], parents: Sequence[int]) -> dict[tuple[int, int], int]:
    """Map (node, token) to the child of the node with this token. Of siblings with equal tokens the first counts."""
    return {(parents[node], tokens[node]): node for node in range(len(tokens) - 1, 0, -1)}


def _joined(rows: list[Tensor]) -> Tensor:
    """Concatenate (1, n) rows to (rows, n). A single row is returned without a copy."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _lists(*tensors: Tensor) -> list[list]:
    """Convert 1-D and 2-D tensors to lists with a single transfer from the device."""
    numbers = iter(torch.cat([tensor.flatten().to(tensors[0].device) for tensor in tensors]).tolist())
    return [
        list(islice(numbers, len(tensor)))
        if tensor.dim() == 1
        else [list(islice(numbers, tensor.shape[1])) for _ in range(len(tensor))]
        for tensor in tensors
    ]
