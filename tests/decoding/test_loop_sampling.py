"""Sampling: the distribution of the tokens is the model's own, and a seed gives what it gives without heads."""

import math
import random
from collections import Counter

import pytest
import torch
from helpers.decoding import TREES, assert_as_stock, decoded, oracle, padded, prompt, stock
from scipy.stats import chi2
from transformers import set_seed

from lmtp_factory.decoding import loop, tree_builder
from lmtp_factory.decoding.accept import Acceptor
from lmtp_factory.decoding.draft import Candidates
from lmtp_factory.decoding.tree_config import TreeConfig


VOCABULARY, NEW, SAMPLES = 9, 3, 4000
# At such a level one run in some thousands of all these tests fails by chance; seeds are fixed, so it is not a new one.
SIGNIFICANCE = 1e-4
SETTINGS = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_k": 0, "top_p": 0.7},
    "min_p": {"top_k": 0, "min_p": 0.15},
    "repetition_penalty": {"top_k": 0, "repetition_penalty": 1.8},
    "all": {"top_k": 6, "top_p": 0.9, "temperature": 1.3, "repetition_penalty": 1.3},
    "no_repeat_ngram": {"top_k": 0, "no_repeat_ngram_size": 1},
}


@pytest.fixture
def tiny_vocabulary(leap):
    """A model of nine tokens, some likelier than others: a temperature that makes their probabilities uneven."""
    model = leap("llama", vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, heads={"num_heads": 2})
    with torch.no_grad():
        model.lm_head.weight.copy_(0.35 * torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(3)))
    return model


