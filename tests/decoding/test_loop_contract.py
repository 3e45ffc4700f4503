"""What ``generate`` promises: where it stops, whom it calls and what it hands back."""

import copy

import pytest
import torch
from helpers.decoding import (
    DYNAMIC,
    GREEDY,
    TREES,
    after_prompt,
    assert_as_stock,
    assert_as_stock_with_drafts,
    decoded,
    mixed_ranks,
    oracle,
    padded,
    prompt,
    stock,
)
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
)

from lmtp_factory.decoding.state import DecodeState
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.stream import Stream


# Where it stops.


@pytest.mark.parametrize("plan", ["chain", "dynamic"])
def test_any_generated_token_may_be_the_end_token(leap, plan):
    """Wherever the end comes in a branch: nothing follows it."""
    model, inputs = leap(), {"input_ids": prompt()}
    (tokens,) = after_prompt(stock(model, **inputs, max_new_tokens=20, **GREEDY), inputs)
    for token in dict.fromkeys(tokens):
        output, stats = assert_as_stock_with_drafts(
            model, inputs, TREES[plan], rank=lambda row, place: 0, eos_token_id=[399, token, 398]
        )
        assert output.shape[1] == 9 + tokens.index(token) + 1
        assert stats.tokens == output.shape[1] - 9


@pytest.mark.parametrize("padding", [{"pad_token_id": 7}, {"pad_token_id": None}], ids=["padding", "end as padding"])
@pytest.mark.parametrize("plan", TREES)
def test_rows_that_end_at_different_places(leap, plan, padding):
    model, inputs = leap("mistral"), padded([9, 4, 6, 2])
    rows = after_prompt(stock(model, **inputs, max_new_tokens=24, **GREEDY), inputs)
    ends = [rows[0][0], rows[1][13], rows[2][6]]  # at the very first token, in the middle; one row may never end
    output, stats = assert_as_stock_with_drafts(model, inputs, TREES[plan], eos_token_id=ends, **padding)
    lengths = {min([place + 1 for place, token in enumerate(row) if token in ends] or [24]) for row in rows}
    assert len(lengths) > 2 and min(lengths) == 1
    assert stats.rows == 4


@pytest.mark.parametrize("plan", ["chain", "static", "dynamic"])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_longest_output_to_the_token(leap, plan, rows):
    model, inputs = leap(), padded([5, 9][:rows])
    length = inputs["input_ids"].shape[1]
    for new in range(1, 13):
        output, stats = assert_as_stock_with_drafts(
            model, inputs, TREES[plan], rank=lambda row, place: 0, max_new_tokens=new
        )
        assert output.shape[1] == length + new and stats.tokens == rows * new
        assert stats.steps >= rows * (new > 1)
        if plan == "dynamic" and new == 2:
            assert stats.nodes == rows  # a draft would have been thrown away
        output, _ = assert_as_stock_with_drafts(
            model, inputs, TREES[plan], max_new_tokens=None, max_length=length + new
        )
        assert output.shape[1] == length + new


def test_the_default_length(leap):
    output, _ = assert_as_stock(leap(), prompt())
    assert output.shape[1] == 9 + 20


def test_min_new_tokens(leap):
    model, inputs = leap(), {"input_ids": prompt()}
    (tokens,) = after_prompt(stock(model, **inputs, max_new_tokens=20, **GREEDY), inputs)
    for least in (1, 5, 11):
        output, _ = assert_as_stock_with_drafts(
            model, inputs, eos_token_id=tokens[2], min_new_tokens=least, max_new_tokens=15
        )
        assert output.shape[1] >= 9 + least


@pytest.mark.parametrize("rows", [1, 3])
def test_stop_strings(leap, tokenizer, rows):
    model, inputs = leap(), padded([5, 9, 7][:rows])
    strings = []
    for tokens in after_prompt(stock(model, **inputs, max_new_tokens=24, **GREEDY), inputs):
        words = [tokenizer.decode([token]) for token in tokens]
        good = [word.isascii() and word.isprintable() and len(word) > 1 for word in words]
        place = good.index(True, 4)
        strings.append(words[place][1:] + words[place + 1][:1])  # from the middle of a token into the next
    output, _ = assert_as_stock_with_drafts(
        model, inputs, eos_token_id=355, stop_strings=strings, tokenizer=lambda: tokenizer
    )
    for row in after_prompt(output, inputs):
        text = tokenizer.decode(row, skip_special_tokens=True)
        assert len(text) < 60 and any(string in text for string in strings)
        assert not any(string in text[:-3] for string in strings)


