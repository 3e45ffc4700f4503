"""All else that ``generate`` promises: where it stops, whom it calls, what it hands back, and what it leaves to stock."""

import copy
import logging
import threading
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    LogitsProcessor,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer
from trials import PLANS, check, decoded, oracle, padded, prompt, randomise, stir, stock

from lmtp_factory import LMTPError, attach_heads
from lmtp_factory.decoding import generate
from lmtp_factory.decoding.obstacles import obstacle
from lmtp_factory.decoding.stats import DecodeStats


GREEDY = {"do_sample": False}
CHAIN, DYNAMIC = PLANS["chain"], PLANS["dynamic"]


def mixed(row: int, place: int) -> int | None:
    return (0, 0, 1, 0, None, 0, 2)[(place + 3 * row) % 7]


def same(model, inputs, plan=DYNAMIC, rank=mixed, new=24, **kwargs):
    """Equal to stock with branches of all lengths accepted; ours, and the stats.

    ``kwargs`` may hold functions, which are called for every generation: for objects that collect what they see.
    """
    whole = stock(model, **inputs, max_new_tokens=new, **GREEDY)
    settings = {"max_new_tokens": new} | GREEDY | kwargs
    expected = stock(model, **inputs, **{k: v() if callable(v) else v for k, v in settings.items()})
    with oracle(whole, rank):
        settings = {k: v() if callable(v) else v for k, v in settings.items()}
        ours, stats = decoded(model, **inputs, lmtp_tree=plan, **settings)
    assert ours.tolist() == expected.tolist()
    return ours, stats


def after_prompt(output, inputs) -> list[list[int]]:
    return output[:, inputs["input_ids"].shape[1] :].tolist()


# Where it stops.


@pytest.mark.parametrize("plan", ["chain", "dynamic"])
def test_every_token_as_the_end_of_the_sequence(leap, plan):
    """Wherever the end comes in a branch: nothing follows it."""
    model, inputs = leap(), {"input_ids": prompt()}
    (tokens,) = after_prompt(stock(model, **inputs, max_new_tokens=20, **GREEDY), inputs)
    for token in dict.fromkeys(tokens):
        output, stats = same(model, inputs, PLANS[plan], rank=lambda row, place: 0, eos_token_id=[399, token, 398])
        assert output.shape[1] == 9 + tokens.index(token) + 1
        assert stats.tokens == output.shape[1] - 9


@pytest.mark.parametrize("padding", [{"pad_token_id": 7}, {"pad_token_id": None}], ids=["padding", "end as padding"])
@pytest.mark.parametrize("plan", PLANS)
def test_rows_that_end_at_different_places(leap, plan, padding):
    model, inputs = leap("mistral"), padded([9, 4, 6, 2])
    rows = after_prompt(stock(model, **inputs, max_new_tokens=24, **GREEDY), inputs)
    ends = [rows[0][0], rows[1][13], rows[2][6]]  # at the very first token, in the middle; one row may never end
    output, stats = same(model, inputs, PLANS[plan], eos_token_id=ends, **padding)
    lengths = {min([place + 1 for place, token in enumerate(row) if token in ends] or [24]) for row in rows}
    assert len(lengths) > 2 and min(lengths) == 1
    assert stats.rows == 4


@pytest.mark.parametrize("plan", ["chain", "static", "dynamic"])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_longest_output_to_the_token(leap, plan, rows):
    model, inputs = leap(), padded([5, 9][:rows])
    length = inputs["input_ids"].shape[1]
    for new in range(1, 13):
        output, stats = same(model, inputs, PLANS[plan], rank=lambda row, place: 0, max_new_tokens=new)
        assert output.shape[1] == length + new and stats.tokens == rows * new
        assert stats.steps >= rows * (new > 1)
        if plan == "dynamic" and new == 2:
            assert stats.nodes == rows  # a draft would have been thrown away
        output, _ = same(model, inputs, PLANS[plan], max_new_tokens=None, max_length=length + new)
        assert output.shape[1] == length + new


