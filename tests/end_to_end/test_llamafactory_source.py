"""The plugin's tests on the LLaMA-Factory whose checkout LLAMAFACTORY_SOURCE names, in place of the installed one.

LLAMAFACTORY_SOURCE=/path/to/LLaMA-Factory pytest -m slow tests/end_to_end/test_llamafactory_source.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


TESTS = Path(__file__).parents[1]
SUITES = ("plugin", "export", "end_to_end")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Directory with LLaMA-Factory alone; what it needs is that of this environment."""
    source = os.environ.get("LLAMAFACTORY_SOURCE")
    if not source:
        pytest.skip("set LLAMAFACTORY_SOURCE to a checkout of LLaMA-Factory")
    folder = tmp_path_factory.mktemp("llamafactory")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, source]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_the_suite_passes_on_it(suite, installed):
    environment = {key: value for key, value in os.environ.items() if key != "LLAMAFACTORY_SOURCE"}
    environment["PYTHONPATH"] = str(installed)
    found = subprocess.run(
        [sys.executable, "-c", "import llamafactory; print(llamafactory.__file__)"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.startswith(str(installed))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not browser", TESTS / suite]
    result = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:]
