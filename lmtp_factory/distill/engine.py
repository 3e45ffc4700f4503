"""What an engine is asked and what it gives back; both engines and the pipeline speak these types."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Request:
    """One continuation to be generated: `id` names it in journal and seeds, `prompt_ids` is all the model reads."""

    id: int
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """What the model wrote after a request's prompt, the stop token included when it stopped by itself."""

    id: int
    output_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; no penalties and no top-k: the model's own distribution."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def seed_of(self, request_id: int) -> int:
        """A seed (31 bits) of its own for a request, so that results do not depend on what ran before it."""
        digest = hashlib.sha256(f"{self.seed}:{request_id}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


class Engine(Protocol):
    """Anything that can continue token ids."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        done: Collection[int],
        on_tokens: Callable[[int], None],
        on_rows: Callable[[list[Generation]], None],
    ) -> None:
        """Continue every request whose id is not in `done`.

        Args:
            requests: the whole list, finished requests included: the split into batches, and with it every sampled
                token, depends on the whole list only, so that a resumed run repeats an uninterrupted one.
            sampling: how to choose tokens.
            done: ids to leave out.
            on_tokens: called with the number of new tokens, for the progress bar.
            on_rows: called with results as they are finished, in any order.
        """


def stop_at(output_ids: Sequence[int], stop_ids: Collection[int]) -> tuple[tuple[int, ...], Literal["stop", "length"]]:
    """Cut after the first stop token (kept), and say whether there was one."""
    for position, token in enumerate(output_ids):
        if token in stop_ids:
            return tuple(output_ids[: position + 1]), "stop"
    return tuple(output_ids), "length"
