"""The command of benchmarks/stage_throughput.py on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_models


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stage_throughput.py"
ARMS = ("stage 1, naive", "stage 1", "stage 1, cached", "stage 1, cached, draft vocabulary", "stage 2", "SFT")


@pytest.mark.slow
def test_both_stages(tmp_path):
    model = tiny_models.save_llama(tmp_path / "model")
    rows = [{"prompt_ids": "40 41 42", "output_ids": " ".join("50" for _ in range(4 + 9 * i))} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    numbers, plot = tmp_path / "stages.json", tmp_path / "stages.png"
    options = [
        "--rows",
        tmp_path / "rows.jsonl",
        "--batch",
        "2",
        "4",
        "--steps",
        "1",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--draft-vocab",
        "20",
    ]
    command = [sys.executable, SCRIPT, model, *options, "--arms", *ARMS, "--json", numbers, "--plot", plot]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    report = json.loads(numbers.read_text())
    assert [entry["setting"]["batch"] for entry in report["batches"]] == [2, 4]
    for entry in report["batches"]:
        arms = entry["arms"]
        assert set(arms) == set(ARMS) and all(row["tokens_per_second"] > 0 for row in arms.values())
        naive, ours = arms["stage 1, naive"], arms["stage 1"]
        assert naive["speed over stage 1, naive"] == 1
        assert ours["speed over stage 1, naive"] == pytest.approx(
            ours["tokens_per_second"] / naive["tokens_per_second"]
        )
        assert "speed over SFT" in arms["stage 2"]
    assert plot.stat().st_size > 10_000
    assert "4 documents a step, 3 own heads, fp32" in done.stdout
