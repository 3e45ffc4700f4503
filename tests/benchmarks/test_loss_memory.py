"""The command of benchmarks/loss_memory.py on sizes that take no time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loss_memory.py"


@pytest.mark.slow
def test_one_axis(tmp_path):
    numbers, plot = tmp_path / "loss.json", tmp_path / "loss.png"
    options = (
        "--sweep heads --heads 2 10000000 --tokens 1024 --vocab 8192 --hidden 32 --rounds 1 --device cpu --masked 0.5"
    )
    command = [sys.executable, SCRIPT, *options.split(), "--arms", "eager", "torch", "triton"]
    done = subprocess.run(
        [*command, "--json", numbers, "--plot", plot],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(numbers.read_text())
    small, large = (entry["arms"] for entry in report["points"])

    eager, ours = small["eager"], small["torch"]
    assert eager["memory_over_eager"] == eager["time_over_eager"] == 1
    assert eager["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert eager["gradient_bytes"] == ours["gradient_bytes"] == 4 * 2 * (8192 * 32 + 32 * 32 + 32)
    assert ours["time_over_eager"] == pytest.approx(ours["seconds"] / eager["seconds"])
    assert small["triton"]["open"] == "needs CUDA"
    assert "open (needs CUDA)" in done.stdout
    # The logits of all tokens take 32 MiB: eager holds four such blocks, ours half a one.
    if eager["peak_bytes"] is not None:  # Linux
        assert eager["peak_bytes"] == pytest.approx(eager["needs_bytes"], rel=0.15)
        assert ours["memory_over_eager"] == pytest.approx(ours["peak_bytes"] / eager["peak_bytes"])
        assert 0.05 < ours["memory_over_eager"] < 0.35

    # 10 million heads fit nowhere.
    assert "(10,000,000 heads + 2 gradients) x 1,024 tokens x 8,192 logits x 4 bytes" in large["eager"]["skipped"]
    assert large["eager"]["needs_bytes"] == pytest.approx(1e7 * 1024 * (8192 + 2 * 32) * 4, rel=1e-3)
    assert large["torch"]["memory_over_eager_is_computed"] and not ours["memory_over_eager_is_computed"]
    assert plot.stat().st_size > 10_000
