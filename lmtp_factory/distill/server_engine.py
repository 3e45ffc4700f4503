"""Generation by OpenAI-compatible servers (vLLM, SGLang), several at once.

A request sends token ids and asks for token ids in return (`return_token_ids`, known to vLLM from 0.10.2 and to recent
SGLang). If a server returns only text, the text is tokenized here.
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
    """An `Engine` on one or more servers of the same model; OPENAI_API_KEY of the environment is the API key.

    Args:
        base_urls: `http://host:port/v1` of each server; requests take turns.
        tokenizer: the model's, for servers that return no token ids.
        model: the model's name. A server with a single model may call it otherwise.
        concurrency: requests under way at once on each server.
        max_retries: of one request on one server, with growing pauses, before the next server is tried.
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

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        done: Collection[int],
        on_finished: Callable[[list[Generation]], None],
    ) -> None:
        """See `Engine.generate`. Every request has its own seed; even so a server may not repeat itself exactly.

        Raises:
            LMTPError: a server does not answer, or refuses a request.
        """
        missing = [request for request in requests if request.id not in done]
        if missing:
            asyncio.run(self._generate_all(missing, sampling, on_finished))

    async def _generate_all(
        self, requests: list[Request], sampling: Sampling, on_finished: Callable[[list[Generation]], None]
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(self._client(url)) for url in self.base_urls]
            servers = [(client, await self._served_model(client)) for client in clients]
            pending = iter(enumerate(requests))

            async def work() -> None:
                for number, request in pending:  # all workers share it, each takes the next request
                    first = number % len(servers)
                    on_finished([await self._complete(request, sampling, servers[first:] + servers[:first])])

            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(self.concurrency * len(servers), len(requests))):
                        workers.create_task(work())
            except ExceptionGroup as group:
                raise group.exceptions[0] from None

    def _client(self, url: str) -> openai.AsyncOpenAI:
        # the client insists on a key, local servers ignore it
        key = os.environ.get("OPENAI_API_KEY") or "none"
        return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=self.max_retries, timeout=_TIMEOUT)

    async def _served_model(self, client: openai.AsyncOpenAI) -> str:
        """The model's name on a server; the question also shows whether the server is up."""
        try:
            names = [model.id async for model in client.with_options(max_retries=1, timeout=20.0).models.list()]
        except openai.OpenAIError as error:
            raise LMTPError(
                f"No OpenAI-compatible server answers at {client.base_url} ({_reason(error)}): start it, or correct "
                "--base-url, which ends in /v1."
            ) from error
        if self.model in names:
            return self.model
        if len(names) == 1:
            return names[0]
        raise LMTPError(
            f"The server at {client.base_url} serves {', '.join(names) or 'no model'}, but not {self.model}: start it "
            f"with --served-model-name {self.model}."
        )

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
                    # Servers take defaults from the model's generation_config.json (penalties, top-k). These values
                    # keep the answers in the plain distribution that the heads learn.
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
            # The server left out the token that ended the turn; vLLM and SGLang name it unless it is the plain eos.
            named = extra.get("stop_reason", extra.get("matched_stop"))
            end = named if isinstance(named, int) else sampling.stop_ids[0]
            output_ids, finish_reason = (*output_ids, end), "stop"
        return Generation(request.id, output_ids, finish_reason)

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "The server returns no token ids, so its text is tokenized here; a few tokens may differ from those that "
                "the model wrote."
            )


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) and error.__cause__ else error
    return first_line(cause)
