"""Answers with leap heads in chat, api, webchat and the web UI's chat tab.

Every answer runs upstream's own method on a copy of the engine whose model is a `GenerationProxy`. For models without leap
heads, or with `lmtp_decode: off`, upstream's method runs unchanged.
"""

import copy
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from ..decoding.stats import DecodeStats
from . import log


# Set while upstream's `chat` command runs, which prints answers without a newline at their end.
prints_answers = threading.Event()
# Set while upstream's ChatModel starts. Chat and export parse the same arguments with the same function.
starts_chat = ContextVar("starts_chat", default=False)


@dataclass
class ChatRequest:
    """Decoding options and statistics of one streamed answer.

    Attributes:
        strategy: Decoding strategy; `auto` takes the one that the model was loaded with.
        stats: Statistics of the answer, once it has ended.
        tokens: Token ids of the answer, once it has ended; empty if `generate` failed.
    """

    strategy: str = "auto"
    stats: DecodeStats | None = None
    tokens: list[int] = field(default_factory=list)


class ClientDisconnected(StoppingCriteria):
    """Ends a generation when the consumer of its stream has gone.

    Attributes:
        event: Set by the stream when its consumer has gone.
    """

    def __init__(self):
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class GenerationProxy:
    """A model with leap heads for one call of the engine: everything but `generate` is the model's own.

    Attributes:
        stats: Statistics of this call alone, whatever else the model generates meanwhile.
        finished: Set when `generate` has ended, in the thread in which upstream runs it.
        answered: Whether `generate` has returned.
    """

    def __init__(
        self, model: nn.Module, disconnected: ClientDisconnected | None = None, request: ChatRequest | None = None
    ):
        self.model, self.disconnected, self.request = model, disconnected, request or ChatRequest()
        self.stats, self.finished, self.answered = DecodeStats(), threading.Event(), False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def engine(self, engine: Any) -> Any:
        """A copy of `engine` that shares everything but the model."""
        view = copy.copy(engine)
        view.model = self
        return view

    def generate(self, **kwargs) -> Any:
        """Call the model's `generate` with the request's options, and record statistics."""
        if self.disconnected is not None:
            kwargs["stopping_criteria"] = StoppingCriteriaList([self.disconnected])
        if self.request.strategy != "auto":
            kwargs["lmtp_decode"] = self.request.strategy
        started = time.perf_counter()
        try:
            output = self.model.generate(**kwargs, lmtp_stats=self.stats)
            self.answered = True
            new = output[:, kwargs["inputs"].shape[1] :] if isinstance(output, Tensor) else None
            if not self.stats.tokens and new is not None:  # stock generate records nothing
                self.stats.rows = len(new)
                self.stats.tokens = new.numel()
                self.stats.seconds["total"] = time.perf_counter() - started
            if new is not None:
                self.request.stats, self.request.tokens = self.stats, new[0].tolist()
        finally:
            self.finished.set()
        if self.disconnected is not None and self.disconnected.event.is_set():
            log.info(f"Stopped an answer whose client disconnected: {self.stats.line()}.")
        return output

    def report(self) -> None:
        """Log the statistics of the answer, unless `generate` failed."""
        if not self.answered:
            return
        if prints_answers.is_set():
            print(flush=True)
        log.info(f"Answered with {self.stats.line()}.")
