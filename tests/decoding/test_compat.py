"""The private names of transformers that decoding leans on exist, and a missing one is refused by its name."""

import inspect

import pytest
import torch
import transformers
from helpers import tiny_models
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer

from lmtp_factory import LMTPError, attach_heads
from lmtp_factory.decoding import compat


@pytest.fixture(autouse=True)
def check_is_not_cached():
    """The check is made once in a process."""
    compat.check_transformers.cache_clear()
    yield
    compat.check_transformers.cache_clear()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner, names in compat.ATTRIBUTES.items() for name in names],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_every_attribute_exists(owner, name):
    assert hasattr(owner, name)


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method, names in compat.PARAMETERS.items() for name in names],
)
def test_every_parameter_exists(method, name):
    assert name in inspect.signature(getattr(GenerationMixin, method)).parameters


def test_what_generate_prepares_is_read_under_its_names():
    """Attributes of objects, which no class can be asked for."""
    model, config = tiny_models.llama(), GenerationConfig(pad_token_id=7)
    model._prepare_special_tokens(config, device=torch.device("cpu"))
    assert compat.pad_token(config) == 7
    assert compat.attention_implementation(model.config) == "sdpa"
    assert compat.compiles(model, {}, config) is False


@pytest.mark.parametrize(
    ("table", "owner", "name", "named"),
    [
        ("ATTRIBUTES", GenerationMixin, "_gone", r"GenerationMixin\._gone"),
        ("ATTRIBUTES", DynamicLayer, "also_gone", r"DynamicLayer\.also_gone"),
        ("PARAMETERS", "_sample", "gone", r"GenerationMixin\._sample\(gone\)"),
        ("PARAMETERS", "_gone", "input_ids", r"GenerationMixin\._gone\(input_ids\)"),
    ],
)
def test_a_missing_name_is_refused_before_heads_attach(table, owner, name, named, monkeypatch):
    known = getattr(compat, table)
    monkeypatch.setattr(compat, table, known | {owner: (*known.get(owner, ()), name)})
    message = rf"does not support transformers {transformers.__version__}, which has no {named}: pip install"
    with pytest.raises(LMTPError, match=message):
        attach_heads(tiny_models.llama())


def test_a_version_that_is_too_new_is_refused_by_its_number(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", compat.TOO_NEW)
    with pytest.raises(LMTPError, match=r"transformers 5\.24: pip install \"transformers<5\.24\""):
        attach_heads(tiny_models.llama())
