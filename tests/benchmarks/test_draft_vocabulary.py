"""The command of benchmarks/draft_vocabulary.py on sizes that take no time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "draft_vocabulary.py"
VOCAB, DRAFTED, HIDDEN = 65536, 1024, 64


@pytest.mark.slow
def test_own_unembeddings(tmp_path):
    numbers = tmp_path / "numbers.json"
    sizes = f"--vocab {VOCAB} --draft-vocab {DRAFTED} --hidden {HIDDEN} --tokens 256"
    options = [*sizes.split(), "--head-kind", "own", "--rounds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options, numbers],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    whole, cut = json.loads(numbers.read_text())["rows"]

    assert (whole["draft vocabulary"], cut["draft vocabulary"]) == (VOCAB, DRAFTED)
    # Three heads; the blocks are the same.
    assert whole["head parameters"] - cut["head parameters"] == 3 * (VOCAB - DRAFTED) * HIDDEN
    if whole["step bytes"] is not None:  # Linux
        # Gradients and both of AdamW's states in fp32, and the loss.
        assert whole["step bytes"] > 3 * 4 * whole["head parameters"]
        assert cut["step bytes"] < 0.2 * whole["step bytes"]
    assert f"| {VOCAB:,} | own | {DRAFTED:,} |" in done.stdout
