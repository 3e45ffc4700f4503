"""A tiny model to distill from, its tokenizer, and prompts."""

import pytest
from helpers.distillation import build_tokenizer, save_model, save_prompts


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Directory of the tiny model."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(directory)
    return directory


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    save_prompts(path)
    return path
