"""Generation with one or more OpenAI-compatible servers (vLLM, SGLang).

Requests send token ids and request token ids (`return_token_ids`, supported by vLLM from 0.10.2 and by recent SGLang).
If a server returns only text, the text is tokenized here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import openai

from ..errors import LMTPError, first_line
from .engine import Generation, Request, Sampling, cut_at_stop


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TIMEOUT = 600.0  # seconds for one request


class ServerEngine:
    """An `Engine` on one or more servers of the same model. The environment variable OPENAI_API_KEY is the API key.

    Args:
        base_urls: `http://host:port/v1` of each server. Requests are distributed in turn.
        tokenizer: The model's tokenizer, for servers that return no token ids.
        model: The model's name. A server with a single model may use another name.
        concurrency: Concurrent requests per server.
        max_retries: Retries of a request on one server, with exponential backoff, before the next server is tried.
    """

    def __init__(
        self,
        base_urls: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: str,
        concurrency: int = 32,
        max_retries: int = 5,
    ):
        self.base_urls = list(base_urls)
        self.tokenizer = tokenizer
        self.model = model
        self.concurrency = concurrency
        self.max_retries = max_retries
        self._warned = False
        self._announced: set[str] = set()

    def facts(self) -> dict[str, Any]:
        """See `Engine.facts`: under which name the servers serve the model, or the sorted names if they differ.

        Raises:
            LMTPError: A server does not answer, or serves other models.
        """
        names = sorted(set(asyncio.run(self._served_models())))
        return {"served_model": names[0] if len(names) == 1 else names}

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        done: Collection[int],
        on_finished: Callable[[list[Generation]], None],
    ) -> None:
        """See `Engine.generate`. Each request has its own seed, but servers may still not be deterministic.

        Raises:
            LMTPError: A server does not answer or rejects a request.
        """
        missing = [request for request in requests if request.id not in done]
        if missing:
            asyncio.run(self._generate_all(missing, sampling, on_finished))

    async def _served_models(self) -> list[str]:
        names = []
        for url in self.base_urls:
            async with self._client(url) as client:
                names.append(await self._served_model(client))
        return names

    async def _generate_all(
        self, requests: list[Request], sampling: Sampling, on_finished: Callable[[list[Generation]], None]
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(self._client(url)) for url in self.base_urls]
            servers = [(client, await self._served_model(client)) for client in clients]
            pending = iter(enumerate(requests))

            async def work() -> None:
                for number, request in pending:  # workers share the iterator
                    first = number % len(servers)
                    on_finished([await self._complete(request, sampling, servers[first:] + servers[:first])])

            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(self.concurrency * len(servers), len(requests))):
                        workers.create_task(work())
            except ExceptionGroup as group:
                raise group.exceptions[0] from None

    def _client(self, url: str) -> openai.AsyncOpenAI:
        # The client requires a key; local servers ignore it.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=self.max_retries, timeout=_TIMEOUT)

    async def _served_model(self, client: openai.AsyncOpenAI) -> str:
        """Return the model's name on a server. The request also checks that the server is running."""
        try:
            names = [model.id async for model in client.with_options(max_retries=1, timeout=20.0).models.list()]
        except openai.OpenAIError as error:
            raise LMTPError(
                f"No OpenAI-compatible server answers at {client.base_url} ({_reason(error)}): start it, or correct "
                "--base-url, which ends in /v1."
            ) from error
        if self.model in names:
            return self._announce(client, self.model)
        if len(names) == 1:
            return self._announce(client, names[0])
        raise LMTPError(
            f"The server at {client.base_url} serves {', '.join(names) or 'no model'}, but not {self.model}: start it "
            f"with --served-model-name {self.model}."
        )

    def _announce(self, client: openai.AsyncOpenAI, served: str) -> str:
        """Print the served model's name once for each server, with a warning if it is not the tokenizer's; return it."""
        url = str(client.base_url)
        if url not in self._announced:
            self._announced.add(url)
            print(f"engine: {url} serves {served}")
            if _last_part(served) != _last_part(self.model):
                logger.warning(
                    "%s serves %s, but the prompts are tokenized for %s: make sure that it is the same model.",
                    url, served, self.model,
                )  # fmt: skip
        return served

    async def _complete(
        self, request: Request, sampling: Sampling, servers: list[tuple[openai.AsyncOpenAI, str]]
    ) -> Generation:
        for client, model in servers:
            try:
                completion = await client.completions.create(
                    model=model,
                    prompt=list(request.prompt_ids),
                    max_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=sampling.seed_of(request.id),
                    # Servers apply defaults of generation_config.json (penalties, top-k). These values turn them off,
                    # so that answers follow the model's unmodified distribution, which the heads learn.
                    extra_body={
                        "return_token_ids": True,
                        "stop_token_ids": list(sampling.stop_ids),
                        "skip_special_tokens": False,
                        "repetition_penalty": 1.0,
                        "top_k": -1,
                        "min_p": 0.0,
                    },
                )
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                failure = error
                logger.warning("%s failed (%s)", client.base_url, _reason(error))
            except openai.OpenAIError as error:
                raise LMTPError(
                    f"The server at {client.base_url} refuses a request ({_reason(error)}): correct the cause "
                    "and run the same command again; finished rows are kept."
                ) from error
            else:
                return self._generation(request, completion.choices[0], sampling)
        raise LMTPError(
            f"No answer from {', '.join(str(client.base_url) for client, _ in servers)} ({_reason(failure)}): restart "
            "the server and run the same command again; finished rows are kept."
        ) from failure

    def _generation(self, request: Request, choice: Any, sampling: Sampling) -> Generation:
        extra = choice.model_extra or {}
        output_ids = extra.get("token_ids")
        if output_ids is None:
            self._warn_once()
            output_ids = self.tokenizer(choice.text, add_special_tokens=False)["input_ids"]
        output_ids, finish_reason = cut_at_stop(output_ids, sampling.stop_ids)
        if finish_reason == "length" and choice.finish_reason == "stop":
            # The server omits the token that ended the turn; vLLM and SGLang name it unless it is the default eos.
            named = extra.get("stop_reason", extra.get("matched_stop"))
            end = named if isinstance(named, int) else sampling.stop_ids[0]
            output_ids, finish_reason = (*output_ids, end), "stop"
        return Generation(request.id, output_ids, finish_reason)

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "The server returns no token ids, so its text is tokenized here; a few tokens may differ from those "
                "that the model wrote."
            )


def _last_part(model: str) -> str:
    """Return the last part of a directory or hub id."""
    return os.path.basename(os.path.abspath(model))


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) and error.__cause__ else error
    return first_line(cause)