def test_the_default_length(leap):
    output, _ = check(leap(), prompt())
    assert output.shape[1] == 9 + 20


def test_the_end_may_not_come_too_early(leap):
    model, inputs = leap(), {"input_ids": prompt()}
    (tokens,) = after_prompt(stock(model, **inputs, max_new_tokens=20, **GREEDY), inputs)
    for least in (1, 5, 11):
        output, _ = same(model, inputs, eos_token_id=tokens[2], min_new_tokens=least, max_new_tokens=15)
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
    output, _ = same(model, inputs, eos_token_id=355, stop_strings=strings, tokenizer=lambda: tokenizer)
    for row in after_prompt(output, inputs):
        text = tokenizer.decode(row, skip_special_tokens=True)
        assert len(text) < 60 and any(string in text for string in strings)
        assert not any(string in text[:-3] for string in strings)


def test_a_context_used_up(leap):
    """GPT-2 has a table of 48 positions: trees may not look beyond it, and the last place can be reached."""
    model = leap("gpt2")
    for plan in PLANS.values():
        output, _ = same(model, {"input_ids": prompt()}, plan, new=48 - 9)
        assert output.shape[1] == 48
        same(model, padded([9, 4]), plan, new=48 - 9)
        same(model, {"input_ids": prompt()}, plan, new=48 - 9, cache_implementation="static")


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

    output, _ = same(model, {"input_ids": prompt()}, PLANS[plan], **{argument: fresh})
    theirs, ours = ([ids for ids, _ in watcher.calls] for watcher in made)
    assert ours == theirs
    last = output.shape[1] - (kind is Processor)
    assert [len(ids[0]) for ids in ours] == list(range(last - len(ours) + 1, last + 1))
    if kind is Processor:  # with the model's own logits, not yet processed
        for (_, mine), (_, expected) in zip(*(watcher.calls for watcher in made), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind, argument", [(Criterion, "stopping_criteria"), (Processor, "logits_processor")])
def test_criteria_and_processors_see_the_rows_of_a_batch(leap, kind, argument):
    """Row by row, each of its tokens once and in order; stock goes on showing padding after a row's end."""
    model, inputs, made = leap(), padded([9, 4, 6]), []

    def fresh():
        made.append(kind())
        return [made[-1]]

    same(model, inputs, eos_token_id=355, **{argument: fresh})
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

    same(leap("mistral"), {"input_ids": prompt()}, guidance_scale=1.7)
    for scheme in ("lefthash", "selfhash"):
        watermark = WatermarkingConfig(bias=2.5, seeding_scheme=scheme)
        same(leap(), padded([9, 5]), new=10, watermarking_config=watermark)


# Streams.


class Stream(BaseStreamer):
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        assert not self.ends
        self.puts.append(value.tolist())

    def end(self):
        self.ends += 1


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_stream_is_what_stock_puts(leap, plan, rows):
    model, inputs, made = leap(), padded([9, 4, 6, 2][:rows]), []
    new_tokens = after_prompt(stock(model, **inputs, max_new_tokens=24, **GREEDY), inputs)
    ends = [row[place] for row, place in zip(new_tokens, (17, 0, 9))]

    def fresh():
        made.append(Stream())
        return made[-1]

    output, _ = same(model, inputs, PLANS[plan], streamer=fresh, eos_token_id=ends)
    theirs, ours = made
    assert ours.puts == theirs.puts and ours.ends == theirs.ends == 1
    assert torch.tensor(ours.puts[1:]).T.tolist() == after_prompt(output, inputs)


def test_tokens_are_streamed_as_they_come(leap):
    """Not at the end: what a step decided is out before the next one."""
    model, stream, behind = leap(), Stream(), []

    def watch(input_ids, scores, **kwargs):
        behind.append(input_ids.shape[1] - 9 - (len(stream.puts) - 1))
        return torch.zeros(1, dtype=torch.bool)

    whole = stock(model, prompt(), max_new_tokens=24, **GREEDY)
    with oracle(whole):
        kwargs = {"stopping_criteria": [watch], "streamer": stream, "max_new_tokens": 24} | GREEDY
        _, stats = decoded(model, prompt(), lmtp_tree=CHAIN, **kwargs)
    assert max(behind) == 5 and behind.count(1) == stats.steps + 1  # a step's first token finds all others streamed


def test_text_streamers(leap, tokenizer, capsys):
    model, inputs = leap(), {"input_ids": prompt()}
    same(model, inputs, streamer=lambda: TextStreamer(tokenizer, skip_prompt=True))
    text = capsys.readouterr().out
    assert len(text) > 20 and text[: len(text) // 2] == text[len(text) // 2 :]  # stock's, then ours

    streamer, outputs = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60), []
    kwargs = {"streamer": streamer, "max_new_tokens": 24, "lmtp_tree": DYNAMIC} | GREEDY
    thread = threading.Thread(target=lambda: outputs.append(decoded(model, prompt(), **kwargs)))
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == text[: len(text) // 2].removesuffix("\n") and len(outputs) == 1


def test_a_stream_ends_when_a_criterion_fails(leap):
    def fail(input_ids, scores, **kwargs):
        if input_ids.shape[1] == 15:
            raise RuntimeError("out of patience")
        return torch.zeros(1, dtype=torch.bool)

    stream = Stream()
    with pytest.raises(RuntimeError, match="out of patience"):
        leap().generate(prompt(), stopping_criteria=[fail], streamer=stream, max_new_tokens=24, **GREEDY)
    assert stream.ends == 1 and len(stream.puts) > 1
    # The model is as before.
    check(leap(), prompt(), max_new_tokens=5, **GREEDY)


def test_an_unknown_way_to_decode_is_refused(leap):
    stream = Stream()
    with pytest.raises(
        LMTPError, match="lmtp_decode is 'sideways', but it has to be one of auto, backward, forward, off"
    ):
        leap().generate(prompt(), lmtp_decode="sideways", streamer=stream)
    assert stream.ends == 1 and not stream.puts


# What it hands back.


@pytest.mark.parametrize("plan", ["chain", "dynamic"])
@pytest.mark.parametrize("rows", [1, 3])
def test_scores_and_logits(leap, plan, rows):
    model, inputs = leap("mistral"), padded([9, 4, 6][:rows])
    kwargs = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 20}
    kwargs |= {"repetition_penalty": 1.3, "bad_words_ids": [[25]]} | GREEDY
    theirs = stock(model, **inputs, **kwargs)
    with oracle(theirs.sequences, mixed):
        ours, stats = decoded(model, **inputs, lmtp_tree=PLANS[plan], **kwargs)
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
        with oracle(whole, mixed):
            model.generate(**inputs, max_new_tokens=20, lmtp_stats=stats, lmtp_tree=DYNAMIC, **GREEDY)
    assert (stats.strategy, stats.rows, stats.tokens) == ("backward", 4, 80)
    assert stats.steps + sum(stats.accepted) == 80 - 4  # every token but the prefills' is a step's own or accepted
    assert stats.tau == pytest.approx(1 + sum(stats.acceptance())) and stats.tau > 1.3
    assert stats.accepted == sorted(stats.accepted, reverse=True)
    assert stats.nodes >= stats.steps and 0 < stats.seconds["verify"] < stats.seconds["total"]


# What it leaves to stock.


OTHER_SEARCH = "beam search, assisted and other special generation has no look-back"


def left_to_stock(model, reason, caplog, *args, expected=None, **kwargs):
    """As stock, and the log says why, once for any number of calls."""
    generate._say_once.cache_clear()
    stats, outputs = DecodeStats(), []
    if expected is None:
        expected = stock(model, *args, **kwargs)
    with caplog.at_level(logging.WARNING, logger="lmtp_factory"):
        for _ in range(2):
            outputs.append(model.generate(*args, lmtp_stats=stats, **kwargs))
    said = [record.message for record in caplog.records if record.name.startswith("lmtp_factory")]
    assert said == [f"Decoding without leap heads: {reason}."]
    assert stats.strategy == f"off: {reason}" and stats.tokens == 0
    for output in outputs:
        ours, theirs = (getattr(o, "sequences", o) for o in (output, expected))
        assert torch.equal(ours, theirs)
    return outputs[0]


@pytest.mark.parametrize(
    "reason, kwargs",
    [
        ("use_cache is off", {"use_cache": False}),
        ("prefill_chunk_size is set", {"prefill_chunk_size": 4}),
        *(
            ("attentions or hidden states are wanted", {name: True, "return_dict_in_generate": True})
            for name in ("output_attentions", "output_hidden_states")
        ),
    ],
    ids=str,
)
def test_calls_that_need_every_forward(leap, reason, kwargs, caplog):
    output = left_to_stock(leap("llama", "eager"), reason, caplog, prompt(), max_new_tokens=6, **GREEDY, **kwargs)
    if "return_dict_in_generate" in kwargs:
        assert len(output["attentions" if "output_attentions" in kwargs else "hidden_states"]) == 6


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 355},
    ],
    ids=str,
)
def test_other_ways_to_search_are_none_of_our_business(leap, kwargs, caplog):
    left_to_stock(leap(), OTHER_SEARCH, caplog, prompt(), max_new_tokens=8, **GREEDY, **kwargs)


