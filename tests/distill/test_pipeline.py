"""What a run asks, how it resumes, and what it writes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers.distillation import distill as run_command
from helpers.distillation import read_rows
from helpers.scripted_engine import ANSWER, ScriptedEngine

from lmtp_factory.cli import distill as cli
from lmtp_factory.distill.hf_engine import HFEngine
from lmtp_factory.distill.pipeline import Settings, distill
from lmtp_factory.distill.prompts import build_prompt
from lmtp_factory.errors import LMTPError


PROMPTS = ["tell me", "tell me", "tell me about tokens", "tell me about heads " * 50, "tell me more"]


@pytest.fixture
def scripted(distill_model, tmp_path, tokenizer):
    """Distill with a scripted engine; returns the files and the engine."""
    # the words of the script would contain some of the tiny model's many end tokens
    model = tmp_path / "model"
    shutil.copytree(distill_model, model)
    (model / "generation_config.json").unlink()

    def run(prompts, **options):
        engine = ScriptedEngine(tokenizer)
        settings = Settings(
            model=str(model),
            name="d",
            output_dir=tmp_path / "out",
            prompts=[build_prompt(prompt) for prompt in prompts],
            max_prompt_tokens=200,
            **options,
        )
        return distill(settings, tokenizer, lambda: engine), engine

    return run


def test_duplicates_and_long_prompts_are_left_out(scripted, capsys):
    (path,), _ = scripted(PROMPTS)
    rows = read_rows(path)
    assert [row["instruction"] for row in rows] == ["tell me", "tell me about tokens", "tell me more"]
    assert {row["output"] for row in rows} == {ANSWER}
    assert "3 to answer (dropped: 1 duplicate, 1 too long)" in capsys.readouterr().out


def test_num_prompts_takes_the_first_of_given_prompts(scripted):
    (path,), engine = scripted(PROMPTS, num_prompts=2)
    assert [row["instruction"] for row in read_rows(path)] == ["tell me", "tell me about tokens"]
    assert len(engine.asked) == 2


def test_heldout_makes_two_datasets(scripted, capsys):
    topics = ["birds", "trains", "soup", "chess", "rivers", "maps", "paint", "glass", "wool", "bells", "ice", "salt"]
    paths, _ = scripted([f"{topic} {topic} {topic} please" for topic in topics], heldout=0.25)
    assert [path.name for path in paths] == ["d_train.jsonl", "d_heldout.jsonl"]
    assert [len(read_rows(path)) for path in paths] == [9, 3]
    assert "dataset: d_train, eval_dataset: d_heldout" in capsys.readouterr().out


def test_a_share_that_leaves_no_row_is_refused(scripted):
    with pytest.raises(LMTPError, match="leaves one part empty"):
        scripted(PROMPTS, heldout=0.01)


class Interrupted(Exception):
    pass


def test_a_resumed_run_writes_what_an_uninterrupted_one_writes(distill_model, prompts_file, tmp_path, monkeypatch):
    options = ["--prompts", prompts_file, "--max-new-tokens", 16, "--temperature", 1, "--batch-size", 3]
    options += ["--keep-truncated", "--name", "d"]
    run_command(distill_model, "--output-dir", tmp_path / "whole", *options)

    generate_batch = HFEngine._generate_batch
    batches = []

    def fail_at_third(self, batch, *rest):
        batches.append([request.id for request in batch])
        if len(batches) == 3:
            raise Interrupted
        return generate_batch(self, batch, *rest)

    monkeypatch.setattr(HFEngine, "_generate_batch", fail_at_third)
    again = [distill_model, "--output-dir", tmp_path / "parts", *options]
    with pytest.raises(Interrupted):
        run_command(*again)
    journal = tmp_path / "parts" / "d.raw.jsonl"
    assert len(read_rows(journal)) == 6
    assert not (tmp_path / "parts" / "d.jsonl").exists()
    journal.write_bytes(journal.read_bytes()[:-20])  # an incomplete row of the second batch

    run_command(*again)
    assert batches[3:5] == batches[1:3]  # the batch that lost a row is generated whole
    assert len(batches) == 3 + 4
    assert len(read_rows(journal)) == 14
    dataset = (tmp_path / "whole" / "d.jsonl").read_bytes()
    assert dataset.count(b"\n") > 5
    assert (tmp_path / "parts" / "d.jsonl").read_bytes() == dataset

    monkeypatch.setattr(cli, "_engine", None)  # no row is missing, so no model is loaded
    run_command(*again)
    with pytest.raises(LMTPError, match="max_new_tokens = 16, now it is 17"):
        run_command(*again, "--max-new-tokens", 17)
    with pytest.raises(LMTPError, match="prompts = "):
        run_command(*again, "--num-prompts", 5)


@pytest.mark.slow
def test_a_killed_run_is_resumed(distill_model, prompts_file, tmp_path):
    """A run killed twice while it writes rows ends with the rows of an undisturbed run."""
    options = ["--prompts", prompts_file, "--max-new-tokens", 200, "--temperature", 1, "--batch-size", 1, "--name", "d"]
    run_command(distill_model, "--output-dir", tmp_path / "whole", *options)
    code = "import sys; from lmtp_factory.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "distill", distill_model, "--output-dir", tmp_path / "killed", *options]
    command = [str(argument) for argument in command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    journal = tmp_path / "killed" / "d.raw.jsonl"
    for rows in (3, 7):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        try:
            until = time.monotonic() + 300
            while not journal.exists() or journal.read_bytes().count(b"\n") < 1 + rows:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (tmp_path / "killed" / "d.jsonl").exists()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert sorted(row["id"] for row in read_rows(journal)) == list(range(14))
    assert (tmp_path / "killed" / "d.jsonl").read_bytes() == (tmp_path / "whole" / "d.jsonl").read_bytes()


def test_the_advice_about_long_answers_works(distill_model, prompts_file, tmp_path):
    """The journal of the same name belongs to the old length."""
    options = [
        distill_model,
        "--output-dir",
        tmp_path,
        "--prompts",
        prompts_file,
        "--num-prompts",
        4,
        "--temperature",
        1,
    ]
    with pytest.raises(LMTPError, match="--keep-truncated, or a larger --max-new-tokens and another --name"):
        run_command(*options, "--name", "short", "--max-new-tokens", 2)
    run_command(*options, "--name", "long", "--max-new-tokens", 64, "--keep-truncated")
    assert read_rows(tmp_path / "long.raw.jsonl")


def test_no_prompt_is_left(scripted):
    with pytest.raises(LMTPError, match="give more prompts, or write a larger --max-prompt-tokens and another --name"):
        scripted(["tell me about heads " * 50])