def test_generation_stops_where_the_context_ends(leap):
    """GPT-2 has a table of 48 positions: trees may not look beyond it, and the last place can be reached."""
    model = leap("gpt2")
    for plan in TREES.values():
        output, _ = assert_as_stock_with_drafts(model, {"input_ids": prompt()}, plan, new=48 - 9)
        assert output.shape[1] == 48
        assert_as_stock_with_drafts(model, padded([9, 4]), plan, new=48 - 9)
        assert_as_stock_with_drafts(model, {"input_ids": prompt()}, plan, new=48 - 9, cache_implementation="static")


# Whom it calls.


class Watcher:
    """Collects what every call is given: (input_ids, scores) a call, each with all rows."""

    def __init__(self):
        self.calls = []

    def note(self, input_ids, scores):
        self.calls.append((input_ids.tolist(), copy.copy(scores)))

    def rows(self) -> set[tuple[int, ...]]:
        return {tuple(row) for ids, _ in self.calls for row in ids}


class Criterion(Watcher, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.note(input_ids, scores)
        return torch.tensor([len(row) > 15 and sum(row) % 7 == 0 for row in input_ids.tolist()])


class Processor(Watcher, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.note(input_ids, scores)
        return scores - 100.0 * (torch.arange(scores.shape[1]) % 5 == input_ids[:, -1:] % 5)


@pytest.mark.parametrize("kind, argument", [(Criterion, "stopping_criteria"), (Processor, "logits_processor")])
@pytest.mark.parametrize("plan", ["chain", "dynamic"])
def test_criteria_and_processors_see_every_token_once(leap, kind, argument, plan):
    model, made = leap(), []

    def fresh():
        made.append(kind())
        return [made[-1]]

    output, _ = assert_as_stock_with_drafts(model, {"input_ids": prompt()}, TREES[plan], **{argument: fresh})
    theirs, ours = ([ids for ids, _ in watcher.calls] for watcher in made)
    assert ours == theirs
    last = output.shape[1] - (kind is Processor)
    assert [len(ids[0]) for ids in ours] == list(range(last - len(ours) + 1, last + 1))
    if kind is Processor:  # with the model's own logits, not yet processed
        for (_, mine), (_, expected) in zip(*(watcher.calls for watcher in made), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind, argument", [(Criterion, "stopping_criteria"), (Processor, "logits_processor")])
def test_criteria_and_processors_see_the_rows_of_a_batch(leap, kind, argument, monkeypatch):
    """Those of transformers: row by row, each of its tokens once and in order; stock goes on showing padding after a
    row's end."""
    monkeypatch.setattr(kind, "__module__", "transformers.generation.tests")
    model, inputs, made = leap(), padded([9, 4, 6]), []

    def fresh():
        made.append(kind())
        return [made[-1]]

    assert_as_stock_with_drafts(model, inputs, eos_token_id=355, **{argument: fresh})
    theirs, ours = made
    assert all(len(ids) == 1 for ids, _ in ours.calls)
    seen = [tuple(ids[0]) for ids, _ in ours.calls]
    assert len(set(seen)) == len(seen) and set(seen) <= theirs.rows()
    for row in inputs["input_ids"].tolist():
        lengths = [len(ids) for ids in seen if ids[:9] == tuple(row)]
        assert lengths == list(range(lengths[0], lengths[0] + len(lengths))) and lengths[0] == 9 + (kind is Criterion)
    over = {0, 355} if kind is Processor else {0}
    assert all(row in seen or over & set(row[9:]) for row in theirs.rows())


def test_scores_reach_the_criteria_that_ask_for_them(leap):
    made = []

    def fresh():
        made.append(Criterion())
        return [made[-1]]

    model = leap()
    kwargs = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 9} | GREEDY
    stock(model, prompt(), stopping_criteria=fresh(), **kwargs)
    decoded(model, prompt(), stopping_criteria=fresh(), **kwargs)
    assert [len(scores) for _, scores in made[1].calls] == [len(scores) for _, scores in made[0].calls]


def test_a_processor_of_the_whole_past_and_one_of_its_own_forwards(leap):
    """Guidance runs the model itself in between; watermarks hash what came before."""
    from transformers import WatermarkingConfig

    assert_as_stock_with_drafts(leap("mistral"), {"input_ids": prompt()}, guidance_scale=1.7)
    for scheme in ("lefthash", "selfhash"):
        watermark = WatermarkingConfig(bias=2.5, seeding_scheme=scheme)
        assert_as_stock_with_drafts(leap(), padded([9, 5]), new=10, watermarking_config=watermark)


# What it hands back.


@pytest.mark.parametrize("plan", ["chain", "dynamic"])
@pytest.mark.parametrize("rows", [1, 3])
def test_scores_and_logits(leap, plan, rows):
    model, inputs = leap("mistral"), padded([9, 4, 6][:rows])
    kwargs = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 20}
    kwargs |= {"repetition_penalty": 1.3, "bad_words_ids": [[25]]} | GREEDY
    theirs = stock(model, **inputs, **kwargs)
    with oracle(theirs.sequences, mixed_ranks):
        ours, stats = decoded(model, **inputs, lmtp_tree=TREES[plan], **kwargs)
    assert type(ours) is type(theirs) and set(ours) == set(theirs) and stats.tau > 1.3
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)
    assert all(torch.isinf(scores[:, 25]).all() for scores in ours.scores)
    transition = [model.compute_transition_scores(o.sequences, o.scores, normalize_logits=True) for o in (ours, theirs)]
    torch.testing.assert_close(*transition, rtol=1e-3, atol=1e-3)


