"""Drafts for an engine are those of our own decoding, from the same states."""

import pytest
import torch
from helpers import tiny_models
from helpers.decoding import enlarge_weights
from helpers.tiny_models import randomise_heads

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.decoding.draft import Window, propose_candidates
from lmtp_factory.serving import chains as chains_module
from lmtp_factory.serving.chains import DraftModel, draft_chains


HEADS = {
    "paper": {},
    "shared": {"head_kind": "shared"},
    "token, mlp": {"head_inputs": "state_token", "head_block": "mlp", "offsets": (2, 3, 6)},
    "own draft vocabulary": {"draft_vocab_size": 9, "offsets": (2, 5)},
    "shared draft vocabulary": {"draft_vocab_size": 9, "head_kind": "shared", "head_layers": 2},
}
MODELS = {
    "llama": tiny_models.llama,
    "gemma3": lambda: tiny_models.gemma3_text(final_logit_softcapping=2.0),  # scales its embeddings
}


@pytest.fixture(params=MODELS)
def base(request):
    model = MODELS[request.param]()
    enlarge_weights(model)
    return model


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_drafts_are_those_of_our_own_decoding(base, heads, monkeypatch):
    config = LMTPConfig(**heads)
    attach_heads(base, config, draft_tokens=range(3, 12) if config.draft_vocab_size else None)
    randomise_heads(base)
    lm_head = base.get_output_embeddings().weight.detach()
    model = DraftModel(base.leap_heads, base.config, base.get_input_embeddings(), lm_head)
    states = torch.randn(3, 3, base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    filled = torch.tensor([3, 2, 1])
    window = Window.of_states(states, torch.arange(3) >= 3 - filled[:, None], torch.tensor([5, 6, 7]))
    levels = base.leap_heads.config.offsets[-1] - 1
    with torch.no_grad():
        expected = propose_candidates(base, window, levels, width=1)
    for length, at_once in ((1, chains_module.LOGITS), (levels, chains_module.LOGITS), (levels, 1)):
        monkeypatch.setattr(chains_module, "LOGITS", at_once)
        chains = draft_chains(model, window, length)
        assert len(chains[0]) == length
        for row, chain in enumerate(chains):
            assert chain == expected.tokens[row, : len(chain), 0].tolist()
            missing = expected.probabilities[row, :length, 0] == 0
            assert len(chain) == (int(missing.int().argmax()) if missing.any() else length)


def test_rows_of_a_draft_vocabulary_are_copied_once(base, monkeypatch):
    attach_heads(base, LMTPConfig(draft_vocab_size=9, head_kind="shared"), draft_tokens=range(3, 12))
    model = DraftModel(base.leap_heads, base.config, base.get_input_embeddings(), base.get_output_embeddings().weight)
    copied, original = [], type(base.leap_heads).unembeddings
    monkeypatch.setattr(
        type(base.leap_heads), "unembeddings", lambda heads, lm_head: copied.append(1) or original(heads, lm_head)
    )
    window = Window(torch.randn(1, 2, base.config.hidden_size), [2])
    for _ in range(2):
        draft_chains(model, window, 2)
    assert copied == [1]
