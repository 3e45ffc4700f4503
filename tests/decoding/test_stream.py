"""Streams: what stock puts, in its order, and always an end."""

import threading

import pytest
import torch
from helpers.decoding import (
    CHAIN,
    DYNAMIC,
    GREEDY,
    TREES,
    after_prompt,
    assert_as_stock,
    assert_as_stock_with_drafts,
    decoded,
    oracle,
    padded,
    prompt,
    stock,
)
from transformers import (
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from lmtp_factory import LMTPError


class Stream(BaseStreamer):
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        assert not self.ends
        self.puts.append(value.tolist())

    def end(self):
        self.ends += 1


@pytest.mark.parametrize("plan", TREES)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_stream_is_what_stock_puts(leap, plan, rows):
    model, inputs, made = leap(), padded([9, 4, 6, 2][:rows]), []
    new_tokens = after_prompt(stock(model, **inputs, max_new_tokens=24, **GREEDY), inputs)
    ends = [row[place] for row, place in zip(new_tokens, (17, 0, 9))]

    def fresh():
        made.append(Stream())
        return made[-1]

    output, _ = assert_as_stock_with_drafts(model, inputs, TREES[plan], streamer=fresh, eos_token_id=ends)
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
    assert_as_stock_with_drafts(model, inputs, streamer=lambda: TextStreamer(tokenizer, skip_prompt=True))
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
    assert_as_stock(leap(), prompt(), max_new_tokens=5, **GREEDY)


def test_an_unknown_way_to_decode_is_refused(leap):
    stream = Stream()
    with pytest.raises(
        LMTPError, match="lmtp_decode is 'sideways', but it has to be one of auto, backward, forward, off"
    ):
        leap().generate(prompt(), lmtp_decode="sideways", streamer=stream)
    assert stream.ends == 1 and not stream.puts
