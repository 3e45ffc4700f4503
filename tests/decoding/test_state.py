"""Sequences, cache, window and positions agree after the prefill and after every step."""

import pytest
import torch
from helpers.decoding import padded, prompt
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from lmtp_factory import geometry
from lmtp_factory.decoding.accept import Acceptor
from lmtp_factory.decoding.cache import TreeCache
from lmtp_factory.decoding.state import DecodeState
from lmtp_factory.decoding.tree import fixed
from lmtp_factory.decoding.verify import verify
from lmtp_factory.modeling.heads import lm_logits


MOST = 40


def prefilled(model, inputs) -> DecodeState:
    """As ``decode`` prepares it."""
    config, ids = model.config.get_text_config(), inputs["input_ids"]
    criteria = StoppingCriteriaList([MaxLengthCriteria(MOST)])
    cache = TreeCache.replacing(DynamicCache(config=config), config, columns=MOST)
    state = DecodeState(Acceptor(ids, LogitsProcessorList(), criteria, GenerationConfig()), cache)
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    state.prefill(
        model, ids, GenerationConfig(), {"attention_mask": mask, "position_ids": positions, "use_cache": True}
    )
    return state


def whole_row(state, row: int, inputs) -> torch.Tensor:
    """A row's real tokens up to now, without its padding."""
    mask = inputs.get("attention_mask")
    first = 0 if mask is None else int((mask[row] == 0).sum())
    return state.acceptor.sequences[row : row + 1, first : state.acceptor.rows[row].length]


def assert_agrees(model, state, inputs) -> None:
    """Every row's window is what the backbone computes of all its tokens but the root, alone and without a cache."""
    size = geometry.window(model.leap_heads.config.offsets)
    for row, facts in enumerate(state.acceptor.rows):
        tokens = whole_row(state, row, inputs)
        assert int(state.window.roots[row]) == facts.last == int(tokens[0, -1])
        assert int(state.columns[row]) == facts.columns == facts.length - 1
        assert int((state.shift + state.columns).view(-1)[row]) == tokens.shape[1] - 1  # the root's position
        hidden = model.base_model(input_ids=tokens[:, :-1]).last_hidden_state[:, -size:]
        torch.testing.assert_close(state.window.states[row : row + 1], hidden, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gemma3-text"])
@pytest.mark.parametrize("lengths", [[9], [9, 5, 7]], ids=["one row", "padded rows"])
@torch.no_grad()
def test_all_of_it_agrees_after_every_step(leap, architecture, lengths):
    model = leap(architecture, heads={"num_heads": 2, "stride": 3})
    inputs = padded(lengths) if len(lengths) > 1 else {"input_ids": prompt(length=lengths[0])}
    state, tree = prefilled(model, inputs), fixed([(), (0,), (1,), (0, 0)])
    assert_agrees(model, state, inputs)
    for step in range(6):
        # Drafts that are right to a depth of 0, 1 or 2, each row at its own pace.
        tokens = state.window.roots[:, None].repeat(1, tree.nodes)
        for row in range(len(lengths)):
            known = whole_row(state, row, inputs)
            for node in (1, 3)[: (step + row) % 3]:
                known = torch.cat([known, model(input_ids=known).logits[:, -1].argmax(-1, keepdim=True)], 1)
                tokens[row, node] = known[0, -1]
            tokens[row, 2] = (tokens[row, 1] + 1) % model.config.get_text_config().vocab_size  # siblings differ
        hidden = verify(model, tokens, tree, state)
        branches, on_host = state.acceptor.accept(lm_logits(model, hidden), tokens, tree)
        assert [len(branch) >= 1 + (step + row) % 3 for row, branch in enumerate(on_host)] == [True] * len(lengths)
        state.advance(hidden, branches, on_host)
        assert_agrees(model, state, inputs)


@torch.no_grad()
def test_a_row_that_ends_inside_a_branch_stops_there(leap):
    """The other row goes on; of the one that ended, columns and cache are those of its last token."""
    model, inputs = leap("llama"), padded([9, 5])
    state, tree = prefilled(model, inputs), fixed([(0,) * level for level in range(4)])
    for step in range(3):
        tokens = state.window.roots[:, None].repeat(1, tree.nodes)
        for row in range(2):
            known = whole_row(state, row, inputs)
            for node in range(1, tree.nodes):
                known = torch.cat([known, model(input_ids=known).logits[:, -1].argmax(-1, keepdim=True)], 1)
                tokens[row, node] = known[0, -1]
        if step == 1:  # as an end token would, behind the first drafted one
            state.acceptor.eos = {int(tokens[1, 2])} - set(tokens[0].tolist())
            assert state.acceptor.eos
        hidden = verify(model, tokens, tree, state)
        branches, on_host = state.acceptor.accept(lm_logits(model, hidden), tokens, tree, state.goes_on)
        state.advance(hidden, branches, on_host)
        lengths = [len(branch) for branch in on_host]
        assert lengths == ([4, 4], [4, 2], [4, 0])[step]
        for row, facts in enumerate(state.acceptor.rows):
            assert int(state.columns[row]) == facts.columns == facts.length - 1
    assert [row.done for row in state.acceptor.rows] == [False, True] and state.goes_on.tolist() == [[True], [False]]
    layer = state.cache.layers[0]
    for row in range(2):  # keys of the first layer depend on tokens and positions alone
        tokens = whole_row(state, row, inputs)[:, :-1]
        alone = DynamicCache(config=model.config)
        model.base_model(input_ids=tokens, past_key_values=alone, use_cache=True)
        first, last = (
            inputs["input_ids"].shape[1] - len(inputs["attention_mask"][row].nonzero()),
            int(state.columns[row]),
        )
        torch.testing.assert_close(layer.keys[row, :, first:last], alone.layers[0].keys[0], rtol=1e-3, atol=1e-3)
