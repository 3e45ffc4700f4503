"""Mistakes on the command line of `distill` cost one sentence and no model."""

import pytest
from tiny_model import parse

from lmtp_factory.cli import distill as cli
from lmtp_factory.errors import LMTPError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-new-tokens", 0], "--max-new-tokens"),
        (["--max-prompt-tokens", -1], "--max-prompt-tokens"),
        (["--num-prompts", 0], "--num-prompts"),
        (["--batch-size", 0], "--batch-size"),
        (["--limit", 0], "--limit"),
        (["--concurrency", 0], "--concurrency"),
        (["--temperature", -1], "--temperature"),
        (["--prompt-temperature", 0], "--prompt-temperature"),
        (["--top-p", 0], "--top-p"),
        (["--prompt-top-p", 1.5], "--prompt-top-p"),
        (["--seed", -1], "--seed"),
        (["--heldout", 1], "--heldout"),
        (["--loop-repeats", 1], "--loop-repeats"),
        (["--engine", "server"], "--base-url"),
        (["--base-url", "http://localhost/v1"], "--engine server"),
        (["--name", "a/b"], "--name"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--dataset", "nowhere", "--dataset-dir", "/nowhere"], "nowhere"),
        ([], "no tokenizer"),
    ],
)
def test_mistakes(options, words, tmp_path):
    with pytest.raises(LMTPError) as error:
        cli.run(parse(tmp_path / "no-model", "--output-dir", tmp_path / "out", *options))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_prompts_come_from_one_place(tmp_path):
    with pytest.raises(SystemExit):
        parse("model", "--prompts", "p.json", "--dataset", "d")


def test_a_broken_dataset_info_is_found_before_generating(tiny, prompts_file, tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{")
    monkeypatch.setattr(cli, "_engine", None)
    with pytest.raises(LMTPError, match="dataset_info.json"):
        cli.run(parse(tiny, "--prompts", prompts_file, "--output-dir", tmp_path))


def test_an_output_dir_that_cannot_be_made(tiny, prompts_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LMTPError, match="--output-dir"):
        cli.run(parse(tiny, "--prompts", prompts_file, "--output-dir", tmp_path / "file" / "out"))


def test_no_prompt_fits(tiny, prompts_file, tmp_path):
    with pytest.raises(LMTPError, match="--max-prompt-tokens"):
        cli.run(parse(tiny, "--prompts", prompts_file, "--output-dir", tmp_path, "--max-prompt-tokens", 3))


def test_filters_that_leave_nothing(tiny, prompts_file, tmp_path, capsys):
    options = ["--max-new-tokens", 4, "--min-tokens", 100, "--name", "n", "--output-dir", tmp_path]
    with pytest.raises(LMTPError, match="no row passes"):
        cli.run(parse(tiny, "--prompts", prompts_file, *options))
    assert "14 too short" in capsys.readouterr().out
    assert not (tmp_path / "n.jsonl").exists()