def test_beams_that_sample(leap):
    outputs = []
    for decode in ("off", "auto"):
        torch.manual_seed(0)
        kwargs = {"num_beams": 2, "do_sample": True, "max_new_tokens": 8}
        outputs.append(leap().generate(prompt(), lmtp_decode=decode, **kwargs))
    assert torch.equal(*outputs)


def test_with_an_assistant_and_as_one(leap, caplog):
    """The assistant crops the cache that we hand back."""
    model = leap()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = stock(other, prompt(), max_new_tokens=16, **GREEDY)
    left_to_stock(
        other, OTHER_SEARCH, caplog, prompt(), expected=expected, assistant_model=model, max_new_tokens=16, **GREEDY
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2},
        {"prefix_allowed_tokens_fn": lambda row, ids: [20 + row, 30 + row, 40 + len(ids)]},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_processors_that_know_rows_by_number(leap, kwargs, caplog):
    reason = "a logits processor wants the whole batch"
    left_to_stock(leap(), reason, caplog, **padded([9, 5]), max_new_tokens=8, **GREEDY, **kwargs)
    check(leap(), prompt(), max_new_tokens=8, **GREEDY, **kwargs)


class AtLength(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 15)


def test_rows_that_nothing_pads(leap, caplog):
    reason = "rows of a batch end by a criterion of their own and there is no end-of-sequence token to pad with"
    kwargs = {"stopping_criteria": [AtLength()], "max_new_tokens": 9} | GREEDY
    left_to_stock(leap(), reason, caplog, **padded([9, 5]), **kwargs)
    caplog.clear()
    left_to_stock(leap(), reason, caplog, **padded([9, 5]), max_time=60.0, max_new_tokens=9, **GREEDY)


