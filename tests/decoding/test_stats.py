"""Statistics of a generation."""

import pytest
import torch

from lmtp_factory.decoding import stats as stats_module
from lmtp_factory.decoding.stats import PHASES, DecodeStats


@pytest.fixture
def clock(monkeypatch):
    """A clock that only ``clock(seconds)`` moves."""
    now = 0.0

    def advance(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(stats_module.time, "perf_counter", lambda: now)
    return advance


def time_phases(stats, device, clock, seconds):
    for phase, duration in zip(PHASES, seconds, strict=True):
        with stats.timed(phase, torch.device(device)):
            clock(duration)


def test_shares_of_the_phases(clock):
    stats = DecodeStats()
    with stats.timed("prefill", torch.device("cpu")):
        clock(50.0)
    assert stats.share("verify") is None  # no step
    time_phases(stats, "cpu", clock, (1.0, 6.0, 2.0, 1.0))
    assert stats.share("verify") == pytest.approx(0.6)
    assert sum(stats.share(phase) for phase in PHASES) == pytest.approx(1.0)


def test_launch_times_of_a_gpu_are_no_shares(clock, monkeypatch):
    """Without a synchronisation, a phase ends when its kernels are launched, not when they are done."""
    stats = DecodeStats()
    time_phases(stats, "cuda", clock, (1.0, 6.0, 2.0, 1.0))
    assert stats.share("verify") is None
    stats, synchronised = DecodeStats(profile=True), []
    monkeypatch.setattr(torch.cuda, "synchronize", synchronised.append)
    time_phases(stats, "cuda", clock, (1.0, 6.0, 2.0, 1.0))
    assert stats.share("verify") == pytest.approx(0.6) and len(synchronised) == len(PHASES)


def test_an_error_ends_the_phase(clock):
    stats = DecodeStats()
    with pytest.raises(KeyError), stats.timed("total", torch.device("cpu")):
        clock(2.0)
        raise KeyError
    assert stats.seconds["total"] == 2.0


def test_counts_of_a_step():
    stats = DecodeStats()
    stats.count_prefill(1)
    for branches in ([[0, 2, 5]], [[0]], [[0, 1]], [[]]):  # the last row had ended
        stats.count(6, branches)
    assert (stats.steps, stats.nodes, stats.drafts, stats.advances) == (3, 18, 3, [3, 1, 2])
    assert (stats.rows, stats.tokens) == (1, 7)
    assert stats.acceptance() == pytest.approx([2 / 3, 1 / 3])
    assert stats.tau == pytest.approx(6 / 3) and DecodeStats().tau == 1.0


def test_a_step_without_a_draft_counts_for_tau_alone():
    stats = DecodeStats()
    stats.count_prefill(1)
    for nodes, branches in ((4, [[0, 1, 2]]), (1, [[0]])):
        stats.count(nodes, branches)
    assert (stats.steps, stats.drafts, stats.tau) == (2, 1, 2.0)
    assert (stats.mean_acceptance_length, stats.acceptance()) == (3.0, [1.0, 1.0])


def test_the_line_has_acceptance_where_something_was_drafted():
    stats = DecodeStats(strategy="backward")
    stats.count_prefill(1)
    assert "acceptance" not in stats.line()
    stats.count(4, [[0, 1, 2]])
    stats.count(4, [[0]])
    assert stats.line().endswith(
        "tau 2.00 (tokens a forward, backward), mean acceptance length 2.00 (by position 50% 50%)"
    )
