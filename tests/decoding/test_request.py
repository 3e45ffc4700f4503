"""What a call of generate asks for reaches its own _sample and no other."""

import threading

import pytest
from transformers.generation.streamers import BaseStreamer

from lmtp_factory import LMTPError
from lmtp_factory.decoding.request import DecodeRequest, current_request, requested
from lmtp_factory.decoding.stats import DecodeStats


def test_the_innermost_request_counts_and_the_outer_one_comes_back():
    outer, inner = DecodeRequest("backward", arrived=True), DecodeRequest("forward", arrived=True)
    with requested(outer, None):
        with requested(inner, None):
            assert current_request() is inner
        assert current_request() is outer
    assert current_request() is not outer


def test_another_thread_does_not_see_it():
    seen = []
    with requested(DecodeRequest("forward", arrived=True), None):
        thread = threading.Thread(target=lambda: seen.append(current_request().strategy))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_a_call_that_never_comes_to_sample_says_so():
    request = DecodeRequest("backward")
    with requested(request, None):
        pass
    assert request.stats.strategy == "off"
    assert request.stats.stock_reason == "beam search, assisted and other special generation has no look-back"
    with requested(switched_off := DecodeRequest("off"), None):
        pass
    assert switched_off.stats.stock_reason is None


def test_statistics_forget_the_strategy_of_the_call_before():
    """Counts add up over calls; strategy and reason are those of the latest call."""
    stats = DecodeStats(strategy="backward", stock_reason="use_cache is off", tokens=7)
    with requested(DecodeRequest("off", stats=stats), None):
        pass
    assert (stats.strategy, stats.stock_reason, stats.tokens) == ("off", None, 7)
    stats.strategy = "forward"
    with pytest.raises(KeyError), requested(DecodeRequest("auto", stats=stats), None):
        raise KeyError
    assert stats.strategy == "off"


class Reader(BaseStreamer):
    ended = 0

    def put(self, value):
        raise AssertionError("nothing was generated")

    def end(self):
        self.ended += 1


def test_an_error_ends_the_stream_and_the_request():
    reader = Reader()
    with pytest.raises(KeyError), requested(DecodeRequest("backward"), reader):
        raise KeyError
    with (
        pytest.raises(LMTPError, match="lmtp_decode is 'sideways', but it has to be one of"),
        requested(DecodeRequest("sideways"), reader),
    ):
        raise AssertionError("an unknown strategy went on")
    assert reader.ended == 2
    assert current_request().strategy == "auto"