@pytest.mark.parametrize("name", ["output_scores", "output_logits"])
def test_scores_of_rows_that_end_before_others(leap, name, caplog):
    """Stock goes on scoring their padding."""
    model, inputs, kwargs = leap(), padded([9, 5]), {name: True, "return_dict_in_generate": True} | GREEDY
    end = int(stock(model, **inputs, max_new_tokens=9, **GREEDY)[0, 13])
    reason = "scores are wanted of rows that may end before others"
    left_to_stock(model, reason, caplog, **inputs, max_new_tokens=9, eos_token_id=end, **kwargs)
    decoded(model, **inputs, max_new_tokens=9, **kwargs)  # all rows have nine
    decoded(model, prompt(), max_new_tokens=9, eos_token_id=end, **kwargs)


def test_caches_that_cannot_go_back(leap, caplog):
    kind = type("Unknown", (DynamicCache,), {})
    generate._say_once.cache_clear()
    stats = DecodeStats()
    with caplog.at_level(logging.WARNING, logger="lmtp_factory"):
        kwargs = {"max_new_tokens": 8} | GREEDY
        output = leap().generate(prompt(), past_key_values=kind(), lmtp_stats=stats, **kwargs)
    assert stats.strategy == "off: a cache of type Unknown cannot hold trees"
    assert torch.equal(output, stock(leap(), prompt(), **kwargs))


