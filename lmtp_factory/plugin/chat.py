"""Answers of ``chat``, ``api``, ``webchat`` and the web UI's chat tab (``llamafactory.chat``).

Each answer runs upstream's own method on a copy of the engine whose model is one :class:`Answer`. Models without leap
heads, or with ``lmtp_decode: off``, go upstream's way untouched.
"""

import asyncio
import copy
import functools
import inspect
import threading
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from ..decoding.stats import DecodeStats
from ..modeling import heads_of
from . import hooks, log
from .loading import with_heads


# The end of a stream is seen a moment before generate() returns with the counts.
_PATIENCE = 10
_prints_answers = threading.Event()  # whether upstream's `chat` command runs, which prints text without a line's end


def extend_engine(module: ModuleType) -> None:
    """Load the model with its heads; count and log each answer; stop those that nobody reads any more."""
    engine = hooks.expect(module, "HuggingfaceEngine")
    load_model = hooks.expect(module, "load_model", "tokenizer", "model_args", "finetuning_args")
    chat = hooks.expect(engine, "chat", "messages")
    stream_chat = hooks.expect(engine, "stream_chat", "messages")
    if not inspect.iscoroutinefunction(chat) or not inspect.isasyncgenfunction(stream_chat):
        raise TypeError("chat is no coroutine or stream_chat no asynchronous generator any more")
    for name in ("_chat", "_stream_chat"):  # they call model.generate
        hooks.expect(engine, name, "model")

    @functools.wraps(chat)
    async def chat_with_heads(self, *args, **kwargs):
        if heads_of(self.model) is None:
            return await chat(self, *args, **kwargs)
        answer = Answer(self.model)
        responses = await chat(answer.engine(self), *args, **kwargs)
        answer.report()
        return responses

    @functools.wraps(stream_chat)
    async def stream_chat_with_heads(self, *args, lmtp_wish: Wish | None = None, **kwargs):
        if heads_of(self.model) is None:
            async for text in stream_chat(self, *args, **kwargs):
                yield text
            return
        answer = Answer(self.model, Reader(), lmtp_wish)
        async with aclosing(stream_chat(answer.engine(self), *args, **kwargs)) as texts:
            try:
                async for text in texts:
                    yield text
            except (GeneratorExit, asyncio.CancelledError):
                answer.reader.gone.set()
                raise
        await asyncio.to_thread(answer.finished.wait, _PATIENCE)
        answer.report()

    module.load_model = with_heads(load_model)
    engine.chat, engine.stream_chat = chat_with_heads, stream_chat_with_heads


def extend_chat_model(module: ModuleType) -> None:
    """Let log lines begin on a line of their own while the ``chat`` command prints answers."""
    upstream = hooks.expect(module, "run_chat")

    @functools.wraps(upstream)
    def run_chat():
        _prints_answers.set()
        try:
            upstream()
        finally:
            _prints_answers.clear()

    module.run_chat = run_chat


@dataclass
class Wish:
    """How somebody wants one streamed answer, and what came of it.

    Attributes:
        strategy: to decode with; ``auto`` takes what the model was loaded with.
        stats: of the answer, once it has ended.
        tokens: the answer's ids, once it has ended; empty where ``generate`` failed.
    """

    strategy: str = "auto"
    stats: DecodeStats | None = None
    tokens: list[int] = field(default_factory=list)


class Reader(StoppingCriteria):
    """Ends a generation once the consumer of its stream has gone away."""

    def __init__(self):
        self.gone = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        return torch.full((len(input_ids),), self.gone.is_set(), device=input_ids.device)


class Answer:
    """A model with leap heads as one call of the engine sees it: the same but for :meth:`generate`.

    Attributes:
        stats: of this answer alone, whatever else the model does meanwhile.
        finished: set when ``generate`` has ended, in the thread where upstream runs it.
    """

    def __init__(self, model: nn.Module, reader: Reader | None = None, wish: Wish | None = None):
        self.model, self.reader, self.wish = model, reader, wish or Wish()
        self.stats, self.finished = DecodeStats(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def engine(self, engine: Any) -> Any:
        """A copy of ``engine`` that shares everything but the model."""
        view = copy.copy(engine)
        view.model = self
        return view

    def generate(self, **kwargs) -> Any:
        """The model's, counted."""
        if self.reader is not None:
            kwargs["stopping_criteria"] = StoppingCriteriaList([self.reader])
        if self.wish.strategy != "auto":
            kwargs["lmtp_decode"] = self.wish.strategy
        started = time.perf_counter()
        try:
            output = self.model.generate(**kwargs, lmtp_stats=self.stats)
            new = output[:, kwargs["inputs"].shape[1] :] if isinstance(output, Tensor) else None
            if not self.stats.tokens and new is not None:  # stock generate counts nothing
                self.stats.rows = len(new)
                self.stats.tokens = new.numel()
                self.stats.seconds["total"] = time.perf_counter() - started
            if new is not None:
                self.wish.stats, self.wish.tokens = self.stats, new[0].tolist()
        finally:
            self.finished.set()
        if self.reader is not None and self.reader.gone.is_set():
            log.info(f"Stopped an answer that nobody reads any more: {self.stats.line()}.")
        return output

    def report(self) -> None:
        """The line after an answer; nothing where ``generate`` failed."""
        if not self.stats.tokens:
            return
        if _prints_answers.is_set():
            print(flush=True)
        log.info(f"Answered with {self.stats.line()}.")
