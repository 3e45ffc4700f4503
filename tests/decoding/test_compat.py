"""The private names of transformers that decoding leans on exist, and a missing one is refused by its name."""

import ast
import inspect

import pytest
import torch
import transformers
from helpers import tiny_models
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer, StaticLayer

from lmtp_factory import LMTPError, attach_heads
from lmtp_factory.decoding import cache as cache_module
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
    ("owner", "name"),
    [(owner, name) for owner, names in compat.INSTANCE_ATTRIBUTES.items() for name in names],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_every_attribute_of_an_instance_exists(owner, name):
    assert hasattr(compat.INSTANCES[owner](), name)


@pytest.mark.parametrize(
    ("function", "name"),
    [(function, name) for function, names in compat.PARAMETERS.items() for name in names],
    ids=str,
)
def test_every_parameter_exists(function, name):
    owner, method = function
    assert name in inspect.signature(getattr(owner, method)).parameters


def test_what_generate_prepares_is_read_under_its_names():
    """Attributes that only generate() sets."""
    model, config = tiny_models.llama(), GenerationConfig(pad_token_id=7)
    model._prepare_special_tokens(config, device=torch.device("cpu"))
    assert compat.pad_token(config) == 7
    assert compat.attention_implementation(model.config) == "sdpa"
    assert compat.compiles(model, {}, config) is False
    with pytest.raises(LMTPError, match=r"has no GenerationConfig\._pad_token_tensor: pip install"):
        compat.pad_token(GenerationConfig(pad_token_id=7))  # not prepared


@pytest.mark.parametrize(
    ("table", "owner", "name", "named"),
    [
        ("ATTRIBUTES", GenerationMixin, "_gone", r"GenerationMixin\._gone"),
        ("ATTRIBUTES", DynamicLayer, "also_gone", r"DynamicLayer\.also_gone"),
        ("INSTANCE_ATTRIBUTES", StaticLayer, "gone", r"StaticLayer\.gone"),
        ("PARAMETERS", (GenerationMixin, "_sample"), "gone", r"GenerationMixin\._sample\(gone\)"),
        ("PARAMETERS", (GenerationMixin, "_gone"), "input_ids", r"GenerationMixin\._gone\(input_ids\)"),
    ],
)
def test_a_missing_name_is_refused_before_heads_attach(table, owner, name, named, monkeypatch):
    known = getattr(compat, table)
    monkeypatch.setattr(compat, table, known | {owner: (*known.get(owner, ()), name)})
    message = rf"does not support transformers {transformers.__version__}, which has no {named}: pip install \"transf"
    with pytest.raises(LMTPError, match=message):
        attach_heads(tiny_models.llama())


def test_attributes_of_transformers_objects_are_listed():
    """What the cache reads of transformers' caches and layers is checked before heads attach."""
    listed = {name for names in compat.INSTANCE_ATTRIBUTES.values() for name in names}
    listed |= {name for names in compat.ATTRIBUTES.values() for name in names}
    tree = ast.parse(inspect.getsource(cache_module.TreeCache))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("layer", "theirs")
    }
    own = {"move", "set_cursor", "__dict__", "cumulative_length_int"}  # our layers' own; asked for with hasattr
    assert read - own <= listed


def test_a_mask_that_is_left_out_has_a_length(monkeypatch):
    config = GenerationConfig()
    assert compat.mask_length(torch.ones(1, 7), config, 3) == 7
    monkeypatch.setattr(compat, "CACHE", "cache")  # as since transformers 5.24
    with pytest.raises(LMTPError, match="_mask_length"):
        compat.mask_length(None, config, 3)
    config._mask_length = 5
    assert compat.mask_length(None, config, 3) == 5
