"""The server engine against a small HTTP server with the protocol of vLLM, and against a real server if one is given."""

import json
import os
import socket
import threading
import time

import pytest
from helpers.distillation import distill as run_command
from helpers.distillation import read_rows

from lmtp_factory.distill import chat
from lmtp_factory.distill.engine import Request, Sampling
from lmtp_factory.distill.pipeline import Settings, distill
from lmtp_factory.distill.prompts import prompts_from_file
from lmtp_factory.distill.rows import format_ids, parse_ids
from lmtp_factory.distill.server_engine import ServerEngine
from lmtp_factory.errors import LMTPError


EOS = 2
ANSWER_IDS = [*range(41, 50), EOS]
SAMPLING = Sampling(max_new_tokens=16, stop_ids=(EOS, 60))


class FakeServer:
    """An OpenAI-compatible completions server; its answer to prompt ids is `answer(ids)` -> (ids, finish_reason)."""

    def __init__(
        self, answer, *, tokenizer=None, send_ids=True, failures=0, status=503, delay=0.0, extra=None, names=("served",)
    ):
        self.answer, self.tokenizer, self.send_ids = answer, tokenizer, send_ids
        self.failures, self.status, self.delay, self.extra = failures, status, delay, extra or {}
        self.names = names
        self.requests, self.under_way, self.most_at_once, self.keys = [], 0, 0, set()

    def app(self):
        import asyncio

        from fastapi import FastAPI
        from fastapi import Request as HTTPRequest
        from fastapi.responses import JSONResponse

        app = FastAPI()

        @app.get("/v1/models")
        async def models():
            common = {"object": "model", "created": 0, "owned_by": "us"}
            return {"object": "list", "data": [{"id": name, **common} for name in self.names]}

        @app.post("/v1/completions")
        async def completions(request: HTTPRequest):
            if self.failures > 0:
                self.failures -= 1
                return JSONResponse({"error": {"message": "out of order"}}, status_code=self.status)
            body = await request.json()
            self.keys.add(request.headers["authorization"])
            self.requests.append(body)
            self.under_way += 1
            self.most_at_once = max(self.most_at_once, self.under_way)
            await asyncio.sleep(self.delay * (1 + body["prompt"][0] % 3))
            self.under_way -= 1
            ids, finish_reason = self.answer(body["prompt"])
            choice = {"index": 0, "text": "", "finish_reason": finish_reason, "logprobs": None, **self.extra}
            if self.send_ids:
                choice["token_ids"] = ids
            else:
                choice["text"] = self.tokenizer.decode(ids)
            return {"id": "c", "object": "text_completion", "created": 0, "model": "served", "choices": [choice]}

        return app

    def __enter__(self):
        import uvicorn

        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        self.server = uvicorn.Server(uvicorn.Config(self.app(), log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]}, daemon=True)
        self.thread.start()
        until = time.monotonic() + 10
        while not self.server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        return self

    def __exit__(self, *exception):
        self.server.should_exit = True
        self.thread.join(timeout=10)


def echo(ids):
    return [*ids, EOS], "stop"


def collect(urls, tokenizer, requests=None, *, done=(), sampling=SAMPLING, **options):
    rows = {}

    def on_finished(generations):
        for generation in generations:
            assert generation.id not in rows
            rows[generation.id] = generation

    requests = requests or [Request(number, (number, 7)) for number in range(20)]
    engine = ServerEngine(urls, tokenizer, **{"model": "tiny", "max_retries": 3, **options})
    engine.generate(requests, sampling, done=done, on_finished=on_finished)
    return rows


