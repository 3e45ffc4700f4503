"""Heads and decoding on the oldest and the newest transformers, and on those between which its caches changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmtp_factory.decoding import compat


TESTS = Path(__file__).parents[1]
# Version -> what it needs in another version than the installed packages.
VERSIONS = {f"{compat.OLDEST}.0": (), "5.3.0": (), "5.4.0": (), "5.24.0": ("tokenizers>=0.23.1,<0.24",)}
SUITES = (
    "modeling/test_model.py",
    *(f"decoding/test_{name}.py" for name in ("compat", "cache", "compiled", "loop_greedy")),
)
# Transformers' own limits: 5.24 takes no embeddings for Gemma 3's image-text model.
LEFT_OUT = {"5.24.0": "not (test_embeddings_for_a_prompt and gemma3)"}


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_suites_pass(version, tmp_path):
    packages = [f"transformers=={version}", *VERSIONS[version]]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, *packages]
    subprocess.run(install, check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", "import transformers; print(transformers.__version__)"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == version
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", LEFT_OUT.get(version, ""), *SUITES]
    result = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:]
