"""Distillation in this process: the model's own tokens, the same after an interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_model import SYSTEM, parse

from lmtp_factory.cli import distill as cli
from lmtp_factory.distill.engine import Request
from lmtp_factory.distill.hf_engine import HFEngine, plan_batches
from lmtp_factory.distill.rows import parse_ids
from lmtp_factory.errors import LMTPError


LOOSE = ["--keep-truncated", "--min-tokens", 0, "--min-distinct", 0, "--loop-span", 10_000]


def test_batches_hold_everything_once_and_fit():
    requests = [Request(number, tuple(range(1 + number * 7 % 23))) for number in range(50)]
    batches = plan_batches(requests, max_new_tokens=10, batch_size=None, token_budget=100)
    assert sorted(request.id for batch in batches for request in batch) == list(range(50))
    for batch in batches:
        assert (max(len(request.prompt_ids) for request in batch) + 10) * len(batch) <= 100
    assert plan_batches(requests[::-1], max_new_tokens=10, batch_size=None, token_budget=100) == batches
    assert [len(batch) for batch in plan_batches(requests, max_new_tokens=10, batch_size=24, token_budget=1)] == [
        24,
        24,
        2,
    ]


def greedy(model, ids, stops, limit):
    """The plainest greedy decoding: no cache, no batch, no generate()."""
    ids, output = list(ids), []
    while len(output) < limit:
        with torch.inference_mode():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        output.append(token)
        if token in stops:
            break
    return output


def test_greedy_rows_are_the_models_own_tokens(tiny, prompts_file, tmp_path, distil, tokenizer):
    rows = distil(
        tiny, "--prompts", prompts_file, "--name", "g", "--output-dir", tmp_path, "--max-new-tokens", 20, *LOOSE
    )["g"]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    stops = {2, *range(40, len(tokenizer), 20)}
    assert len(rows) == 14
    assert [row["id"] for row in rows] == list(range(14))
    for row in rows:
        prompt = parse_ids(row["prompt_ids"])
        text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{row['instruction']}<|im_end|>\n"
        assert tokenizer.decode(prompt) == text + "<|im_start|>assistant\n"
        assert parse_ids(row["output_ids"]) == greedy(model, prompt, stops, 20)
        assert row["output"] == tokenizer.decode(parse_ids(row["output_ids"]), skip_special_tokens=True)


def test_a_system_text_replaces_the_default(tiny, prompts_file, tmp_path, distil, tokenizer):
    options = [
        "--name",
        "s",
        "--output-dir",
        tmp_path,
        "--max-new-tokens",
        2,
        "--limit",
        1,
        "--system",
        "Rhyme.",
        *LOOSE,
    ]
    (row,) = distil(tiny, "--prompts", prompts_file, *options)["s"]
    assert tokenizer.decode(parse_ids(row["prompt_ids"])).startswith(
        "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user"
    )


def test_a_base_model_continues_the_plain_text(tiny, prompts_file, tmp_path, distil, tokenizer):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "chat_template.jinja").unlink()
    options = ["--output-dir", tmp_path / "out", "--max-new-tokens", 2, "--limit", 2, *LOOSE]
    for row in distil(base, "--prompts", prompts_file, "--name", "b", *options)["b"]:
        assert parse_ids(row["prompt_ids"]) == tokenizer(row["instruction"])["input_ids"]
    with pytest.raises(LMTPError, match="--prompts FILE"):
        distil(base, "--name", "c", *options)


def test_sampling_depends_on_the_seed_only(tiny, prompts_file, tmp_path, distil):
    def outputs(name, *options):
        options = [*options, "--output-dir", tmp_path, "--max-new-tokens", 8, "--temperature", 1, *LOOSE]
        return [row["output_ids"] for row in distil(tiny, "--prompts", prompts_file, "--name", name, *options)[name]]

    torch.manual_seed(1)
    first = outputs("a", "--seed", 3)
    torch.manual_seed(2)
    assert outputs("b", "--seed", 3) == first
    assert outputs("c", "--seed", 4) != first
    assert len(set(first)) > 10


class Interrupted(Exception):
    pass


def test_a_resumed_run_writes_what_an_uninterrupted_one_writes(tiny, prompts_file, tmp_path, monkeypatch):
    options = ["--prompts", prompts_file, "--max-new-tokens", 16, "--temperature", 1, "--batch-size", 3, *LOOSE]
    assert cli.run(parse(tiny, "--name", "d", "--output-dir", tmp_path / "whole", *options)) == 0

    whole_batch = HFEngine._generate_batch
    asked = []

    def failing(self, batch, *rest):
        asked.append([request.id for request in batch])
        if len(asked) == 3:
            raise Interrupted
        return whole_batch(self, batch, *rest)

    monkeypatch.setattr(HFEngine, "_generate_batch", failing)
    again = parse(tiny, "--name", "d", "--output-dir", tmp_path / "parts", *options)
    with pytest.raises(Interrupted):
        cli.run(again)
    raw = tmp_path / "parts" / "d.raw.jsonl"
    assert len(raw.read_text().splitlines()) == 1 + 6
    assert not (tmp_path / "parts" / "d.jsonl").exists()
    raw.write_bytes(raw.read_bytes()[:-20])  # the last row of the second batch is torn

    assert cli.run(again) == 0
    assert asked[3:5] == asked[1:3]  # the batch that lost a row is generated whole, like the first time
    assert len(asked) == 3 + 4
    assert len(raw.read_text().splitlines()) == 1 + 14
    assert (tmp_path / "parts" / "d.jsonl").read_bytes() == (tmp_path / "whole" / "d.jsonl").read_bytes()

    monkeypatch.setattr(cli, "_engine", None)  # nothing is left to do: no model is loaded
    assert cli.run(again) == 0
    with pytest.raises(LMTPError, match="max_new_tokens = 16, now it is 17"):
        cli.run(parse(tiny, "--name", "d", "--output-dir", tmp_path / "parts", *options, "--max-new-tokens", 17))
    with pytest.raises(LMTPError, match="prompts = "):
        cli.run(parse(tiny, "--name", "d", "--output-dir", tmp_path / "parts", *options, "--limit", 5))


@pytest.mark.slow
def test_a_killed_run_goes_on(tiny, prompts_file, tmp_path):
    """SIGKILL while rows are being written, twice; the end is that of a run that nobody killed."""
    options = ["--prompts", prompts_file, "--max-new-tokens", 200, "--temperature", 1, "--batch-size", 1, *LOOSE]
    assert cli.run(parse(tiny, "--name", "d", "--output-dir", tmp_path / "whole", *options)) == 0
    code = "import sys; from tiny_model import cli, parse; cli.run(parse(*sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    arguments = [str(argument) for argument in [tiny, "--name", "d", "--output-dir", tmp_path / "killed", *options]]
    command = [sys.executable, "-c", code, *arguments]
    raw = tmp_path / "killed" / "d.raw.jsonl"
    for rows in (3, 7):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        try:
            until = time.monotonic() + 120
            while not raw.exists() or raw.read_bytes().count(b"\n") < 1 + rows:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (tmp_path / "killed" / "d.jsonl").exists()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    ids = [json.loads(line)["id"] for line in raw.read_text().splitlines()[1:]]
    assert sorted(ids) == list(range(14))
    assert (tmp_path / "killed" / "d.jsonl").read_bytes() == (tmp_path / "whole" / "d.jsonl").read_bytes()


def test_a_prompt_is_answered_once(tiny, tmp_path, distil, capsys):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["tell me", {"instruction": "tell me"}, "tell me more"]))
    options = ["--prompts", prompts, "--output-dir", tmp_path, "--max-new-tokens", 2, *LOOSE]
    assert [row["instruction"] for row in distil(tiny, "--name", "d", *options)["d"]] == ["tell me", "tell me more"]
    assert "1 duplicate" in capsys.readouterr().out
