"""Statistics of `generate` calls: tokens, forwards, acceptance, time per phase."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


PHASES = ("draft", "verify", "accept", "commit")


@dataclass
class DecodeStats:
    """Counts over one or more calls of `model.generate(..., lmtp_stats=stats)`.

    A call that raises counts up to its last complete step.

    Attributes:
        strategy: `backward`, `forward` or `off`, of the latest call.
        stock_reason: Why the latest call fell back to transformers' own decoding; None if it did not.
        tokens: Number of generated tokens, over all rows.
        rows: Number of generated sequences.
        steps: Number of forwards after the prefill, counted once per unfinished row.
        nodes: Number of verified nodes, including roots.
        drafts: Number of steps that verified a draft. A draft budget leaves it out of others.
        accepted: For each level, the number of steps that accepted a node of the level.
        advances: For each step, the number of tokens that it added. All but the last of them were drafted.
        seconds: Seconds of the whole generation and of each phase. A compiled greedy step is one graph: its draft and its
            commit count as verification.
        profile: Synchronise the device at the end of each phase. Without it, the times of phases on a GPU are launch
            times.
        has_launch_times: Whether phases ran on a GPU without `profile`.
    """

    strategy: str = "off"
    stock_reason: str | None = None
    tokens: int = 0
    rows: int = 0
    steps: int = 0
    nodes: int = 0
    drafts: int = 0
    accepted: list[int] = field(default_factory=list)
    advances: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("total", "prefill", *PHASES), 0.0))
    profile: bool = False
    has_launch_times: bool = False

    @property
    def tau(self) -> float:
        """Tokens per forward, not counting the prefill and its token."""
        return (self.tokens - self.rows) / self.steps if self.steps else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, including the prefill."""
        return self.tokens / self.seconds["total"] if self.seconds["total"] else 0.0

    def acceptance(self) -> list[float]:
        """Return, for each level, the share of drafts of which it was accepted: vLLM's acceptance rate per position."""
        return [accepted / self.drafts for accepted in self.accepted]

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per step that verified a draft, as vLLM counts them: 1 plus the sum of `acceptance`.

        It equals tau if every step drafts.
        """
        return 1.0 + sum(self.acceptance())

    def share(self, phase: str) -> float | None:
        """Return the share of `phase` in the time of all phases after the prefill.

        None if there was no step, or if times are launch times, in which a phase pays for the kernels of another.
        """
        steps = sum(self.seconds[name] for name in PHASES)
        return self.seconds[phase] / steps if steps and not self.has_launch_times else None

    def count_prefill(self, rows: int) -> None:
        """Count the forward of a prompt, which adds one token to each of its rows."""
        self.rows += rows
        self.tokens += rows

    def count(self, nodes: int, branches: Sequence[Sequence[int]]) -> None:
        """Count one step.

        Args:
            nodes: Number of nodes of the tree.
            branches: Indices of each row's accepted nodes, root first. Empty for rows that had ended.
        """
        for branch in filter(None, branches):
            self.steps += 1
            self.nodes += nodes
            self.tokens += len(branch)
            self.drafts += nodes > 1
            self.advances.append(len(branch))
            self.accepted.extend([0] * (len(branch) - 1 - len(self.accepted)))
            for level in range(len(branch) - 1):
                self.accepted[level] += 1

    @contextmanager
    def timed(self, phase: str, device: torch.device) -> Iterator[None]:
        """Add the duration of the context to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if device.type == "cuda":
                if self.profile:
                    torch.cuda.synchronize(device)
                else:
                    self.has_launch_times = True
            self.seconds[phase] += time.perf_counter() - started

    def line(self) -> str:
        """Return a summary for the log."""
        how = self.strategy if self.stock_reason is None else f"{self.strategy}: {self.stock_reason}"
        line = (
            f"{self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s, tau {self.tau:.2f} (tokens a forward, {how})"
        )
        if self.drafts:
            rates = " ".join(f"{100 * rate:.0f}%" for rate in self.acceptance())
            line += f", mean acceptance length {self.mean_acceptance_length:.2f}"
            line += f" (by position {rates})" if rates else ""
        return line
