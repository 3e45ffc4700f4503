"""Drafts pay for themselves, or stop: simulated texts with the time of each step given, and real generations."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtp_factory.decoding.draft_budget import ALLOWANCE, MOST, PROBE_NODES, STAKE, DraftBudget


def simulate(accepted, extra: float, tokens: int, budget=None, noise=lambda: 1.0) -> tuple[float, int]:
    """Seconds for ``tokens`` tokens where a plain step takes 1; and how many drafts there were.

    Args:
        accepted: () -> how many tokens a draft brings, of which a probe brings 1 at most.
        extra: what a draft and its verification add to a step; a probe adds half of it.
    """
    budget = budget or DraftBudget()
    seconds, done, drafts = 0.0, 0, 0
    while done < tokens:
        step = noise()
        if (nodes := budget.affordable(16)) > 1:
            brought, step = accepted(), step * (1 + (extra if nodes == 16 else extra / 2))
            brought = brought if nodes == 16 else min(brought, 1)
            budget.record_draft(step, nodes, brought)
            done, drafts = done + 1 + brought, drafts + 1
        else:
            budget.record_plain(step)
            done += 1
        seconds += step
    return seconds, drafts


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=400), st.floats(0.02, 3.0), st.integers(16, 400), st.integers(1, 2)
)
def test_the_loss_is_bounded_whatever_is_accepted(pattern, extra, tokens, scale):
    """At most the allowance of the plain steps, the first drafts before their time is known, and one draft too many; good
    text may lay up MOST for bad text behind it, which it has won before."""
    brought = iter(pattern * 400)
    seconds, _ = simulate(lambda: next(brought), extra, tokens, noise=lambda: float(scale))
    assert seconds / scale <= tokens + ALLOWANCE * tokens + 2 * extra + max(pattern)


def test_text_that_accepts_nothing_costs_little():
    for extra in (0.1, 0.25, 0.5, 1.0):
        seconds, drafts = simulate(lambda: 0, extra, 200)
        assert seconds <= 200 * 1.02 and drafts >= 1


def test_short_answers_that_accept_nothing_cost_one_draft():
    for tokens in range(5, 16):
        seconds, drafts = simulate(lambda: 0, 0.3, tokens)
        assert drafts == 1 and seconds <= tokens + 0.15 + 1e-6


@pytest.mark.parametrize("gain, stake", [(0.0, 0.0), (0.1, 0.1), (5.0, STAKE), (-1.0, 0.0)])
def test_a_measured_gain_is_staked_up_to_a_limit(gain, stake):
    assert DraftBudget(gain).balance == stake


def test_a_measured_gain_pays_for_a_second_probe_and_no_more_than_the_stake_is_lost():
    for extra in (0.1, 0.25, 0.5):
        seconds, drafts = simulate(lambda: 0, extra, 30, DraftBudget(1.0))
        without, fewer = simulate(lambda: 0, extra, 30)
        assert drafts > fewer and seconds - without <= STAKE + extra / 2


def test_a_whole_tree_is_drafted_once_the_balance_can_lose_it():
    budget = DraftBudget()
    assert budget.affordable(16) == 1  # nothing is known of this machine
    budget.record_plain(1.0)
    assert budget.affordable(16) == PROBE_NODES and budget.affordable(3) == 3
    budget.record_draft(1.2, PROBE_NODES, accepted=1)
    assert budget.balance == pytest.approx(ALLOWANCE + 0.8) and budget.affordable(16) == 16
    budget.record_draft(1.9, 16, accepted=0)  # a first time counts as 0.5 at most
    assert budget.balance == pytest.approx(ALLOWANCE + 0.3)
    assert budget.affordable(16) == PROBE_NODES
    budget.record_draft(1.2, PROBE_NODES, accepted=0)
    budget.record_draft(1.2, PROBE_NODES, accepted=0)
    assert budget.balance < 0 and budget.affordable(16) == 1


def test_the_extra_time_of_a_whole_tree_is_measured_where_trees_are_cut():
    """Not that of trees which are as large as the cut ones, nor that of probes."""
    budget = DraftBudget(0.2)
    budget.record_plain(1.0)
    assert budget.balance == pytest.approx(0.21) and budget.affordable(16) == PROBE_NODES  # 0.5, as nothing is known
    budget.record_draft(1.05, 3, accepted=0.05, offered=PROBE_NODES)
    assert budget.affordable(16) == PROBE_NODES
    budget.record_draft(1.1, 2, accepted=0.1, offered=16)
    assert budget.balance == pytest.approx(0.21) and budget.affordable(16) == 16
    for _ in range(2):
        budget.record_draft(1.4, 9, accepted=0.4, offered=16)
    budget.record_plain(1.0)
    assert 0.2 < budget.balance < 0.4 and budget.affordable(16) == PROBE_NODES


def test_text_that_accepts_much_is_drafted_throughout():
    generator = random.Random(0)
    seconds, drafts = simulate(lambda: generator.choice((1, 2, 3)), 0.4, 600)
    always = 600 / 3 * 1.4
    assert seconds < 1.03 * always and drafts > 180


def test_drafts_come_back_when_the_text_turns_good():
    """Bad, then good for ever: the pauses are short enough to find out."""
    budget = DraftBudget()
    simulate(lambda: 0, 0.4, 100, budget)
    generator = random.Random(1)
    seconds, _ = simulate(lambda: generator.choice((0, 2, 2, 3)), 0.4, 1000, budget)
    assert seconds < 0.75 * 1000


def test_good_text_lays_up_only_so_much():
    budget = DraftBudget()
    simulate(lambda: 4, 0.4, 1000, budget)
    assert budget.balance == MOST
    seconds, _ = simulate(lambda: 0, 0.4, 1000, budget)
    assert seconds <= 1000 * (1 + ALLOWANCE) + MOST + 0.4 + 0.01


def test_one_slow_step_does_not_end_drafting():
    """The first draft of a process makes int8 weights, and a machine has other things to do now and then."""
    budget, slow = DraftBudget(), iter([1.0, 30.0, *[1.0] * 20, 30.0, *[1.0] * 10_000])
    _, drafts = simulate(lambda: 1, 0.3, 400, budget, noise=lambda: next(slow))
    assert drafts > 190


def test_a_slow_first_whole_tree_does_not_end_whole_trees():
    """It may load kernels. The balance never reaches what such a step seems to cost."""
    budget, whole = DraftBudget(), 0
    for _ in range(300):
        nodes = budget.affordable(32)
        if nodes == 1:
            budget.record_plain(1.0)
        else:
            whole += nodes == 32
            budget.record_draft(5.0 if whole == 1 and nodes == 32 else 1.2, nodes, accepted=1)
    assert whole > 200


def test_a_slow_first_step_does_not_pay_for_drafts():
    """A pause of the machine in the only plain step known so far is no gain of the drafts behind it."""
    budget, slow = DraftBudget(), iter([100.0, *[1.0] * 10_000])
    _, drafts = simulate(lambda: 0, 0.3, 60, budget, noise=lambda: next(slow))
    assert budget.balance < ALLOWANCE * 60 and drafts <= 8


def test_one_slow_plain_step_does_not_make_drafts_look_cheap():
    budget, slow = DraftBudget(), iter([5.0, *[1.0] * 10_000])
    seconds, _ = simulate(lambda: 0, 0.5, 200, budget, noise=lambda: next(slow))
    assert seconds <= 4 + 200 * 1.02 + 4 * 0.5
