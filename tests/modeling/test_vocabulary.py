"""Heads for a vocabulary that has grown, and which growth is one."""

import pytest
import torch
from helpers import tiny_data, tiny_models
from helpers.tiny_models import randomise_heads

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.modeling.checkpoint import tokenizer_fingerprint
from lmtp_factory.modeling.vocabulary import Vocabulary, grow_heads, new_tokens


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_grown_heads_keep_their_rows_and_take_the_lm_heads_new_ones(kind):
    model = attach_heads(tiny_models.llama(), LMTPConfig(head_kind=kind))
    randomise_heads(model)
    heads, known = model.leap_heads, model.config.vocab_size
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    before = heads.logits(hidden, model.lm_head)
    model.resize_token_embeddings(known + 2, mean_resizing=False)
    grow_heads(heads, model)
    after = heads.logits(hidden, model.lm_head)
    assert after.shape[-1] == heads.config.vocab_size == known + 2
    torch.testing.assert_close(after[..., :known], before)
    for head, logits in zip(heads.heads, after):
        torch.testing.assert_close(logits[:, known:], head.features(hidden) @ model.lm_head.weight[known:].T)
    state = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    grow_heads(heads, model)  # nothing is new
    assert all(torch.equal(tensor, state[name]) for name, tensor in heads.state_dict().items())


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_grown_heads_with_a_draft_vocabulary_draft_what_they_drafted(kind):
    tokens = list(range(0, 60, 2))
    config = LMTPConfig(head_kind=kind, draft_vocab_size=len(tokens))
    model = attach_heads(tiny_models.llama(), config, draft_tokens=tokens)
    randomise_heads(model)
    heads, known = model.leap_heads, model.config.vocab_size
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    before = heads.logits(hidden, model.lm_head)
    model.resize_token_embeddings(known + 2, mean_resizing=False)
    grow_heads(heads, model)
    assert heads.config.vocab_size == len(heads.t2d) == known + 2
    assert torch.equal(heads.logits(hidden, model.lm_head), before)
    assert heads.draft_labels(torch.tensor([known, known + 1, 2])).tolist() == [-100, -100, 1]


def test_a_vocabulary_fits_heads_of_its_size_and_tokenizer(tmp_path):
    base = tiny_models.save_llama(tmp_path / "base")
    vocabulary = Vocabulary.of_files(str(base))
    tokenizer = tiny_data.build_tokenizer()
    assert vocabulary == Vocabulary(len(tokenizer), tokenizer_fingerprint(tokenizer))
    sizes = {"hidden_size": 32, "vocab_size": vocabulary.size}
    assert vocabulary.fits(LMTPConfig(**sizes, tokenizer_fingerprint=vocabulary.fingerprint))
    assert vocabulary.fits(LMTPConfig(**sizes))  # heads that do not say which tokenizer
    assert not vocabulary.fits(LMTPConfig(**sizes, tokenizer_fingerprint="0123456789abcdef"))
    assert not vocabulary.fits(LMTPConfig(**sizes | {"vocab_size": vocabulary.size + 1}))


def test_new_tokens_are_those_that_the_tokenizer_beside_the_heads_adds(tmp_path):
    base, beside = tiny_models.save_llama(tmp_path / "base"), tmp_path / "adapter"
    grown = tiny_data.build_tokenizer()
    grown.add_tokens(["<second>", "<first>"])
    grown.save_pretrained(beside)
    config = LMTPConfig(tokenizer_fingerprint=tokenizer_fingerprint(grown))
    assert new_tokens(beside, config, str(base)) == ["<second>", "<first>"]
    assert (
        new_tokens(
            base, LMTPConfig(tokenizer_fingerprint=tokenizer_fingerprint(tiny_data.build_tokenizer())), str(base)
        )
        == []
    )


def test_another_tokenizer_is_no_growth(tmp_path):
    base, beside = tiny_models.save_llama(tmp_path / "base"), tmp_path / "adapter"
    grown = tiny_data.build_tokenizer()
    grown.add_tokens(["<new>"])
    grown.save_pretrained(beside)
    assert new_tokens(beside, LMTPConfig(tokenizer_fingerprint="0123456789abcdef"), str(base)) == []
    fingerprint = tokenizer_fingerprint(grown)
    assert new_tokens(tmp_path / "nowhere", LMTPConfig(tokenizer_fingerprint=fingerprint), str(base)) == []
    # A base that knows a token which the grown tokenizer lacks.
    other = tiny_data.build_tokenizer()
    other.add_tokens(["<other>"])
    other.save_pretrained(base)
    assert new_tokens(beside, LMTPConfig(tokenizer_fingerprint=fingerprint), str(base)) == []
