"""Numerical marginalisation against explicit sums: one ordinary forward for each path over a vocabulary of 11 tokens."""

from itertools import product

import pytest
import torch
from helpers import tiny_models
from helpers.decoding import enlarge_weights

from lmtp_factory import attach_heads
from lmtp_factory.decoding.continuations import CachedText
from lmtp_factory.evaluation.marginal import marginals


VOCABULARY, LENGTH = 11, 9
KS = (1, 4, VOCABULARY, VOCABULARY**2)
MODELS = {
    "llama": tiny_models.llama,
    "gemma3": lambda **config: tiny_models.gemma3_text(sliding_window=4, **config),
    "gemma3, window 2": lambda **config: tiny_models.gemma3_text(
        sliding_window=2, final_logit_softcapping=2.0, **config
    ),
    "mistral": lambda **config: tiny_models.mistral(sliding_window=3, **config),
    "mistral, window 1": lambda **config: tiny_models.mistral(sliding_window=1, **config),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """Without a padding token, whose embedding of zeros would make many paths equally probable."""
    model = MODELS[request.param](vocab_size=VOCABULARY, pad_token_id=None)
    enlarge_weights(model)
    model.get_output_embeddings().weight.data.mul_(8)  # or all tokens would be about as probable
    return attach_heads(model)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def after(model, *tokens: int) -> torch.Tensor:
    """The model's own probabilities of the next token, by one ordinary forward."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1].softmax(-1)


def explicit_sums(model, prefix: list[int], k: int) -> tuple[torch.Tensor, float, torch.Tensor, float]:
    """Probabilities and mass at +2 and +3: over the k most probable v, and the k most probable (v, w) below them."""
    first = after(model, *prefix)
    kept = sorted(range(VOCABULARY), key=lambda v: -first[v])[:k]
    second = {v: after(model, *prefix, v) for v in kept}
    pairs = sorted(product(kept, range(VOCABULARY)), key=lambda pair: -first[pair[0]] * second[pair[0]][pair[1]])[:k]
    weights = {(v, w): first[v] * second[v][w] for v, w in pairs}
    at_3 = sum(weight * after(model, *prefix, v, w) for (v, w), weight in weights.items())
    return sum(first[v] * second[v] for v in kept), float(first[kept].sum()), at_3, float(sum(weights.values()))


@pytest.mark.parametrize("at_once", [LENGTH, 2], ids=["all positions at once", "two at a time"])
def test_every_cut_is_the_explicit_sum(model, ids, at_once):
    """From a prefix of one token on; with K = V the sum at +2 is whole, with K = V * V also the one at +3."""
    text, parts = CachedText(model, ids), []
    for positions in torch.arange(LENGTH).split(at_once):
        parts.append(marginals(model, text, positions, KS))
    assert [marginal.paths for marginal in parts[0]] == [(1, 4, 11, 11), (1, 4, 11, 121)]
    (p_2, p_3), (mass_2, mass_3) = (
        [torch.cat([getattr(part[offset], name) for part in parts]) for offset in (0, 1)]
        for name in ("probabilities", "masses")
    )
    for position, (number, k) in product((0, 1, 5, LENGTH - 1), enumerate(KS)):
        expected_2, covered_2, expected_3, covered_3 = explicit_sums(model, ids[: position + 1].tolist(), k)
        torch.testing.assert_close(p_2[position, number], expected_2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(p_3[position, number], expected_3, rtol=1e-4, atol=1e-6)
        assert float(mass_2[position, number]) == pytest.approx(covered_2, rel=1e-4)
        assert float(mass_3[position, number]) == pytest.approx(covered_3, rel=1e-4)
    whole = torch.ones(LENGTH)
    torch.testing.assert_close(p_2[:, 2].sum(-1), whole)
    torch.testing.assert_close(p_3[:, 3].sum(-1), whole)
    # The cuts leave something out, and not so much that all paths are about as probable.
    assert 0.1 < float(mass_3[:, 1].mean()) < 0.9


def test_a_k_does_not_depend_on_the_others(model, ids):
    """Their nodes are shared."""
    together = marginals(model, CachedText(model, ids), torch.arange(LENGTH), (1, 2, 5))
    for number, k in enumerate((1, 2, 5)):
        for shared, own in zip(together, marginals(model, CachedText(model, ids), torch.arange(LENGTH), [k])):
            torch.testing.assert_close(shared.probabilities[:, number], own.probabilities[:, 0])
            torch.testing.assert_close(shared.masses[:, number], own.masses[:, 0])
