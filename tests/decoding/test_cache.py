"""Caches that branches are kept in, against plain appending, and what a caller's cache holds afterwards."""

import copy
import random
from contextlib import suppress

import pytest
import torch
from helpers.decoding import TREES, assert_as_stock, decoded, oracle, padded, prompt, stock
from transformers import DynamicCache, GPT2Config, MistralConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmtp_factory.decoding import compat
from lmtp_factory.decoding.branches import Branches
from lmtp_factory.decoding.cache import GrowingLayer, TreeCache, _Moves
from lmtp_factory.decoding.stats import DecodeStats


HEADS, SIZE = 2, 3
WINDOWS = (None, 6, 13)  # of the layers
LAST = 10**9


def dynamic() -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [DynamicLayer() if w is None else DynamicSlidingWindowLayer(w) for w in WINDOWS]
    return cache


def static(columns: int, window: int | None = 6) -> StaticCache:
    return StaticCache(MistralConfig(num_hidden_layers=len(WINDOWS), sliding_window=window), max_cache_len=columns)


class Plain:
    """What rows that are never rolled back hold: layer -> row -> (heads, columns, size) of keys, and the same of values.

    Every update of the cache under test is checked against it.
    """

    def __init__(self, cache: TreeCache, rows: int, seed: int, finish: float = 0.0):
        self.cache, self.rng = cache, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.held = [[[torch.empty(HEADS, 0, SIZE)] * 2 for _ in range(rows)] for _ in cache.layers]
        self.finished, self.finish = [False] * rows, finish

    @property
    def rows(self) -> int:
        return len(self.finished)

    def lengths(self) -> list[int]:
        return [row[0].shape[1] for row in self.held[0]]

    def adopt(self, layers: list[list[list[torch.Tensor]]]) -> None:
        self.held = layers

    def write(self, columns: int) -> list[torch.Tensor]:
        """One forward's keys and values of every layer; what comes back has to hold the rows' past and these."""
        lengths, written = self.lengths(), []
        for number, layer in enumerate(self.cache.layers):
            new = [torch.randn(self.rows, HEADS, columns, SIZE, generator=self.generator) for _ in range(2)]
            count, first = self.cache.get_mask_sizes(columns, number)
            seen = self.cache.update(*new, number)
            start, window = max(lengths) - first, getattr(layer, "window", None) or LAST
            for row, held in enumerate(self.held[number]):
                for mine, theirs, fresh in zip(seen, held, new):
                    assert mine.shape[2] == count
                    assert torch.equal(mine[row, :, start : start + columns], fresh[row])
                    if self.finished[row]:
                        continue
                    assert first <= max(lengths[row] - window + 1, 0), "what the next query sees has been forgotten"
                    assert torch.equal(mine[row, :, : lengths[row] - first], theirs[:, first:])
            written.append(new)
        return written

    def prefill(self, columns: int) -> None:
        written = self.write(columns)
        for held, new in zip(self.held, written):
            held[:] = [[part[row] for part in new] for row in range(self.rows)]
        for layer in self.cache.layers:
            layer.set_cursor(columns, columns)

    def step(self) -> None:
        """A tree of some nodes; each unfinished row keeps some branch, not always that of the lowest numbers."""
        lengths, nodes = self.lengths(), self.rng.randint(1, 7)
        written, branches = self.write(nodes), []
        for row in range(self.rows):
            branch = [] if self.finished[row] else [0]
            while branch and branch[-1] + 1 < nodes and self.rng.random() < 0.6:
                branch.append(self.rng.randint(branch[-1] + 1, nodes - 1))
            branches.append(branch)
            others_go_on = self.finished.count(False) > 1
            self.finished[row] |= others_go_on and self.rng.random() < self.finish
        for held, new in zip(self.held, written):
            for row, branch in enumerate(branches):
                held[row] = [torch.cat([old, part[row][:, branch]], dim=1) for old, part in zip(held[row], new)]
        sent = Branches.sent(branches, [0] * self.rows, torch.device("cpu"))
        self.cache.move(sent, max(lengths), torch.tensor(lengths)[:, None])
        lengths = self.lengths()
        unfinished = [length for length, done in zip(lengths, self.finished) if not done]
        self.cache.set_cursor(max(lengths), min(unfinished))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_every_step_sees_what_was_kept(kind, rows, seed):
    cache = TreeCache.replacing(static(180) if kind == "fixed" else dynamic(), None, columns=180)
    assert cache.is_fixed == (kind == "fixed")
    plain = Plain(cache, rows, seed, finish=0.05)
    plain.prefill(plain.rng.randint(1, 30))
    for _ in range(30):
        plain.step()
    # Nothing of a finished row is lost where layers see all.
    length = max(plain.lengths())
    for buffers, held in zip((cache.layers[0].keys, cache.layers[0].values), zip(*plain.held[0])):
        for row, expected in enumerate(held):
            assert torch.equal(buffers[row, :, : expected.shape[1]], expected)
    assert cache.get_seq_length() == length


