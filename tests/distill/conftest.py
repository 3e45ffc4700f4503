"""The tokenizer of the tiny model to distill from."""

import pytest
from helpers.distillation import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()
