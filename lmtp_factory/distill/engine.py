"""The interface of an engine: requests and sampling in, generations out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        id: its number in the journal; also seeds its sampling.
        prompt_ids: all that the model reads.
        text: the user's text, for the row; engines do not read it.
    """

    id: int
    prompt_ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Generation:
    """What the model wrote after a request's prompt; the stop token is included if it stopped by itself."""

    id: int
    output_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: from the model's own distribution, without penalties and top-k. Temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def seed_of(self, request_id: int) -> int:
        """A 31-bit seed for one request, so that its answer does not depend on what ran before it."""
        digest = hashlib.sha256(f"{self.seed}:{request_id}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


class Engine(Protocol):
    """Continues token ids."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        done: Collection[int],
        on_finished: Callable[[list[Generation]], None],
    ) -> None:
        """Continue every request whose id is not in `done`.

        Args:
            requests: all requests, those in `done` included: batches and sampled tokens depend on the whole list
                only, so a resumed run writes what an uninterrupted one writes.
            sampling: how to choose tokens.
            done: ids of requests to leave out.
            on_finished: takes results as they are finished, in any order.
        """


def cut_at_stop(
    output_ids: Sequence[int], stop_ids: Collection[int]
) -> tuple[tuple[int, ...], Literal["stop", "length"]]:
    """The ids up to and including the first stop token, and the finish reason."""
    for position, token in enumerate(output_ids):
        if token in stop_ids:
            return tuple(output_ids[: position + 1]), "stop"
    return tuple(output_ids), "length"