def test_an_output_without_scores(leap):
    kwargs = {"return_dict_in_generate": True, "max_new_tokens": 4} | GREEDY
    ours, theirs = decoded(leap(), prompt(), **kwargs)[0], stock(leap(), prompt(), **kwargs)
    assert set(ours) == set(theirs) == {"sequences", "past_key_values"}
    assert torch.equal(ours.sequences, theirs.sequences)


def test_stats_add_up(leap):
    model, stats = leap(), DecodeStats()
    for inputs in ({"input_ids": prompt()}, padded([9, 4, 6])):
        whole = stock(model, **inputs, max_new_tokens=20, **GREEDY)
        with oracle(whole, mixed_ranks):
            model.generate(**inputs, max_new_tokens=20, lmtp_stats=stats, lmtp_tree=DYNAMIC, **GREEDY)
    assert (stats.strategy, stats.rows, stats.tokens) == ("backward", 4, 80)
    assert stats.steps + sum(stats.accepted) == 80 - 4  # every token but the prefills' is a step's own or accepted
    assert stats.drafts < stats.steps  # before the last token there is nothing to draft
    assert stats.mean_acceptance_length == pytest.approx(1 + sum(stats.accepted) / stats.drafts) and stats.tau > 1.3
    assert stats.accepted == sorted(stats.accepted, reverse=True)
    assert stats.nodes >= stats.steps and 0 < stats.seconds["verify"] < stats.seconds["total"]


@pytest.mark.parametrize("flushes", [1, 4], ids=["after the prefill", "after a step"])
@pytest.mark.parametrize("rows", [1, 2])
def test_stats_of_a_call_that_raises_are_those_of_its_complete_steps(leap, rows, flushes, monkeypatch):
    model, stats, done = leap(), DecodeStats(), []
    kwargs = {"max_new_tokens": 20, "lmtp_stats": stats, "lmtp_tree": DYNAMIC} | GREEDY

    def broken(stream):
        done.append(stream)
        if len(done) == flushes:
            raise BrokenPipeError

    model.generate(prompt(), **kwargs)
    before = stats.seconds["total"]
    monkeypatch.setattr(Stream, "flush", broken)
    with pytest.raises(BrokenPipeError):
        model.generate(prompt(rows), **kwargs)
    assert stats.rows == 1 + rows and stats.seconds["total"] > before
    assert stats.tokens == stats.rows + sum(stats.advances) and stats.tau == sum(stats.advances) / stats.steps


def test_stats_of_a_call_that_raises_in_its_prefill_count_no_row(leap, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    stats = DecodeStats()
    monkeypatch.setattr(DecodeState, "prefill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        leap().generate(prompt(), max_new_tokens=20, lmtp_stats=stats, **GREEDY)
    assert (stats.rows, stats.tokens, stats.tau) == (0, 0, 1.0)