@pytest.mark.parametrize("rows", [1, 2])
def test_layers_on_several_devices_share_what_a_step_sends(rows):
    """One copy of the indices a device; the second device here has no memory, so that only the way there is tested."""
    devices = ("cpu", "meta", "cpu", "meta")
    cache = TreeCache(layers=[GrowingLayer() for _ in devices])
    states = torch.arange(rows * HEADS * 8.0 * SIZE).view(rows, HEADS, 8, SIZE)
    for number, device in enumerate(devices):
        cache.update(states.to(device), states.to(device), number)
    sent = _Moves(sources=torch.tensor([[5, 7]] * rows), targets=torch.tensor([[5, 6]] * rows))
    for layer in cache.layers:
        layer.move(sent)
    assert set(sent.on) == {torch.device("cpu"), torch.device("meta")} and len(sent.made) == 2
    for number in (0, 2):
        assert torch.equal(cache.layers[number].keys[:, :, :7], states[:, :, [0, 1, 2, 3, 4, 5, 7]])


def test_sliding_layers_forget():
    cache = TreeCache.replacing(dynamic(), None, columns=0)
    plain = Plain(cache, 3, seed=0)
    plain.prefill(100)
    for _ in range(100):
        plain.step()
    assert min(plain.lengths()) > 250
    full, narrow, wide = (layer.keys.shape[2] for layer in cache.layers)
    spread = max(plain.lengths()) - min(plain.lengths())
    assert full >= max(plain.lengths())
    # What is visible, how far the rows are apart, one step, half as much again and some more.
    assert narrow <= wide <= 2 * (13 + spread + 7) + 64 < full


@pytest.mark.parametrize("length", [1, 5, 6, 7, 40])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_filled_cache_is_taken_over_and_handed_back(rows, length):
    """The caller's layers go on exactly as if they had been appended to all along."""
    given, reference = dynamic(), dynamic()
    generator = torch.Generator().manual_seed(length)
    states = [torch.randn(2, rows, HEADS, length, SIZE, generator=generator) for _ in WINDOWS]
    for chunk in ([slice(0, length)], [slice(0, 4), slice(4, length)])[length > 4]:
        for number, state in enumerate(states):
            for cache in (given, reference):
                cache.update(*state[..., chunk, :], number)
    before = [layer.keys.clone() for layer in given.layers]

    plain = Plain(TreeCache.replacing(given, None, columns=0), rows, seed=length)
    plain.adopt([[[part[row] for part in state] for row in range(rows)] for state in states])
    for _ in range(9):
        plain.step()
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(given.layers, before)), "a crash would tear it"

    common = min(plain.lengths())  # of rows of different lengths only so much can be compared as a whole
    plain.cache.hand_back(given, common)
    for number in range(len(WINDOWS)):
        for column in range(length, common):
            keys, values = (torch.stack([row[part][:, column] for row in plain.held[number]]) for part in (0, 1))
            reference.update(keys[:, :, None], values[:, :, None], number)
    for number, (ours, theirs) in enumerate(zip(given.layers, reference.layers)):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length() == common
        query = torch.arange(common, common + 3) if compat.TAKES_COLUMNS else 3
        assert ours.get_mask_sizes(query) == theirs.get_mask_sizes(query)
        new = torch.randn(rows, HEADS, 3, SIZE, generator=generator)
        for mine, expected in zip(given.update(new, new, number), reference.update(new, new, number)):
            assert torch.equal(mine, expected)


