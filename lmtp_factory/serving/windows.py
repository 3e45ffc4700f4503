"""The last hidden states of every running request of an engine that batches continuously.

A step of such an engine computes some rows of each scheduled request: a piece of a prompt, or the newest token and drafts of
the tokens after it. Look-back drafts read the states of the last positions whose tokens are known, so each step's states are
kept by request. Pieces of a prompt, preempted requests and prefixes whose keys and values were cached already all follow
one rule: states are the last ones of a request only if their positions follow each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoding.draft import Window


@dataclass(frozen=True)
class Rows:
    """Rows of one request in a step whose tokens are part of its text. Rejected drafts are not among them.

    Attributes:
        request: Id of the request.
        start: Position of the first row in the request's text.
        first: Index of the first row in the step's hidden states.
        count: Number of rows.
    """

    request: str
    start: int
    first: int
    count: int


@dataclass
class _Entry:
    """What is kept of a request.

    Attributes:
        owner: The engine's object of the request. Another object under the same id is another request.
        slot: Index of its window.
        filled: Number of valid states.
        end: Position after the newest state.
    """

    owner: object
    slot: int
    filled: int = 0
    end: int = -1


class RequestWindows:
    """A window of states for each request.

    Args:
        size: Number of states in a window, see `geometry.window`.
        hidden_size: Width of a state.
        capacity: Number of windows to begin with.
        dtype: Dtype of the states.
        device: Device of the states.
    """

    def __init__(self, size: int, hidden_size: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.size = size
        self._states = torch.zeros(capacity, size, hidden_size, dtype=dtype, device=device)
        self._free = list(range(capacity))
        self._entries: dict[str, _Entry] = {}

    def keep(self, running: Mapping[str, object]) -> None:
        """Forget every request that is not in `running`, the engine's requests by id, or is another one by now."""
        for request, entry in list(self._entries.items()):
            if running.get(request) is not entry.owner:
                self._free.append(self._entries.pop(request).slot)

    def push(self, rows: Sequence[Rows], hidden: Tensor, running: Mapping[str, object]) -> list[int]:
        """Append the states of a step.

        Args:
            rows: Rows of each request in the step. A request without rows is unchanged.
            hidden: (rows, hidden) states of the step.
            running: The engine's requests by id, all of `rows` among them.

        Returns:
            Number of valid states of each request of `rows`.
        """
        self.keep(running)
        entries = [self._entry(row.request, running) for row in rows]
        # (2, requests, size): indices of old states, and of new ones or -1.
        places = torch.zeros(2, len(rows), self.size, dtype=torch.long)
        for number, (row, entry) in enumerate(zip(rows, entries)):
            if row.count and entry.end != row.start:  # what lies between has no states here
                entry.filled = 0
            for place in range(self.size):
                back = self.size - 1 - place
                is_new = back < row.count
                places[0, number, place] = entry.slot * self.size + (0 if is_new else place + row.count)
                places[1, number, place] = row.first + row.count - 1 - back if is_new else -1
            if row.count:
                entry.filled, entry.end = min(self.size, entry.filled + row.count), row.start + row.count
        old, new = places.to(hidden.device)
        slots = old[:, 0] // self.size
        states = torch.where(
            (new >= 0)[:, :, None], hidden[new.clamp(min=0)].to(self._states.dtype), self._states.flatten(0, 1)[old]
        )  # (requests, size, hidden)
        self._states[slots] = states
        return [entry.filled for entry in entries]

    def window(self, requests: Sequence[str], roots: Sequence[int]) -> Window:
        """Return what drafts of some requests read.

        Args:
            requests: Ids of requests whose rows were pushed.
            roots: Newest token of each, the one after its last state.
        """
        entries, device = [self._entries[request] for request in requests], self._states.device
        slots = torch.tensor([entry.slot for entry in entries], device=device)
        filled = torch.tensor([entry.filled for entry in entries], device=device)
        is_real = torch.arange(self.size, device=device) >= (self.size - filled)[:, None]  # (requests, size)
        return Window.of_states(self._states[slots], is_real, torch.tensor(roots, device=device))

    def _entry(self, request: str, running: Mapping[str, object]) -> _Entry:
        entry = self._entries.get(request)
        if entry is None:
            if not self._free:
                count = len(self._states)
                self._states = torch.cat([self._states, torch.zeros_like(self._states)])
                self._free = list(range(count, 2 * count))
            entry = self._entries[request] = _Entry(running[request], self._free.pop())
        return entry
