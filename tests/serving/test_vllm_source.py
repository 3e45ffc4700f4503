"""The seam in the source of a vLLM that cannot run here: its wheel is for GPUs."""

import ast
import subprocess
import sys
import zipfile

import pytest

from lmtp_factory.serving import vllm as ours


pytestmark = pytest.mark.slow

VLLM = "vllm==0.33.0"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Reads files of the package."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, VLLM]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip download {VLLM} failed: {done.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        yield lambda path: wheel.read(f"vllm/{path}").decode()


def test_the_method_that_is_wrapped_takes_the_same(source):
    (runner,) = [
        node
        for node in ast.parse(source("v1/worker/gpu_model_runner.py")).body
        if isinstance(node, ast.ClassDef) and node.name == "GPUModelRunner"
    ]
    methods = {node.name: node for node in runner.body if isinstance(node, ast.FunctionDef)}
    parameters = [argument.arg for argument in methods["propose_draft_token_ids"].args.args]
    assert tuple(parameters[: len(ours._PARAMETERS)]) == ours._PARAMETERS
    # What `draft` reads of runner and step.
    text = source("v1/worker/gpu_model_runner.py")
    assert (
        "self.drafter = create_custom_proposer(" in text and "self.requests: dict[str, CachedRequestState] = {}" in text
    )
    assert "num_computed_tokens_cpu" in source("v1/worker/gpu_input_batch.py")
    step = source("v1/core/sched/output.py")
    for name in ("num_scheduled_tokens", "scheduled_spec_decode_tokens", "num_spec_tokens_to_schedule"):
        assert f"    {name}: " in step


def test_classes_of_ones_own_run_on_the_v1_runner(source):
    text = source("config/vllm.py")
    assert 'if speculative_config.method in ("suffix", "custom_class"):' in text
    assert "using the V1 model " in text