def test_a_cache_without_layers_gets_the_model_s():
    cache = DynamicCache()
    assert len(TreeCache.replacing(cache, GPT2Config(n_layer=3), columns=0).layers) == len(cache.layers) == 3


def test_buffers_of_a_static_cache_are_used_again():
    """Compiled code knows their addresses: a second call with other ones would compile again."""
    given = static(30)
    first = TreeCache.replacing(given, None, columns=40)
    plain = Plain(first, 2, seed=0)
    plain.prefill(9)
    plain.step()
    first.hand_back(given, max(plain.lengths()))
    assert TreeCache.replacing(given, None, columns=40) is None  # in use
    assert given.get_seq_length() == max(plain.lengths())
    given.reset()
    again = TreeCache.replacing(given, None, columns=38)
    larger = TreeCache.replacing(given, None, columns=41)
    for ours, theirs, new in zip(first.layers, again.layers, larger.layers):
        assert ours.keys is theirs.keys
        assert ours.cumulative_length is theirs.cumulative_length
        assert not new.is_initialized and new.max_cache_len == 41
    plain = Plain(again, 2, seed=1)
    plain.prefill(5)
    for _ in range(4):
        plain.step()


def test_caches_that_cannot_hold_trees():
    config = MistralConfig(num_hidden_layers=1)
    offloaded = DynamicCache(config=config)
    offloaded.offloading = True  # its constructor wants an accelerator
    other = type("Other", (DynamicCache,), {})(config=config)
    odd = DynamicCache()
    odd.layers = [type("Layer", (DynamicLayer,), {})()]
    for cache in (offloaded, other, odd):
        assert TreeCache.replacing(cache, config, columns=9) is None


# What callers of generate() see of it.

CACHES = {"none": lambda config: DynamicCache(), "config": lambda config: DynamicCache(config=config)}


@pytest.mark.parametrize("made_with", CACHES)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3-text"])
def test_turns_of_a_conversation(leap, architecture, made_with):
    """A cache that goes from call to call, and between stock and us; the last turn passes nothing but its new tokens."""
    model, seen = leap(architecture), []

    def turn(cache, decode, ids, **kwargs):
        expected = expectations[len(turns)] if expectations else None
        kwargs |= {"past_key_values": cache, "max_new_tokens": 9, "do_sample": False, "lmtp_decode": decode}
        if expected is None or decode == "off":
            ids = model.generate(ids, **kwargs)
        else:
            before = torch.zeros(1, expected.shape[1] - 9, dtype=torch.long)
            answer = torch.cat([before, expected[:, -9:]], dim=1)
            with oracle(answer, lambda row, place: (0, 1, None)[place % 3]):
                ids, _ = decoded(model, ids, lmtp_tree=TREES["dynamic"], **kwargs)
        turns.append(ids)
        return ids

    expectations = None
    for first, second, third in (("off",) * 3, ("auto",) * 3, ("off", "auto", "off"), ("auto", "off", "auto")):
        cache, turns = CACHES[made_with](model.config), []
        answer = turn(cache, first, prompt(1, 14))
        lengths = [cache.get_seq_length()]
        answer = turn(cache, second, torch.cat([answer, prompt(1, 5, seed=1)], dim=1))
        lengths.append(cache.get_seq_length())
        new = torch.cat([answer[:, -1:], prompt(1, 4, seed=2)], dim=1)
        known = answer[:, :0] if compat.TAKES_LENGTH else answer[:, :-1]  # until transformers 5.2 no new tokens alone
        mask = torch.ones(1, lengths[-1] + 5, dtype=torch.long)
        turn(cache, third, torch.cat([known, new], dim=1), attention_mask=mask)
        lengths.append(cache.get_seq_length())
        expectations = expectations or turns
        seen.append(([ids.tolist() for ids in turns], lengths))
    assert seen[0][1] == [22, 36, 49]
    assert all(one == seen[0] for one in seen)


