"""A generation that raises leaves a static cache to the next one: that which transformers keeps, and the caller's."""

import pytest
import torch
from helpers.decoding import TREES, assert_as_stock, decoded, prompt, stock
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

from lmtp_factory import LMTPError
from lmtp_factory.decoding import loop, mixin, state
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.tree_config import TreeConfig


STATIC = {"cache_implementation": "static", "max_new_tokens": 12, "do_sample": False}


class Full(BaseStreamer):
    """Takes the prompt and two more tokens."""

    def __init__(self):
        self.taken = 0

    def put(self, value):
        self.taken += 1
        if self.taken > 3:
            raise BrokenPipeError

    def end(self):
        pass


def interrupted(*_, **__):
    raise KeyboardInterrupt


def damaged(*_, **__):
    raise LMTPError("tree.json is damaged.")


@pytest.fixture
def model(leap):
    """Without the static cache of the tests before."""
    model = leap("mistral")
    vars(model).pop("_cache", None)
    return model


ERRORS = {
    "Ctrl-C in the prefill": (state.DecodeState, "prefill", interrupted, KeyboardInterrupt, {}),
    "Ctrl-C in a step": (loop, "verify", interrupted, KeyboardInterrupt, {}),
    "a damaged tree.json": (mixin, "tree_config_for", damaged, LMTPError, {"lmtp_tree": None}),
    "ranks that do not exist": (
        None, "", None, LMTPError, {"lmtp_tree": TreeConfig("static", 2, ((), (10**6,)))}
    ),
    "a streamer": (None, "", None, BrokenPipeError, {"streamer": Full}),
}  # fmt: skip


def fails(model, error, monkeypatch, **kwargs):
    owner, name, function, exception, options = ERRORS[error]
    options = {"lmtp_tree": TREES["chain"]} | {key: v() if isinstance(v, type) else v for key, v in options.items()}
    with monkeypatch.context() as patch, pytest.raises(exception):
        if owner is not None:
            patch.setattr(owner, name, function)
        model.generate(prompt(), **options, **kwargs)


@pytest.mark.parametrize("error", ERRORS)
def test_the_next_call_with_a_static_cache_works(model, error, monkeypatch):
    fails(model, error, monkeypatch, **STATIC)
    assert_as_stock(model, prompt(), **STATIC)


@pytest.mark.parametrize("error", ERRORS)
def test_the_buffers_of_a_used_cache_are_kept(model, error, monkeypatch):
    """Compiled code knows their addresses."""
    assert_as_stock(model, prompt(), **STATIC)
    kept = getattr(model, "_cache", None)
    fails(model, error, monkeypatch, **STATIC)
    assert getattr(model, "_cache", None) is kept
    assert_as_stock(model, prompt(), **STATIC)


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("error", ERRORS)
def test_the_caller_s_empty_cache_stays_empty(model, error, is_used, monkeypatch):
    """Tree nodes that were not accepted would else pass for an earlier part of the next prompt."""
    kwargs = {"past_key_values": StaticCache(model.config, max_cache_len=60), "max_new_tokens": 12, "do_sample": False}
    if is_used:
        model.generate(prompt(), **kwargs)
        kwargs["past_key_values"].reset()
    fails(model, error, monkeypatch, **kwargs)
    assert int(kwargs["past_key_values"].get_seq_length()) == 0
    ours, _ = decoded(model, prompt(), lmtp_tree=TREES["chain"], **kwargs)
    assert torch.equal(ours, stock(model, prompt(), max_new_tokens=12, do_sample=False))


def test_the_caller_s_filled_cache_keeps_its_contents(model, monkeypatch):
    """It is not ours to empty: stock would have used it."""
    cache, stats = StaticCache(model.config, max_cache_len=60), DecodeStats()
    ids = model.generate(prompt(), past_key_values=cache, max_new_tokens=5, do_sample=False)
    longer = torch.cat([ids, prompt(1, 3, seed=1)], dim=1)
    kwargs = {"past_key_values": cache, "max_new_tokens": 5, "do_sample": False, "lmtp_stats": stats}
    with monkeypatch.context() as patch, pytest.raises(LMTPError):
        patch.setattr(mixin, "tree_config_for", damaged)
        model.generate(longer, **kwargs)
    assert int(cache.get_seq_length()) == 9 + 5 - 1
    assert torch.equal(model.generate(longer, **kwargs), stock(model, longer, max_new_tokens=5, do_sample=False))