def test_servers_read_and_return_token_ids(tokenizer, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with FakeServer(echo) as server:
        rows = collect([server.url], tokenizer)
    assert {number: row.output_ids for number, row in rows.items()} == {
        n: (n, 7, EOS) for n in range(20) if n != EOS
    } | {EOS: (EOS,)}
    assert server.keys == {"Bearer secret"}
    for body in server.requests:
        assert body["model"] == "served"
        assert body["return_token_ids"] is True
        assert body["stop_token_ids"] == [EOS, 60]
        assert (body["max_tokens"], body["temperature"], body["repetition_penalty"], body["top_k"]) == (
            16,
            0.0,
            1.0,
            -1,
        )
    assert len({body["seed"] for body in server.requests}) == 20


def test_servers_share_the_missing_rows(tokenizer):
    with FakeServer(echo, delay=0.02) as one, FakeServer(echo, delay=0.02) as two:
        rows = collect([one.url, two.url], tokenizer, done={0, 5}, concurrency=2)
    assert set(rows) == set(range(20)) - {0, 5}
    assert len(one.requests) == len(two.requests) == 9
    # four workers in all; the two maxima may be of different moments
    assert 2 < one.most_at_once + two.most_at_once <= 2 * 4


def test_failures_are_retried(tokenizer):
    with FakeServer(echo, failures=3) as server:
        assert len(collect([server.url], tokenizer)) == 20


def test_another_server_takes_over(tokenizer):
    with FakeServer(echo, failures=10**6, status=500) as broken, FakeServer(echo) as good:
        assert len(collect([broken.url, good.url], tokenizer, max_retries=0)) == 20
    assert len(good.requests) == 20


def test_a_run_resumes_after_a_server_failed(tokenizer, distill_model, prompts_file, tmp_path):
    count = 0

    def answer(ids):
        nonlocal count
        count += 1
        if count == 6:
            server.failures = 10**6
        return ANSWER_IDS, "stop"

    settings = Settings(
        model=str(distill_model),
        name="s",
        output_dir=tmp_path,
        engine="server",
        prompts=prompts_from_file(prompts_file),
    )

    with FakeServer(answer) as server, pytest.raises(LMTPError, match=f"{server.url}.*finished rows are kept"):
        engine = ServerEngine([server.url], tokenizer, model=str(distill_model), concurrency=1, max_retries=0)
        distill(settings, tokenizer, lambda: engine)
    assert len(read_rows(tmp_path / "s.raw.jsonl")) == 6
    options = ["--prompts", prompts_file, "--name", "s", "--output-dir", tmp_path]
    with FakeServer(lambda ids: (ANSWER_IDS, "stop")) as server:
        run_command(distill_model, "--engine", "server", "--base-url", server.url, *options)
    assert len(server.requests) == 14 - 6
    rows = read_rows(tmp_path / "s.jsonl")
    assert [row["id"] for row in rows] == list(range(14))
    assert {row["output_ids"] for row in rows} == {format_ids(ANSWER_IDS)}


def test_text_is_tokenized_if_the_server_returns_no_token_ids(tokenizer, caplog):
    ids = tokenizer("tell me about tokens", add_special_tokens=False)["input_ids"]
    requests = [Request(number, (10,)) for number in range(3)]
    with FakeServer(lambda _: (ids, "stop"), tokenizer=tokenizer, send_ids=False) as server:
        rows = collect([server.url], tokenizer, requests)
    assert {row.output_ids for row in rows.values()} == {(*ids, EOS)}
    assert {row.finish_reason for row in rows.values()} == {"stop"}
    assert sum("returns no token ids" in record.message for record in caplog.records) == 1
    with FakeServer(lambda _: (ids, "length"), tokenizer=tokenizer, send_ids=False) as server:
        rows = collect([server.url], tokenizer, requests)
    assert {(row.output_ids, row.finish_reason) for row in rows.values()} == {(tuple(ids), "length")}


@pytest.mark.parametrize(
    ("ids", "extra", "expected"),
    [
        ([5, 6], {}, (5, 6, EOS)),
        ([5, 6], {"stop_reason": None}, (5, 6, EOS)),
        ([5, 6], {"stop_reason": 60}, (5, 6, 60)),
        ([5, 6], {"matched_stop": 60}, (5, 6, 60)),
        ([5, 6, 60], {"stop_reason": 60}, (5, 6, 60)),
        ([5, 60, 7], {}, (5, 60)),
    ],
)
def test_the_end_token_is_added_once(tokenizer, ids, extra, expected):
    with FakeServer(lambda _: (ids, "stop"), extra=extra) as server:
        (row,) = collect([server.url], tokenizer, [Request(0, (9,))]).values()
    assert (row.output_ids, row.finish_reason) == (expected, "stop")


def test_a_server_that_is_down_is_named(tokenizer):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        with pytest.raises(LMTPError, match=f"No OpenAI-compatible server answers at {url}"):
            collect([url], tokenizer)


def test_the_model_is_found_by_its_name(tokenizer):
    with FakeServer(echo, names=["other", "tiny"]) as server:
        collect([server.url], tokenizer)
    assert {body["model"] for body in server.requests} == {"tiny"}


@pytest.mark.parametrize("name", ["/models/tiny", "tiny"])
def test_a_served_name_with_the_same_last_part_is_told(tokenizer, name, capsys, caplog):
    with FakeServer(echo, names=[name]) as server:
        collect([server.url], tokenizer, model="org/tiny")
    assert capsys.readouterr().out == f"engine: {server.url}/ serves {name}\n" and not caplog.records


def test_another_served_name_is_warned_of(tokenizer, caplog):
    with FakeServer(echo, names=["large"]) as one, FakeServer(echo, names=["tiny"]) as two:
        engine = ServerEngine([one.url, two.url], tokenizer, model="org/tiny")
        assert engine.facts() == {"served_model": ["large", "tiny"]} == engine.facts()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{one.url}/ serves large, but the prompts are tokenized for org/tiny: make sure that it is the same model."
    )


