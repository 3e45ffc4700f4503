"""Interface of the generation engines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        id: Id of the row in the journal. It also seeds the sampling.
        prompt_ids: Token ids of the whole prompt.
        text: The user's text, stored in the row. Engines ignore it.
    """

    id: int
    prompt_ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Generation:
    """The tokens that the model generated for a request, including the stop token if there is one."""

    id: int
    output_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Penalties and top-k are off; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def seed_of(self, request_id: int) -> int:
        """Return a 31-bit seed for one request, so that its answer does not depend on earlier requests."""
        digest = hashlib.sha256(f"{self.seed}:{request_id}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


class Engine(Protocol):
    """Generates continuations of token ids."""

    def facts(self) -> dict[str, Any]:
        """Return settings that determine the rows and are known only once the engine runs, for the journal."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        done: Collection[int],
        on_finished: Callable[[list[Generation]], None],
    ) -> None:
        """Generate for every request whose id is not in `done`.

        Args:
            requests: All requests, including those in `done`. Batches and sampled tokens depend on the whole list, so a
                resumed run gives the same results as an uninterrupted one.
            sampling: Sampling parameters.
            done: Ids of requests to skip.
            on_finished: Called with finished results, in any order.
        """


def cut_at_stop(
    output_ids: Sequence[int], stop_ids: Collection[int]
) -> tuple[tuple[int, ...], Literal["stop", "length"]]:
    """Return the ids up to and including the first stop token, and the finish reason."""
    for position, token in enumerate(output_ids):
        if token in stop_ids:
            return tuple(output_ids[: position + 1]), "stop"
    return tuple(output_ids), "length"
