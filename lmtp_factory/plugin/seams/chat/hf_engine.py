"""Loads the model with its heads, logs statistics of each answer, and stops answers whose client disconnected."""

import asyncio
import functools
import inspect
from contextlib import aclosing
from types import ModuleType

from ....modeling import heads_of
from ... import hooks
from ...chat import ChatRequest, ClientDisconnected, GenerationProxy
from ...inference import with_heads


# Seconds to wait for the statistics: a stream ends a moment before generate() returns.
_PATIENCE = 10


def extend(module: ModuleType) -> None:
    """Wrap the engine's `chat` and `stream_chat`, and the `load_model` that it calls."""
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
        proxy = GenerationProxy(self.model)
        responses = await chat(proxy.engine(self), *args, **kwargs)
        proxy.report()
        return responses

    @functools.wraps(stream_chat)
    async def stream_chat_with_heads(self, *args, lmtp_request: ChatRequest | None = None, **kwargs):
        if heads_of(self.model) is None:
            async for text in stream_chat(self, *args, **kwargs):
                yield text
            return
        disconnected = ClientDisconnected()
        proxy = GenerationProxy(self.model, disconnected, lmtp_request)
        async with aclosing(stream_chat(proxy.engine(self), *args, **kwargs)) as texts:
            try:
                async for text in texts:
                    yield text
            except (GeneratorExit, asyncio.CancelledError):
                disconnected.event.set()
                raise
        await asyncio.to_thread(proxy.finished.wait, _PATIENCE)
        proxy.report()

    module.load_model = with_heads(load_model)
    engine.chat, engine.stream_chat = chat_with_heads, stream_chat_with_heads
