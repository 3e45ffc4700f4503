"""Refusals of lmtp-cli quality, before a model loads. tests/evaluation/quality/test_harness.py runs the command."""

import json
import sys
from importlib import import_module

import pytest
from helpers import benchmark_rows, tiny_models

from lmtp_factory.cli import main
from lmtp_factory.errors import LMTPError
from lmtp_factory.evaluation.quality import harness, models
from lmtp_factory.evaluation.quality.models import check_export
from lmtp_factory.evaluation.quality.scores import Answer


@pytest.fixture
def data(tmp_path):
    return benchmark_rows.save(tmp_path / "data")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch):
    def load(*_):
        raise AssertionError("a model was about to load")

    monkeypatch.setattr(models, "load_export", load)
    monkeypatch.setattr(models, "server_model", load)


@pytest.fixture
def harness_installed(monkeypatch):
    """Refusals behind that of a missing harness, where it is missing."""
    monkeypatch.setattr(harness, "check_installed", lambda: None)


def refusal(capsys, *arguments) -> str:
    assert main(["quality", *map(str, arguments)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("lmtp-cli quality: ")


def test_code_needs_a_yes(model, data, capsys):
    line = refusal(capsys, model, "--tasks", "gsm8k,humaneval,mbpp", "--data-dir", data)
    assert line == (
        "humaneval and mbpp run code that the model wrote: add --allow-code to run it in a sandbox, or leave it out of "
        "--tasks."
    )


def test_a_missing_harness_is_one_sentence(model, data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    line = refusal(capsys, model, "--tasks", "gsm8k", "--data-dir", data)
    assert line == (
        "lm-evaluation-harness is not installed (lm_eval is missing): run pip install '.[eval]' in the checkout, or "
        "pip install 'lm_eval[api]>=0.4.13,<0.5'."
    )


def test_the_sentence_names_what_setup_installs():
    from helpers.documents import ROOT

    assert '"eval": ["lm_eval[api]>=0.4.13,<0.5"]' in (ROOT / "setup.py").read_text("utf-8")


def test_options_that_do_not_fit(model, data, capsys):
    assert "Two models are labelled a" in refusal(capsys, f"a={model}", f"a={model}", "--data-dir", data)
    assert "--tasks names mmlu" in refusal(capsys, model, "--tasks", "mmlu", "--data-dir", data)
    url = "http://127.0.0.1:9/v1"
    assert "--base-url is for --engine server" in refusal(capsys, model, "--base-url", url, "--data-dir", data)
    server = ["--engine", "server", "--data-dir", data]
    needs = "--engine server needs --base-url once, or once for each of the 3 models in order."
    assert refusal(capsys, "a", "b", "c", *server) == needs
    assert refusal(capsys, "a", "b", "c", *server, "--base-url", url, "--base-url", url) == needs
    with pytest.raises(SystemExit):
        main(["quality", str(model), "--limit", "0"])


@pytest.mark.usefixtures("harness_installed")
def test_data_and_models_are_checked_first(model, data, capsys, tmp_path):
    missing = refusal(capsys, model, "--data-dir", tmp_path / "other")
    assert "is no directory" in missing
    heads = tmp_path / "stage1"
    (heads / "lmtp").mkdir(parents=True)
    assert "holds heads alone: write an export" in refusal(capsys, model, f"s={heads}", "--data-dir", data)
    assert refusal(capsys, tmp_path / "nothing", "--data-dir", data).startswith("No tokenizer can be loaded from")


@pytest.mark.usefixtures("harness_installed")
def test_a_server_that_is_down_or_serves_another_model(data, capsys):
    url = "http://127.0.0.1:9/v1"
    arguments = ["--engine", "server", "--base-url", url, "--data-dir", data]
    assert f"No OpenAI-compatible server answers at {url}" in refusal(capsys, "tiny", *arguments)


@pytest.mark.usefixtures("harness_installed")
def test_prompts_that_do_not_fit_are_refused(model, data, capsys, tmp_path):
    shorter = tiny_models.save_llama(tmp_path / "shorter", max_position_embeddings=64)
    capsys.readouterr()
    line = refusal(capsys, model, shorter, "--tasks", "math500", "--data-dir", data, "--max-new-tokens", "60")
    assert line.startswith("The prompt of m0 has ") and "reads 64: write --max-new-tokens " in line
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "math500.jsonl").write_text(json.dumps({"id": "m9", "instruction": "x y " * 400, "answer": "1"}))
    line = refusal(capsys, model, "--tasks", "math500", "--data-dir", rows, "--max-new-tokens", "16")
    assert line.startswith("The prompt of m9 has ") and line.endswith("reads 512: leave math500 out of --tasks.")


@pytest.mark.usefixtures("harness_installed")
def test_an_output_that_cannot_be_written_is_refused(model, data, capsys, tmp_path):
    (tmp_path / "file").touch()
    line = refusal(capsys, model, "--data-dir", data, "--max-new-tokens", "9", "--output-dir", tmp_path / "file")
    assert "cannot be written (Not a directory)" in line


@pytest.mark.usefixtures("harness_installed")
def test_the_scores_before_a_failure_are_printed(model, data, capsys, monkeypatch):
    def ask(name, problems, max_new_tokens):
        if name != "good":
            raise LMTPError("It failed.")
        return [Answer("math500", row["id"], "1", {"math500": True}) for rows in problems.values() for row in rows]

    monkeypatch.setattr(import_module("lmtp_factory.cli.quality"), "_versions", dict)
    monkeypatch.setattr(harness, "ask", ask)
    names = iter(["good", "bad"])
    monkeypatch.setattr(models, "load_export", lambda *_: next(names))
    arguments = [f"first={model}", f"second={model}", "--tasks", "math500", "--data-dir", data, "--max-new-tokens", "9"]
    assert main(["quality", *map(str, arguments)]) == 1
    printed = capsys.readouterr()
    assert "first  100.0 (" in printed.out and "first: 2 answers in " in printed.out and "second " not in printed.out
    assert printed.err == "lmtp-cli quality: It failed.\n"


def test_what_is_no_export(model, tmp_path):
    check_export(str(model))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(ValueError, match="holds no model"):
        check_export(str(adapter))
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter: write an export with llamafactory-cli export"):
        check_export(str(adapter))
    plain = tiny_models.save_llama(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        check_export(str(plain))
