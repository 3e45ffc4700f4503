"""What a step costs: every size is timed in turn, behind the same context."""

from lmtp_factory.tuning.costs import measure_costs


def test_every_size_and_the_draft_are_timed(model):
    measured = measure_costs(model, sizes=(1, 4, 9), context=12, repeats=3, nodes=6)
    assert list(measured.verify.seconds) == [1, 4, 9]
    assert min(measured.verify.seconds.values()) > 0 and measured.draft > 0


def test_a_long_forward_costs_more_than_a_short_one(model):
    """Four hundred times the tokens: no noise of a busy machine hides that in a median."""
    measured = measure_costs(model, sizes=(1, 400), context=12, repeats=5)
    assert measured.verify.at(400) > measured.verify.at(1)
