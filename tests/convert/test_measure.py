"""The decision itself, on hits as real heads show them: near tokens easy for all, the right one little better."""

import pytest
import torch

from lmtp_factory import LMTPError
from lmtp_factory.convert.measure import MARGIN, decide, measure
from lmtp_factory.evaluation.scoring import read_rows


# Measured on SmolLM2-135M: per cent of 4096 positions that heads of stride 2, little trained, hit at +1, +2, ...
LITTLE_TRAINED = [
    [0.0, 6.2, 12.7, 3.4, 3.7, 2.5, 3.3, 2.3, 1.8, 2.0, 2.0, 2.3, 2.0],
    [0.0, 4.6, 3.5, 3.5, 5.6, 3.3, 3.5, 2.4, 2.1, 1.9, 2.2, 2.2, 1.9],
    [0.0, 4.0, 2.9, 2.6, 2.4, 2.8, 4.0, 3.2, 2.5, 2.0, 2.1, 1.9, 1.6],
]
STRIDE_3 = [
    [0.0, 3.7, 4.1, 7.0, 4.0, 3.1, 2.6, 2.1, 2.1, 1.8, 1.8, 2.3, 2.3],
    [0.0, 4.1, 2.0, 2.2, 2.0, 2.5, 3.1, 2.8, 2.1, 1.9, 1.9, 1.8, 1.3],
    [0.0, 4.1, 2.4, 2.3, 1.9, 2.1, 2.3, 1.9, 2.2, 2.3, 1.8, 1.6, 1.7],
]


def hits(rates, positions=4096, seed=0):
    """(heads, offsets, positions) bool with these rates, in per cent, each position independent of the others."""
    generator = torch.Generator().manual_seed(seed)
    rates = torch.tensor(rates)[..., None] / 100
    return torch.rand(*rates.shape[:2], positions, generator=generator) < rates


@pytest.mark.parametrize(("rates", "offsets"), [(LITTLE_TRAINED, (3, 5, 7)), (STRIDE_3, (4, 7, 10))])
def test_little_trained_heads_by_their_stride(rates, offsets):
    assert torch.tensor(rates)[-1].argmax() == 1  # most hits: +2
    for seed in range(5):
        assert decide(hits(rates, seed=seed)) == offsets


def peaks(*offsets, height=20.0, candidates=13):
    return [[height if offset == at else 3.0 for offset in range(1, candidates + 1)] for at in offsets]


@pytest.mark.parametrize("offsets", [(2, 3, 6), (3, 5, 7), (5, 6, 13)])
def test_offsets_of_clear_heads_are_found_one_by_one(offsets):
    assert decide(hits(peaks(*offsets))) == offsets


def test_the_offset_of_a_single_head():
    assert decide(hits(peaks(3, candidates=5))) == (3,)


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        (peaks(3, 5, 7, height=3.0), "4096 positions do not tell what the heads predict"),
        # one head at none, and the others at offsets that no stride has
        (peaks(99, 4, 6), "head 1 may predict"),
        # the same where stride 1 fits head 2 well, but not head 3
        (peaks(99, 3, 5), "head 1 may predict"),
        (peaks(7, 5, 3), r"The heads predict \+7, \+5, \+3, but the offsets of leap heads rise"),
        (peaks(3, 3, 7), "The heads predict|do not tell"),
        (peaks(1, 3, 5), r"The heads predict \+1, \+3, \+5, but the offsets of leap heads rise"),
    ],
)
def test_rates_that_fit_no_offsets_are_refused(rates, sentence):
    with pytest.raises(LMTPError, match=sentence):
        decide(hits(rates))


def test_rates_of_chance_are_refused():
    """Heads that know nothing: each head's best is best by chance, and so is the stride that fits best."""
    answers = 0
    for seed in range(40):
        try:
            decide(hits(peaks(99, 99, 99), positions=1024, seed=seed))
            answers += 1
        except LMTPError:
            pass
    assert answers == 0, f"MARGIN {MARGIN} is too small"


def test_hits_are_counted_where_they_should_be(base_model, fitted, rows_file):
    heads, rows = fitted((3, 5)), read_rows(rows_file, limit=3)
    expected = []
    for prompt, output in rows:
        ids = prompt + output
        states = base_model.model(torch.tensor([ids])).last_hidden_state[0]
        next_tokens = base_model.lm_head(states).argmax(-1)
        guesses = heads.logits(states, base_model.lm_head).argmax(-1)
        for s in range(len(prompt) - 1, len(ids) - 9):  # predicting the first token of the output up to the last
            expected.append([[g[s] == ids[s + o] and g[s] != next_tokens[s] for o in range(1, 10)] for g in guesses])
    expected = torch.tensor(expected).permute(1, 2, 0)
    assert expected.any()
    assert torch.equal(measure(base_model, heads, rows), expected)