def test_turns_of_a_batch_whose_rows_end_early(leap):
    """A row that ended in the first turn goes on in the second with its own past."""
    model, inputs = leap("mistral"), padded([5, 9, 7])
    plain = stock(model, **inputs, max_new_tokens=20, do_sample=False)
    settings = {"do_sample": False, "eos_token_id": [int(plain[0, 12]), int(plain[1, 20])]}
    seen = []
    for decode in ("off", "auto"):
        cache = DynamicCache(config=model.config)
        kwargs = {"past_key_values": cache, "lmtp_decode": decode, "lmtp_tree": TREES["dynamic"]} | settings
        with oracle(plain, lambda row, place: (0, 1, None)[(place + row) % 3]):
            first = model.generate(**inputs, max_new_tokens=20, **kwargs)
        length = cache.get_seq_length()
        ids = torch.cat([first, prompt(3, 4, seed=1)], dim=1)
        mask = (ids != 0).long()  # what stands behind a row's end is padding
        second = model.generate(ids, attention_mask=mask, max_new_tokens=9, **kwargs)
        seen.append((first.tolist(), length, second.tolist(), cache.get_seq_length()))
    assert len({row[9:].count(0) for row in seen[0][0]}) == 3  # the rows do end at different places
    assert seen[0] == seen[1]


@pytest.mark.skipif(not compat.TAKES_COLUMNS, reason="concerns transformers that tell a forward its columns")
def test_a_cache_that_holds_the_whole_prompt_is_left_to_stock(leap):
    model, stats, cache = leap("llama"), DecodeStats(), DynamicCache()
    model.model(prompt(), past_key_values=cache)
    with suppress(IndexError, RuntimeError):  # which 5.2 itself raises
        model.generate(prompt(), past_key_values=cache, max_new_tokens=4, do_sample=False, lmtp_stats=stats)
    assert stats.stock_reason == "the cache holds the whole prompt"


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_past_key_values_of_the_output(leap, architecture):
    """Their length and contents, and what stock generates from them."""
    model = leap(architecture)
    kwargs = {"return_dict_in_generate": True, "max_new_tokens": 15, "do_sample": False}
    theirs = stock(model, prompt(), **kwargs)
    with oracle(theirs.sequences):
        ours, _ = decoded(model, prompt(), lmtp_tree=TREES["chain"], **kwargs)
    assert type(ours) is type(theirs) and type(ours.past_key_values) is DynamicCache
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length() == 9 + 15 - 1
    for mine, expected in zip(ours.past_key_values.layers, theirs.past_key_values.layers):
        assert type(mine) is type(expected)
        torch.testing.assert_close(mine.keys, expected.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.values, expected.values, atol=1e-4, rtol=1e-4)
    for output in (ours, theirs):
        kwargs["past_key_values"] = copy.deepcopy(output.past_key_values)
        output.next = stock(model, output.sequences, **kwargs).sequences
    assert torch.equal(ours.next, theirs.next)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3-text"])
def test_a_static_cache_from_call_to_call(leap, architecture):
    """transformers keeps it on the model: stock and we have to find it in order after each other."""
    model = leap(architecture)
    for length, new in ((9, 20), (7, 20), (20, 25), (5, 6)):
        kwargs = {"cache_implementation": "static", "max_new_tokens": new, "do_sample": False}
        expected = stock(model, prompt(1, length), **kwargs)
        with oracle(expected, lambda row, place: (0, 0, 1, None)[place % 4]):
            _, stats = assert_as_stock(model, prompt(1, length), **kwargs)
        assert stats.tau > 1.2


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3-text"])
def test_a_static_cache_of_the_caller_s(leap, architecture):
    """It keeps its size, so that later turns find room and no shorter window."""
    model, stats = leap(architecture), DecodeStats()
    kwargs = {"do_sample": False, "lmtp_stats": stats}
    cache = StaticCache(model.config, max_cache_len=60)
    ids = model.generate(prompt(), past_key_values=cache, max_new_tokens=10, **kwargs)
    assert stats.strategy == "backward" and int(cache.get_seq_length()) == 18
    assert torch.equal(ids, stock(model, prompt(), max_new_tokens=10, do_sample=False))
    # Once in use it stays stock's.
    for new, seed in ((4, 1), (14, 2)):
        ids = torch.cat([ids, prompt(1, new, seed=seed)], dim=1)
        expected = stock(model, ids, max_new_tokens=10, do_sample=False)
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=10, **kwargs)
        assert stats.stock_reason == "a cache of type StaticCache cannot hold trees"
        assert torch.equal(ids, expected)
