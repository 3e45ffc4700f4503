"""`llamafactory-cli api` itself, asked over HTTP: heads change nothing but the speed."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import chat_models
from helpers.api_server import running_api
from helpers.chat_models import chat_model, eventually


TOKENS = 40
LONG = chat_models.LENGTH - 200


class Server:
    """A running API."""

    def __init__(self, url: str, log: Path):
        self.url, self.log = url, log

    def body(self, question: str, **options) -> dict:
        return {"model": "x", "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS} | options

    def ask(self, question: str, **options) -> dict:
        answer = httpx.post(f"{self.url}/chat/completions", json=self.body(question, **options), timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, question: str, most: int | None = None, **options) -> str:
        """The streamed text; the connection is closed after ``most`` pieces."""
        body, pieces = self.body(question, stream=True, **options), []
        with httpx.stream("POST", f"{self.url}/chat/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if not line.startswith("data: ") or data == "[DONE]":
                    continue
                pieces.append(json.loads(data)["choices"][0]["delta"].get("content", ""))
                if most is not None and len(pieces) >= most:
                    break
        return "".join(pieces)

    def told(self, start: str) -> list[str]:
        return [line.split(">> ")[1] for line in self.log.read_text().splitlines() if f">> {start}" in line]


@pytest.fixture(scope="module")
def server(endless, tmp_path_factory):
    with running_api(endless, tmp_path_factory.mktemp("api")) as (url, log):
        yield Server(url, log)


@dataclass
class Stock:
    """What the engine that the API asks says without heads."""

    whole: Any  # upstream's Response
    streamed: str


@pytest.fixture(scope="module")
def expected(endless):
    """Stock answers to the questions."""
    model = chat_model(endless, lmtp_decode="off", max_new_tokens=TOKENS)
    asked = {question: [{"role": "user", "content": question}] for question in chat_models.QUESTIONS}
    return {q: Stock(model.chat(messages)[0], "".join(model.stream_chat(messages))) for q, messages in asked.items()}


def check(answer: dict, expected: Stock) -> None:
    choice, stock = answer["choices"][0], expected.whole
    assert (choice["message"]["content"], choice["finish_reason"]) == (stock.response_text, stock.finish_reason)
    usage = {"prompt_tokens": stock.prompt_length, "completion_tokens": stock.response_length}
    assert answer["usage"] == usage | {"total_tokens": sum(usage.values())}


def test_answers_and_usage(server, endless, expected):
    assert server.told("Decoding with")[0].startswith(f"Decoding with the leap heads of {endless}/lmtp: backward, ")
    for question, stock in expected.items():
        check(server.ask(question), stock)
        line = server.told("Answered")[-1]
        assert line.startswith(f"Answered with {stock.whole.response_length} tokens, ")
        # How many steps draft depends on the time that they take on this machine, so tau may be anything from 1 on.
        assert re.search(r"tau [\d.]+ \(tokens a forward, backward\)", line)


def test_streams(server, expected):
    for question, stock in expected.items():
        assert server.stream(question) == stock.streamed
        assert server.told("Answered")[-1].startswith(f"Answered with {stock.whole.response_length} tokens, ")


def test_several_choices(server, expected):
    stock = expected[chat_models.QUESTIONS[0]]
    answer = server.ask(chat_models.QUESTIONS[0], n=2)
    assert len(answer["choices"]) == 2
    assert answer["usage"]["prompt_tokens"] == stock.whole.prompt_length
    assert answer["usage"]["completion_tokens"] <= 2 * TOKENS


def test_concurrent_requests_get_their_own_answers(server, expected):
    """Two at a time, streamed and whole ones among each other."""
    before = len(server.told("Answered"))
    wanted = list(expected) * 3
    with ThreadPoolExecutor(len(wanted)) as pool:
        whole = [pool.submit(server.ask, question) for question in wanted]
        streams = [pool.submit(server.stream, question) for question in wanted]
        for question, answer, text in zip(wanted, whole, streams, strict=True):
            check(answer.result(), expected[question])
            assert text.result() == expected[question].streamed
    assert len(server.told("Answered")) - before == 2 * len(wanted)


def test_a_client_that_goes_away(server, expected):
    """Its generation stops, and neither the answers meanwhile nor those afterwards notice."""
    first, second, *_ = chat_models.QUESTIONS
    with ThreadPoolExecutor(2) as pool:
        gone = pool.submit(server.stream, first, 5, max_tokens=LONG)
        meanwhile = pool.submit(server.stream, second)
        assert meanwhile.result() == expected[second].streamed
        gone.result()
    told = eventually(lambda: server.told("Stopped an answer whose client disconnected"))
    assert len(told) == 1 and int(re.search(r"(\d+) tokens", told[0])[1]) < LONG / 2
    check(server.ask(first), expected[first])
    assert server.stream(second) == expected[second].streamed


def test_many_clients_that_go_away(server, expected):
    """More than run at a time: some leave while they wait for their turn."""
    with ThreadPoolExecutor(6) as pool:
        leave = lambda question: server.stream(question, 2, max_tokens=LONG)  # noqa: E731
        list(pool.map(leave, [*chat_models.QUESTIONS, *chat_models.QUESTIONS[:2]]))
    check(server.ask(chat_models.QUESTIONS[0]), expected[chat_models.QUESTIONS[0]])


def test_a_request_that_is_refused_does_not_matter(server, expected):
    question = chat_models.QUESTIONS[0]
    bad = httpx.post(f"{server.url}/chat/completions", json={"model": "x", "messages": []}, timeout=60)
    assert bad.status_code == 400
    check(server.ask(question), expected[question])