def test_rows_of_two_served_models_are_not_mixed(tokenizer, distill_model, prompts_file, tmp_path):
    def run(name, prompts=14):
        settings = Settings(str(distill_model), "s", tmp_path, "server", prompts_from_file(prompts_file)[:prompts])
        with FakeServer(lambda ids: (ANSWER_IDS, "stop"), names=[name]) as server:
            distill(settings, tokenizer, lambda: ServerEngine([server.url], tokenizer, model=str(distill_model)))
        return len(server.requests)

    journal = tmp_path / "s.raw.jsonl"
    assert run("first") == 14
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-3]))  # as if the run had been stopped
    with pytest.raises(LMTPError, match="was begun with served_model = 'first', now it is 'second'"):
        run("second")
    assert run("first") == 3
    assert run("second") == 0  # no row is missing, so nothing is asked


@pytest.mark.parametrize(("names", "words"), [(["a", "b"], "serves a, b, but not tiny"), ([], "serves no model")])
def test_a_model_that_is_not_served(tokenizer, names, words):
    with FakeServer(echo, names=names) as server, pytest.raises(LMTPError, match=f"{words}.*--served-model-name tiny"):
        collect([server.url], tokenizer)


def test_a_refusal_quotes_the_server(tokenizer):
    with FakeServer(echo, failures=10**6, status=400) as server, pytest.raises(LMTPError, match="out of order"):
        collect([server.url], tokenizer)


@pytest.mark.slow
@pytest.mark.skipif("LMTP_TEST_SERVER" not in os.environ, reason="LMTP_TEST_SERVER names no server with SmolLM2")
def test_a_real_server(smollm2, tmp_path):
    """Set LMTP_TEST_SERVER=http://host:port/v1 to a vLLM or SGLang server that serves SmolLM2 in float32."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["What is the capital of France?", "Name two colours.", "What is 12 + 30?"]))
    options = ["--prompts", prompts, "--max-new-tokens", 24, "--keep-truncated", "--output-dir", tmp_path]
    run_command(
        smollm2, "--name", "there", "--engine", "server", "--base-url", os.environ["LMTP_TEST_SERVER"], *options
    )
    run_command(smollm2, "--name", "here", *options)
    there, here = (
        sorted(read_rows(tmp_path / f"{name}.raw.jsonl"), key=lambda row: row["id"]) for name in ("there", "here")
    )
    assert [row["prompt_ids"] for row in there] == [row["prompt_ids"] for row in here]
    # the engines may differ at two nearly tied tokens, but not from the first tokens on
    assert [parse_ids(row["output_ids"])[:3] for row in there] == [parse_ids(row["output_ids"])[:3] for row in here]
    end = chat.load_tokenizer(str(smollm2)).eos_token_id
    for row in there:
        assert (parse_ids(row["output_ids"])[-1] == end) == (row["finish_reason"] == "stop")
