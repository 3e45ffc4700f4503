"""One forward over a tree against one forward for each of its branches."""

import pytest
import torch
from helpers.decoding import prompt
from transformers import DynamicCache

from lmtp_factory.decoding.cache import TreeCache
from lmtp_factory.decoding.state import one_row_state
from lmtp_factory.decoding.tree import fixed
from lmtp_factory.decoding.verify import tree_masks, verify


PATHS = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0)]
CONTEXT = 21  # longer than the tiny models' sliding windows


def state_behind(model, ids):
    """A one-row state whose cache holds ``ids``."""
    config = model.config.get_text_config()
    cache = TreeCache.replacing(DynamicCache(config=config), config, columns=0)
    with torch.no_grad():
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return one_row_state(cache, ids.shape[1], last_position=1 << 30, device=ids.device)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3-text", "gemma3", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_node_sees_the_past_and_its_own_branch(leap, architecture, attention):
    model, ids, tree = leap(architecture, attention), prompt(length=CONTEXT), fixed(PATHS)
    tokens = prompt(length=tree.nodes, seed=1)
    with torch.no_grad():
        hidden = verify(model, tokens, tree, state_behind(model, ids))
        for node, path in enumerate(PATHS):
            branch = [PATHS.index(path[:level]) for level in range(len(path) + 1)]
            alone = model.base_model(input_ids=torch.cat([ids, tokens[:, branch]], 1)).last_hidden_state[:, -1]
            torch.testing.assert_close(hidden[:, node], alone, rtol=1e-3, atol=1e-3)


def test_the_root_alone_needs_no_mask(leap):
    model = leap()
    state, root = state_behind(model, prompt()), fixed([()])
    assert tree_masks(model.config, root, state, model.dtype) is None


def test_positions_past_the_last_one_are_not_asked_for(leap):
    """A table of learned positions ends there: GPT-2's has 48 here."""
    model = leap("gpt2")
    state, tree = state_behind(model, prompt(length=46)), fixed([(0,) * level for level in range(6)])
    state.last_position = torch.tensor(47)
    with torch.no_grad():
        hidden = verify(model, prompt(length=6, seed=1), tree, state)
    assert hidden.isfinite().all()
