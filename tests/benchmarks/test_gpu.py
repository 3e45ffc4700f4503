"""`make gpu` at toy size, without the packages that a machine with torch and transformers may lack."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_models


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MISSING = ("accelerate", "bitsandbytes", "datasets", "deepspeed", "gradio", "llamafactory", "matplotlib", "peft", "trl")


@pytest.fixture
def environment(tmp_path):
    """Variables with which Python finds none of the missing packages, in child processes too."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({MISSING}))\n")
    return os.environ | {
        "PYTHONPATH": f"{folder}:{BENCHMARKS.parent}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def rows(count):
    lines = [
        {"prompt_ids": "40 41 42", "output_ids": " ".join(str(50 + (i + j) % 9) for j in range(12))}
        for i in range(count)
    ]
    return "\n".join(map(json.dumps, lines)) + "\n"


def run(environment, *words):
    return subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_part_runs_and_is_kept(tmp_path, environment):
    model, folder = tiny_models.save_llama(tmp_path / "model"), tmp_path / "gpu_run"
    train, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    train.write_text(rows(8))
    heldout.write_text(rows(2))
    command = [BENCHMARKS / "gpu.py", model, "--rows", train, "--heldout", heldout, "--output-dir", folder]

    first = run(environment, *command, "--steps", "loss", "stages", "--minutes", "0")
    assert first.returncode == 0, first.stderr
    assert "parts are left: run the same command again." in first.stdout

    done = run(environment, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("All parts are done.\n")
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*-*.json")}
    assert found["loss-256-own"]["values"]["torch"]["gradients"] < 1e-5
    assert found["stages-sdpa-2"]["tuning of stage 2"] == "full"
    assert found["stages-sdpa-2"]["arms"]["stage 2"]["tokens_per_second"] > 0
    assert found["stages-flash_attention_2-2"] == {
        "open": "needs the package flash_attn",
        "seconds of the part": found["stages-flash_attention_2-2"]["seconds of the part"],
    }
    assert found["heads-02-passes"]["training tokens"] == 2 * 8 * 12
    for row in found["decoding-trees-4"]["rows"]:
        assert row["differing"] == 0, row
        assert row["tokens_per_second"] > 0
        assert (row["tau"] == 1) if row["name"].startswith(("stock", "our loop")) else (row["tau"] >= 1), row
    assert found["decoding-trees-4"]["margins where answers part"] == {}
    assert set(found["decoding-batch-2"]["rows"]) == {"stock generate", "our loop, no heads", "dynamic 4"}

    written = {path: path.stat().st_mtime_ns for path in folder.glob("*-*.json")}
    assert run(environment, *command).returncode == 0
    assert written == {path: path.stat().st_mtime_ns for path in folder.glob("*-*.json")}

    page = run(environment, BENCHMARKS / "gpu_report.py", folder)
    assert page.returncode == 0, page.stderr
    assert "Every part ran at toy size" in page.stdout
    assert "Not measured." not in page.stdout
    assert "Left out: needs the package flash_attn." in page.stdout

    heldout.write_text(rows(3))
    other = run(environment, *command)
    assert other.returncode == 1
    assert "names another machine, model or text" in other.stderr
