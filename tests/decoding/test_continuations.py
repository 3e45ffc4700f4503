"""Nodes behind many prefixes of one text against one ordinary forward for each of their paths."""

import pytest
import torch
from helpers.decoding import prompt

from lmtp_factory.decoding.continuations import CachedText
from lmtp_factory.decoding.support import no_tree_forward_reason


LENGTH = 21  # longer than the tiny models' sliding windows
# Two texts' worth of nodes: prefix, and the number of the node above for those of the second forward.
PREFIXES = [1, 1, 4, 17, 18, 21]
ABOVE = [0, 0, 1, 3, 5, 5, 5]


def alone(model, *parts):
    """The last final hidden state of one ordinary forward over the parts."""
    return model.base_model(input_ids=torch.cat(parts)[None], use_cache=False).last_hidden_state[0, -1]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3-text", "gemma3", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_nodes_see_their_prefix_and_their_path(leap, architecture, attention):
    model, ids = leap(architecture, attention), prompt(length=LENGTH)[0]
    tokens, later = prompt(2, len(ABOVE), seed=1)
    tokens, prefixes, above = tokens[: len(PREFIXES)], torch.tensor(PREFIXES), torch.tensor(ABOVE)
    text = CachedText(model, ids)
    text.discard_nodes(shortest=1)
    hidden, columns = text.extend(tokens, prefixes)
    below, _ = text.extend(later, prefixes[above], columns[above][:, None])
    for node, prefix in enumerate(PREFIXES):
        expected = alone(model, ids[:prefix], tokens[node, None])
        torch.testing.assert_close(hidden[node], expected, rtol=1e-3, atol=1e-3)
    for node, parent in enumerate(ABOVE):
        expected = alone(model, ids[: PREFIXES[parent]], tokens[parent, None], later[node, None])
        torch.testing.assert_close(below[node], expected, rtol=1e-3, atol=1e-3)
    assert (text.forwards, text.rows) == (3, LENGTH + len(PREFIXES) + len(ABOVE))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3-text"])
@torch.no_grad()
def test_nodes_can_be_discarded_while_prefixes_grow(leap, architecture):
    """A layer with a sliding window drops what no later node sees; enough nodes that its buffers grow."""
    model, ids = leap(architecture), prompt(length=LENGTH)[0]
    text = CachedText(model, ids)
    for prefix in range(1, LENGTH + 1, 4):
        tokens = prompt(length=60, seed=prefix)[0]
        text.discard_nodes(shortest=prefix)
        hidden, _ = text.extend(tokens, torch.full_like(tokens, prefix))
        for node in (0, 59):
            expected = alone(model, ids[:prefix], tokens[node, None])
            torch.testing.assert_close(hidden[node], expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="sort them first"):
        text.discard_nodes(shortest=1)


def test_why_a_model_cannot(leap):
    """Whatever keeps look-back decoding from trees, and texts beyond the length at which rotary embeddings change."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = leap("llama", rope_parameters=rope, max_position_embeddings=24)
    assert no_tree_forward_reason(model, 24) is None
    assert "rotary embedding changes" in no_tree_forward_reason(model, 25)
    flash = type("Flash", (), {"config": type("Config", (), {"get_text_config": lambda self: self})()})()
    flash.config._attn_implementation = "flash_attention_2"
    assert no_tree_forward_reason(flash, 24).startswith("attention flash_attention_2 takes no tree mask")
