"""The real lm-evaluation-harness: scripted answers are scored, and models answer by themselves and through a server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import benchmark_rows, chat_models, tiny_models
from helpers import llamafactory_runs as runs
from helpers.api_server import running_api

from lmtp_factory.cli import main
from lmtp_factory.errors import LMTPError
from lmtp_factory.evaluation.quality.benchmarks import BENCHMARKS
from lmtp_factory.evaluation.quality.code_sandbox import check_sandbox
from lmtp_factory.evaluation.quality.harness import ask
from lmtp_factory.evaluation.quality.models import check_lengths, check_served, load_export


pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'")
pytestmark = pytest.mark.slow

TASKS = ("gsm8k", "math500")
PROBLEMS = {benchmark: benchmark_rows.ROWS[name] for name, benchmark in BENCHMARKS.items()}


@pytest.fixture
def all_tasks():
    """Tasks that can run here."""
    try:
        check_sandbox()
    except LMTPError as error:
        pytest.skip(str(error))
    return ",".join(BENCHMARKS)


def scripted(answers):
    """A model of lm_eval that knows an answer to each prompt, and that records what it is asked."""
    from lm_eval.api.model import LM

    class Scripted(LM):
        tokenizer_name = "scripted"

        def __init__(self):
            super().__init__()
            self.asked = {}

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            (turn,) = chat_history
            assert turn["role"] == "user" and add_generation_prompt
            return turn["content"]

        def generate_until(self, requests):
            self.asked |= {request.args[0]: request.args[1] for request in requests}
            return [answers[request.args[0]] for request in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Scripted()


def score(name, texts):
    """Scores of scripted answers to the rows of one benchmark."""
    benchmark, rows = BENCHMARKS[name], benchmark_rows.ROWS[name][: len(texts)]
    model = scripted({benchmark.prompt(row): text for row, text in zip(rows, texts)})
    answers = ask(model, {benchmark: rows}, max_new_tokens=7)
    assert [(answer.id, answer.text) for answer in answers] == [(row["id"], text) for row, text in zip(rows, texts)]
    for options in model.asked.values():
        assert options["do_sample"] is False and options["max_gen_toks"] == 7 and options["repetition_penalty"] == 1.0
    return answers


@pytest.mark.parametrize(
    ("text", "strict", "last"),
    [
        ("He leaps 3 * 4 = 12.\n#### 12", True, True),
        ("#### 12.", True, True),
        ("The answer is 12", False, True),
        ("It is $12.", False, True),
        ("It is: $\\boxed{12}$", False, True),
        ("So $12 \\text{ frogs}$.", False, True),
        ("12 it is, not 13", False, False),
        ("#### 13, not 12", False, True),
        ("no number", False, False),
        ("", False, False),
    ],
)
def test_gsm8k(text, strict, last):
    (answer,) = score("gsm8k", [text])
    assert answer.scores == {"gsm8k": strict, "gsm8k last number": last}


def test_gsm8k_reads_numbers_of_several_digits():
    answers = score("gsm8k", ["so #### 12", "#### 750", "#### 1,200"])
    assert all(answer.scores["gsm8k"] and answer.scores["gsm8k last number"] for answer in answers)


@pytest.mark.parametrize(
    ("text", "right", "reason"),
    [
        ("Half: $\\boxed{\\frac{1}{2}}$.", True, ""),
        ("\\boxed{\\dfrac12}", True, ""),
        ("\\boxed{1/2}", True, ""),
        ("First \\boxed{3}, then \\boxed{0.5}", True, ""),
        ("\\boxed{0.5}, or rather \\boxed{3}", False, ""),
        ("It is \\frac{1}{2}.", False, "no \\boxed answer"),
        ("\\boxed{\\frac{1}{2}", False, "no \\boxed answer"),
        ("\\fbox{0.5}", False, "no \\boxed answer"),
    ],
)
def test_math500(text, right, reason):
    (answer,) = score("math500", [text])
    assert (answer.scores, answer.reason) == ({"math500": right}, reason)


@pytest.mark.usefixtures("all_tasks")
def test_code():
    texts = ["```python\ndef area(r):\n    return math.pi * r * r\n```", "    return n + n + 1"]
    right, wrong = score("humaneval", texts)
    assert right.scores == {"humaneval": True}
    assert (wrong.scores, wrong.reason) == ({"humaneval": False}, "AssertionError")
    right, wrong = score("mbpp", ["def add(a, b):\n    return a + b", "I cannot."])
    assert right.scores == {"mbpp": True}
    assert wrong.scores == {"mbpp": False} and wrong.reason.startswith("SyntaxError")


def results(directory):
    return json.loads((directory / "quality.json").read_text())


def answers(directory, model):
    lines = map(json.loads, (directory / "answers.jsonl").read_text().splitlines())
    return [(line["task"], line["id"], line["text"]) for line in lines if line["model"] == model]


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """A tiny model whose answers differ from each other."""
    return tiny_models.save_llama(tmp_path_factory.mktemp("models") / "talkative", initializer_range=0.3)


def test_base_and_stage_1_exports_agree_exactly(talkative, data, all_tasks, tmp_path, capsys):
    """Stage 1 trains heads alone, so the exports are the base, with and without heads."""
    stage1, models = tmp_path / "stage1", [f"base={talkative}"]
    runs.train(talkative, data, stage1)
    for kind in ("ntp", "heads", "custom_generate"):
        runs.export(
            model_name_or_path=talkative, stage1_pretrained_path=stage1, export_dir=tmp_path / kind, lmtp_export=kind
        )
        models.append(str(tmp_path / kind))
    assert (tmp_path / "heads" / "lmtp" / "model.safetensors").is_file()
    rows, output = benchmark_rows.save(tmp_path / "rows"), tmp_path / "out"
    options = ["--tasks", all_tasks, "--data-dir", str(rows), "--allow-code", "--output-dir", str(output)]
    assert main(["quality", *models, *options, "--max-new-tokens", "24", "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" and base: all answers are equal.") == 3
    written = results(output)
    assert {name: task["rows"] for name, task in written["tasks"].items()} == {
        name: len(rows) for name, rows in benchmark_rows.ROWS.items()
    }
    base, *exports = (model["scores"] for model in written["models"].values())
    assert set(base) == {"gsm8k", "gsm8k last number", "math500", "humaneval", "mbpp"} and exports == [base] * 3
    texts = [text for _, _, text in answers(output, "base")]
    assert len(texts) == 9 and len(set(texts)) == 9
    assert [(task, id) for task, id, _ in answers(output, "ntp")] == [
        (name, row["id"]) for name, rows in benchmark_rows.ROWS.items() for row in rows
    ]


def test_another_model_answers_otherwise(talkative, llama, tmp_path, capsys):
    """Or the test above would prove little."""
    rows = benchmark_rows.save(tmp_path / "rows")
    assert main(["quality", f"base={llama}", str(talkative), "--data-dir", str(rows), "--max-new-tokens", "8"]) == 0
    assert "5 of 5 answers differ." in capsys.readouterr().out


def test_the_models_own_sampling_is_off(tmp_path):
    from transformers import GenerationConfig

    path = tiny_models.save_llama(tmp_path / "model", initializer_range=0.3)
    problems = {BENCHMARKS["gsm8k"]: benchmark_rows.GSM8K}
    plain = ask(load_export(str(path), 2), problems, 12)
    config = GenerationConfig.from_pretrained(path)
    GenerationConfig(
        **{name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        do_sample=True,
        temperature=2.0,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[5, 6, 7],
        num_beams=2,
        max_new_tokens=2,
    ).save_pretrained(path)
    assert ask(load_export(str(path), 2), problems, 12) == plain


def test_lengths_are_those_of_the_harness(llama):
    """They are checked without it, before a model loads: tests/cli/test_quality.py."""
    model, row = load_export(str(llama), 1), benchmark_rows.MATH500[0]
    problems = {BENCHMARKS["math500"]: [row]}
    text = model.apply_chat_template([{"role": "user", "content": BENCHMARKS["math500"].prompt(row)}])
    tokens = len(model.tok_encode(text))
    check_lengths(str(llama), problems, model.max_length - tokens)
    with pytest.raises(
        LMTPError, match=rf"The prompt of m0 has {tokens} tokens, and the model reads 512: write --max-new-tokens"
    ):
        check_lengths(str(llama), problems, model.max_length - tokens + 1)


def test_a_server(tmp_path, capsys):
    """Its answers are those of LLaMA-Factory's own engine."""
    model = chat_models.save_ending(tmp_path / "model")
    data = benchmark_rows.save(tmp_path / "data")
    options = ["--data-dir", str(data), "--max-new-tokens", "16", "--engine", "server", "--output-dir", str(tmp_path)]
    with running_api(model, tmp_path, API_MODEL_NAME="tiny") as (url, _):
        assert main(["quality", "ours=tiny", *options, "--base-url", url]) == 0
        with pytest.raises(
            LMTPError, match=f"{url} serves tiny, but not large: start it with --served-model-name large"
        ):
            check_served(url, "large")
    engine = chat_models.chat_model(model, max_new_tokens=16)
    expected = [
        engine.chat([{"role": "user", "content": BENCHMARKS[name].prompt(row)}])[0].response_text
        for name in TASKS
        for row in benchmark_rows.ROWS[name]
    ]
    assert [text for _, _, text in answers(tmp_path, "ours")] == expected
    assert results(tmp_path)["engine"] == "server"


class FailingServer(BaseHTTPRequestHandler):
    """Lists a model and refuses to answer."""

    def respond(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        model = {"id": "tiny", "object": "model", "created": 0, "owned_by": "us"}
        self.respond(200, {"object": "list", "data": [model]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.respond(400, {"error": {"message": "prompt too long"}})

    def log_message(self, *_):
        pass


def test_a_server_that_refuses_is_a_sentence(tmp_path, capsys, caplog):
    data = benchmark_rows.save(tmp_path / "data")
    with ThreadingHTTPServer(("127.0.0.1", 0), FailingServer) as server:
        server.handle_error = lambda *_: None  # requests that the client gives up
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        assert main(["quality", "tiny", "--data-dir", str(data), "--engine", "server", "--base-url", url]) == 1
        server.shutdown()
    assert "lmtp-cli quality: The server refuses a request or has stopped (400" in capsys.readouterr().err
    assert "prompt too long" in caplog.text
