"""Mistakes on the command line of `distill` end in one sentence before a model is loaded."""

import subprocess
import sys

import pytest
from helpers.distillation import distill

from lmtp_factory.cli import distill as cli
from lmtp_factory.errors import LMTPError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", -1], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--heldout", 1], "--heldout"),
        (["--engine", "server"], "--base-url"),
        (["--base-url", "http://localhost/v1"], "--engine server"),
        (["--name", "a/b"], "--name"),
        (["--name", ""], "--name"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--prompts", ""], "cannot be read"),
        (["--dataset", "nowhere", "--dataset-dir", "/nowhere"], "/nowhere"),
        ([], "No tokenizer"),
    ],
)
def test_wrong_options_are_refused_before_a_model_loads(options, words, tmp_path):
    with pytest.raises(LMTPError) as error:
        distill(tmp_path / "no-model", "--output-dir", tmp_path / "out", *options)
    sentence = str(error.value)
    assert words in sentence
    assert "\n" not in sentence and sentence.endswith(".")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-new-tokens", 0], "--max-new-tokens"),
        (["--max-prompt-tokens", -1], "--max-prompt-tokens"),
        (["--num-prompts", 0], "--num-prompts"),
        (["--batch-size", 0], "--batch-size"),
        (["--prompts", "p.json", "--dataset", "d"], "not allowed with"),
    ],
)
def test_wrong_numbers_are_refused_by_the_parser(options, words, capsys):
    with pytest.raises(SystemExit):
        distill("model", *options)
    assert words in capsys.readouterr().err


def test_a_broken_dataset_info_is_found_before_generating(distill_model, prompts_file, tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{")
    monkeypatch.setattr(cli, "_engine", None)
    with pytest.raises(LMTPError, match="dataset_info.json"):
        distill(distill_model, "--prompts", prompts_file, "--output-dir", tmp_path)


def test_an_output_dir_that_cannot_be_made(distill_model, prompts_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LMTPError, match="--output-dir"):
        distill(distill_model, "--prompts", prompts_file, "--output-dir", tmp_path / "file" / "out")


def test_no_prompt_fits(distill_model, prompts_file, tmp_path):
    with pytest.raises(LMTPError, match="--max-prompt-tokens"):
        distill(distill_model, "--prompts", prompts_file, "--output-dir", tmp_path, "--max-prompt-tokens", 3)


def test_filters_that_leave_nothing(distill_model, prompts_file, tmp_path, capsys):
    options = ["--max-new-tokens", 4, "--name", "n", "--output-dir", tmp_path]
    with pytest.raises(LMTPError, match="No row passes"):
        distill(distill_model, "--prompts", prompts_file, *options)
    assert "14 too short" in capsys.readouterr().out
    assert not (tmp_path / "n.jsonl").exists()


def test_importing_the_command_loads_no_torch():
    code = (
        "import sys, lmtp_factory.cli.distill; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'openai', 'llamafactory')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