def exact_distribution(model, ids, settings) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of NEW tokens, one stock step at a time."""
    reached = {(): 1.0}
    for _ in range(NEW):
        prefixes = torch.tensor([[*ids, *path] for path in reached])
        kwargs = {"do_sample": True, "max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
        kwargs["attention_mask"] = torch.ones_like(prefixes)  # the padding token is a token like others here
        probabilities = stock(model, prefixes, **kwargs, **settings).scores[0].softmax(-1).tolist()
        reached = {
            (*path, token): above * p
            for (path, above), row in zip(reached.items(), probabilities)
            for token, p in enumerate(row)
            if p > 0
        }
    return reached


def check_distribution(counted: Counter, exact: dict[tuple[int, ...], float]) -> None:
    """Chi-square over the continuations; those expected less than five times count together."""
    total = sum(counted.values())
    assert set(counted) <= set(exact), "a continuation that is impossible"
    assert math.isclose(sum(exact.values()), 1.0, rel_tol=1e-4)
    cells = [(counted[path], total * p) for path, p in exact.items()]
    common = [cell for cell in cells if cell[1] >= 5]
    rare = [cell for cell in cells if cell[1] < 5]
    if rare:
        common.append((sum(n for n, _ in rare), sum(expected for _, expected in rare)))
    statistic = sum((n - expected) ** 2 / expected for n, expected in common)
    assert len(common) >= 8
    assert chi2.sf(statistic, len(common) - 1) > SIGNIFICANCE


def propose(proposals):
    """Drafts whose candidates are ``proposals(prefix)`` for every row: (levels, width) tokens, right by luck alone."""
    acceptors = []

    class Recorded(Acceptor):
        def __init__(self, *args):
            super().__init__(*args)
            acceptors.append(self)

    def propose(model, window, levels, width, *_):
        acceptor = acceptors[-1]
        tokens = [proposals(acceptor.sequences[b, : row.length].tolist()) for b, row in enumerate(acceptor.rows)]
        tokens = torch.tensor(tokens)[:, :levels, :width]
        return Candidates(tokens, torch.tensor([0.4, 0.3, 0.2, 0.1])[:width].expand(tokens.shape))

    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "Acceptor", Recorded)
    patch.setattr(tree_builder, "propose_candidates", propose)
    return patch


@pytest.mark.parametrize("plan", ["static", "dynamic"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_distribution_is_the_model_s(tiny_vocabulary, name, plan):
    """Drafts propose the likelier tokens, differently by what came before: accepting them may not make them likelier yet."""
    model, ids, settings = tiny_vocabulary, [3, 5, 5, 8], SETTINGS[name]
    exact = exact_distribution(model, ids, settings)
    favourites = {}
    for path in sorted(exact, key=exact.get, reverse=True):
        for place in range(NEW):
            tokens = favourites.setdefault((path[:place], place), [])
            if path[place] not in tokens:
                tokens.append(path[place])

    def proposals(sequence):
        path, levels = tuple(sequence[len(ids) :]), []
        for place in range(len(path), len(path) + 4):
            tokens = favourites.get((path, place), [])
            # Where the path goes on is not known yet: the favourites of the likeliest one.
            path = (*path, *tokens[:1])
            levels.append([*tokens, *(token for token in range(VOCABULARY) if token not in tokens)][:4])
        return levels

    patch = propose(proposals)
    try:
        set_seed(0)
        kwargs = {"do_sample": True, "max_new_tokens": NEW, "num_return_sequences": SAMPLES} | settings
        output, stats = decoded(model, torch.tensor([ids]), lmtp_tree=TREES[plan], **kwargs)
    finally:
        patch.undo()
    assert stats.tau > 1.2
    check_distribution(Counter(map(tuple, output[:, len(ids) :].tolist())), exact)


def test_the_chi_square_would_notice(tiny_vocabulary):
    """A twelfth of the samples drawn from the drafts is seen, so the test above can fail."""
    exact = exact_distribution(tiny_vocabulary, [3, 5, 5, 8], {"top_k": 0})
    paths, rng = list(exact), random.Random(0)
    counted = Counter(rng.choices(paths, weights=exact.values(), k=SAMPLES))
    check_distribution(counted, exact)
    counted.update({max(exact, key=exact.get): SAMPLES // 12})
    with pytest.raises(AssertionError):
        check_distribution(counted, exact)


@pytest.mark.parametrize("kwargs", [*SETTINGS.values(), {"min_new_tokens": 5, "eos_token_id": 8}], ids=str)
@pytest.mark.parametrize("plan", ["chain", "dynamic"])
def test_one_sequence_takes_a_seed_as_stock_does(leap, kwargs, plan):
    model, kwargs = leap("mistral"), {"do_sample": True, "max_new_tokens": 24} | kwargs
    seen = []
    for seed in range(3):
        set_seed(seed)
        expected = stock(model, prompt(), **kwargs)
        after = torch.rand(())
        set_seed(seed)
        with oracle(expected, lambda row, place: (0, 1, None, 0)[place % 4]):
            ours, stats = decoded(model, prompt(), lmtp_tree=TREES[plan], **kwargs)
        assert ours.tolist() == expected.tolist()
        assert torch.rand(()) == after  # not one draw more or less
        assert stats.tau > 1.2
        seen.append(ours.tolist())
    assert seen[0] != seen[1] != seen[2]


def test_a_batch_takes_a_seed_to_the_same_output_twice(leap):
    model, kwargs = leap(), {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3, "top_p": 0.9}
    outputs = []
    for seed in (0, 0, 1):
        set_seed(seed)
        outputs.append(decoded(model, **padded([3, 6]), lmtp_tree=TREES["dynamic"], **kwargs)[0].tolist())
    assert outputs[0] == outputs[1] != outputs[2]
    assert len({tuple(row) for row in outputs[0]}) == 6


def test_penalties_apply_to_greedy_search_as_well(leap):
    kwargs = {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "max_new_tokens": 30}
    model, plain = leap("gemma3-text"), {"do_sample": False, "max_new_tokens": 30}
    for plan in TREES.values():
        output, _ = assert_as_stock(model, **padded([4, 8]), lmtp_tree=plan, **kwargs)
        assert output.tolist() != stock(model, **padded([4, 8]), **plain).tolist()
        with oracle(output, lambda row, place: place % 3):
            ours, stats = decoded(model, **padded([4, 8]), lmtp_tree=plan, **kwargs)
        assert ours.tolist() == output.tolist()


def test_a_tree_of_one_node_samples_like_stock(leap):
    model, kwargs = leap(), {"do_sample": True, "max_new_tokens": 9}
    set_seed(5)
    expected = stock(model, prompt(), **kwargs)
    set_seed(5)
    assert torch.equal(decoded(model, prompt(), lmtp_tree=TreeConfig("chain", 1), **kwargs)[0], expected)
