"""Generation by OpenAI-compatible servers (vLLM, SGLang), several at once.

The prompt goes over as token ids, so that the model reads exactly those. Token ids are asked for in return
(`return_token_ids`: vLLM from 0.10.2 and recent SGLang know it); a server that sends none has its text tokenized here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import openai

from ..errors import LMTPError, first_line
from .engine import Generation, Request, Sampling, stop_at


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class ServerEngine:
    """An `Engine` on one or more servers that hold the same model.

    Args:
        base_urls: `http://host:port/v1`, one for each server; requests go round.
        tokenizer: the model's, for servers that send no token ids.
        model: the name under which the servers know the model; None: the first that each of them lists.
        api_key: sent as bearer token.
        concurrency: requests under way at once, over all servers.
        max_retries: of one request on one server, with growing pauses, before the next server is tried.
        timeout: seconds for one request.
    """

    def __init__(
        self,
        base_urls: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 32,
        max_retries: int = 5,
        timeout: float = 600.0,
    ):
        self.base_urls = list(base_urls)
        self.tokenizer = tokenizer
        self.model = model
        self.api_key = api_key or "none"  # the client insists on one, local servers do not look
        self.concurrency = concurrency
        self.max_retries = max_retries
        self.timeout = timeout
        self._warned = False

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        done: Collection[int],
        on_tokens: Callable[[int], None],
        on_rows: Callable[[list[Generation]], None],
    ) -> None:
        """See `Engine.generate`. Every request has a seed of its own; a server may still not repeat itself exactly.

        Raises:
            LMTPError: a server does not answer, or refuses a request.
        """

        def finished(row: Generation) -> None:
            on_tokens(len(row.output_ids))
            on_rows([row])

        missing = [request for request in requests if request.id not in done]
        if missing:
            asyncio.run(self._generate_all(missing, sampling, finished))

    async def _generate_all(
        self, requests: list[Request], sampling: Sampling, finished: Callable[[Generation], None]
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(self._client(url)) for url in self.base_urls]
            servers = [(client, await self._served_model(client)) for client in clients]
            pending = iter(enumerate(requests))

            async def work() -> None:
                for turn, request in pending:  # shared by all workers: each takes what is next
                    first = turn % len(servers)
                    finished(await self._complete(request, sampling, servers[first:] + servers[:first]))

            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(self.concurrency, len(requests))):
                        workers.create_task(work())
            except ExceptionGroup as group:
                raise group.exceptions[0] from None

    def _client(self, url: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=url, api_key=self.api_key, max_retries=self.max_retries, timeout=self.timeout
        )

    async def _served_model(self, client: openai.AsyncOpenAI) -> str:
        """The model's name on that server; asking for it also shows whether the server is up."""
        try:
            names = [model.id async for model in client.with_options(max_retries=1, timeout=20.0).models.list()]
        except openai.OpenAIError as error:
            raise LMTPError(
                f"no OpenAI-compatible server answers at {client.base_url} ({_reason(error)}): start it, or mend "
                "`--base-url` (it ends in /v1)."
            ) from error
        if self.model is None and names:
            return names[0]
        if self.model not in names:
            raise LMTPError(
                f"the server at {client.base_url} does not serve `{self.model}`: give one of its names "
                f"({', '.join(names) or 'none'}) with `--served-model-name`."
            )
        return self.model

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
                    # Servers take defaults from the model's generation_config.json (penalties, top-k): the answers
                    # should follow the plain distribution that the heads will learn.
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
                raise LMTPError(f"{client.base_url} refused a request: {_reason(error)}.") from error
            else:
                return self._generation(request, completion.choices[0], sampling)
        raise LMTPError(
            f"{', '.join(str(client.base_url) for client, _ in servers)} stopped answering ({_reason(failure)}): "
            "bring the server back and run the same command again, finished rows are kept."
        ) from failure

    def _generation(self, request: Request, choice: Any, sampling: Sampling) -> Generation:
        extra = choice.model_extra or {}
        output_ids = extra.get("token_ids")
        if output_ids is None:
            self._warn_once()
            output_ids = self.tokenizer(choice.text, add_special_tokens=False)["input_ids"]
        output_ids, finish_reason = stop_at(output_ids, sampling.stop_ids)
        if finish_reason == "length" and choice.finish_reason == "stop":
            # The server cut off the token that ended the turn; vLLM and SGLang name it unless it was the plain eos.
            named = extra.get("stop_reason", extra.get("matched_stop"))
            end = named if isinstance(named, int) else sampling.stop_ids[0]
            output_ids, finish_reason = (*output_ids, end), "stop"
        return Generation(request.id, output_ids, finish_reason)

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "the server sends no token ids, so its text is tokenized here: now and then the tokens differ from "
                "those that the model wrote."
            )


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) and error.__cause__ else error
    return first_line(cause)
