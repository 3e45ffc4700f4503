"""What one call of `generate` did: tokens, forwards, acceptance, and where the time went."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


PHASES = ("draft", "verify", "accept", "commit")


@dataclass
class DecodeStats:
    """Counts of one or several calls; give one to `model.generate(..., lmtp_stats=stats)`.

    Attributes:
        strategy: `backward`, `forward` or `off`.
        stock_reason: why stock `generate` decoded although heads were there and not switched off; else None.
        tokens: generated, over all rows.
        rows: sequences generated.
        steps: forwards after the prefill, each counted once for every row that it served.
        accepted: for each level of the trees, how many steps accepted it.
        nodes: verified, roots counted.
        advances: for each of the steps, how many tokens it brought; all but the last of them were drafted.
        seconds: time of the whole generation, and of each of its phases; the device is waited for only with `profile`.
        profile: wait for the device at every phase's end, so that phases on a GPU are timed and not just launched.
    """

    strategy: str = "off"
    stock_reason: str | None = None
    tokens: int = 0
    rows: int = 0
    steps: int = 0
    nodes: int = 0
    accepted: list[int] = field(default_factory=list)
    advances: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("total", "prefill", *PHASES), 0.0))
    profile: bool = False

    @property
    def tau(self) -> float:
        """Tokens a forward, the prefill and its token not counted."""
        return (self.tokens - self.rows) / self.steps if self.steps else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Over the whole generation, prefill included."""
        return self.tokens / self.seconds["total"] if self.seconds["total"] else 0.0

    def acceptance(self) -> list[float]:
        """For each level, the share of the steps that accepted it; with 1 they add up to tau."""
        return [accepted / self.steps for accepted in self.accepted]

    def count(self, nodes: int, branches: Sequence[Sequence[int]]) -> None:
        """One step: trees of `nodes` nodes and the accepted branch of each row, empty where it was finished."""
        for branch in filter(None, branches):
            self.steps += 1
            self.nodes += nodes
            self.advances.append(len(branch))
            self.accepted.extend([0] * (len(branch) - 1 - len(self.accepted)))
            for level in range(len(branch) - 1):
                self.accepted[level] += 1

    @contextmanager
    def timed(self, phase: str, device: torch.device) -> Iterator[None]:
        """Add the time inside to a phase."""
        started = time.perf_counter()
        yield
        if self.profile and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[phase] += time.perf_counter() - started

    def line(self) -> str:
        """One line for a log."""
        how = self.strategy if self.stock_reason is None else f"{self.strategy}: {self.stock_reason}"
        return (
            f"{self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s, tau {self.tau:.2f} (tokens a forward, {how})"
        )