def test_gpus_in_step(leap, caplog, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        kwargs = {"synced_gpus": True, "max_new_tokens": 6} | GREEDY
        left_to_stock(leap(), "synced_gpus is on", caplog, prompt(), **kwargs)
    finally:
        torch.distributed.destroy_process_group()


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [3.0, 4.0, 5.0, 6.0],
        "factor": 2.0,
        "original_max_position_embeddings": 24,
        "rope_theta": 10000.0,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings_that_change_with_the_length(leap, kind, caplog):
    """Up to the length where they do it is decoded; a tree that looks beyond is not let near it."""
    model = leap("llama", rope_parameters=ROPES[kind], max_position_embeddings=24 if kind == "dynamic" else 48)
    reason = "generation may pass the length at which this model's rotary embedding changes"
    with oracle(stock(model, prompt(), max_new_tokens=15, **GREEDY)):
        check(model, prompt(), max_new_tokens=15, **GREEDY)
    left_to_stock(model, reason, caplog, prompt(), max_new_tokens=16, **GREEDY)
    caplog.clear()
    embedded = model.get_input_embeddings()(prompt()).detach()
    left_to_stock(model, reason, caplog, inputs_embeds=embedded, max_new_tokens=16, **GREEDY)
    caplog.clear()
    late = torch.arange(9)[None] + 10
    left_to_stock(model, reason, caplog, prompt(), position_ids=late, max_new_tokens=6, **GREEDY)


def test_models_that_cannot_be_sped_up(leap):
    """What would take another machine or another model to run, by the words alone."""
    model = leap()
    config = SimpleNamespace(
        prefill_chunk_size=None, output_attentions=False, output_hidden_states=False, max_length=20, output_scores=False,
        output_logits=False, return_dict_in_generate=False,
    )  # fmt: skip

    def reason(text_config=None, **kwargs):
        stand_in = SimpleNamespace(config=copy.deepcopy(model.config))
        for name, value in (text_config or {}).items():
            setattr(stand_in.config, name, value)
        inputs = {"use_cache": True, "past_key_values": DynamicCache(), "position_ids": torch.arange(9)[None]} | kwargs
        return obstacle(stand_in, prompt(), [], [], config, inputs)

    assert reason() is None
    assert reason({"_attn_implementation_internal": "flash_attention_2"}) == (
        "attention flash_attention_2 takes no tree mask, load with attn_implementation sdpa (flash_attn: sdpa)"
    )
    assert reason({"layer_types": ["linear_attention", "full_attention"]}) == (
        "layers of type linear_attention cannot go back"
    )
    assert reason({"layer_types": ["sliding_attention", "full_attention"]}) is None
    assert reason({"num_kv_shared_layers": 1}) == "layers share keys and values"
    assert reason(position_ids=None) == "the model takes no position_ids"
    assert reason(past_key_values=None) == "use_cache is off"


def small(kind, config_kind, **config):
    torch.manual_seed(0)
    config = {"vocab_size": 400, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | config
    model = kind(config_kind(**config)).eval()
    stir(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return attach_heads(model)


@pytest.mark.parametrize(
    "build",
    [
        # A dense layer between the last hidden state and the vocabulary: the heads' own view of the model is wrong.
        lambda: small(
            BertLMHeadModel, BertConfig, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, is_decoder=True
        ),
        # No cache, and a mask of its own.
        lambda: small(OpenAIGPTLMHeadModel, OpenAIGPTConfig, n_embd=32, n_layer=2, n_head=4),
    ],
    ids=["bert", "openai-gpt"],
)
def test_models_whose_forward_takes_no_trees(build, caplog):
    """They are found out by trying."""
    reason = "a forward over a tree is not what forwards over its branches are"
    left_to_stock(build(), reason, caplog, prompt(), max_new_tokens=8, **GREEDY)
    caplog.clear()
    left_to_stock(build(), reason, caplog, **padded([9, 4]), max_new_tokens=8, **GREEDY)


def test_dropout_does_not_spoil_the_trial(leap):
    model = copy.deepcopy(leap("llama", attention_dropout=0.9))
    model.__dict__.pop("_takes_trees", None)
    model.train()
    stats = DecodeStats()
    model.generate(prompt(), max_new_tokens=4, lmtp_stats=stats, **GREEDY)
    assert stats.strategy.startswith("off: a forward over a tree")
    model.eval()
    check(model, prompt(), max_new_tokens=8, **GREEDY)


# Around it.


def adapted(leap, tmp_path, config):
    import tiny

    model = AutoModelForCausalLM.from_pretrained(tiny.tiny_llama(tmp_path))
    stir(model)
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    attach_heads(model)
    randomise(model)
    return model.eval()


def test_heads_beside_an_unmerged_adapter(leap, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = adapted(leap, tmp_path, config)
    output, stats = same(model, {"input_ids": prompt()})
    assert stats.tau > 1.3
    with model.disable_adapter():
        without, _ = check(model, input_ids=prompt(), max_new_tokens=24, **GREEDY)
    assert without.tolist() != output.tolist()


def test_prompt_tuning_is_left_to_stock(leap, tmp_path, caplog):
    model = adapted(leap, tmp_path, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    reason = "its inputs are prepared by somebody else, as in prompt tuning"
    left_to_stock(model, reason, caplog, input_ids=prompt(), max_new_tokens=8, **GREEDY)


def test_threads_that_ask_for_different_things(leap):
    model, outputs = leap(), {}
    expected = [stock(model, prompt(seed=seed), max_new_tokens=24, **GREEDY) for seed in range(4)]

    def work(seed):
        stats = DecodeStats()
        decode = ("auto", "off", "forward", "backward")[seed]
        kwargs = {"lmtp_decode": decode, "lmtp_stats": stats, "max_new_tokens": 24} | GREEDY
        outputs[seed] = model.generate(prompt(seed=seed), **kwargs), stats.strategy

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outputs[seed][1] for seed in range(4)] == ["backward", "off", "forward", "backward"]
    assert all(torch.equal(outputs[seed][0], expected[seed]) for seed in range(4))


def test_a_criterion_that_generates_itself(leap):
    """Each call has its own wishes, the inner one too."""
    model, inner = leap(), DecodeStats()
    answer = stock(model, prompt(seed=1), max_new_tokens=5, **GREEDY)

    def ask(input_ids, scores, **kwargs):
        model.generate(prompt(seed=1), max_new_tokens=5, lmtp_stats=inner, lmtp_decode="forward", **GREEDY)
        return torch.zeros(1, dtype=torch.bool)

    expected = stock(model, prompt(), max_new_tokens=6, **GREEDY)
    ours, stats = decoded(model, prompt(), max_new_tokens=6, stopping_criteria=[ask], **GREEDY)
    assert torch.equal(ours, expected) and torch.equal(stock(model, prompt(seed=1), max_new_tokens=5, **GREEDY), answer)
    assert (stats.strategy, stats.rows, inner.strategy, inner.rows) == ("backward", 1, "forward", 6)


def test_autocast_and_inference_mode(leap):
    kwargs = {"max_new_tokens": 8} | GREEDY
    with torch.inference_mode():
        check(leap(), prompt(), **kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # near ties may differ
        assert decoded(leap(), prompt(), **kwargs)[1].tokens == 8
    check(leap(), prompt(), **kwargs)
