"""Which heads a stage trains, and how much each counts."""

import pytest

from lmtp_factory import LMTPError
from lmtp_factory.modeling.objective import Objective


def test_stage_one_trains_the_leap_heads_alone():
    objective = Objective.of_stage(1, num_heads=3, head_weight=0.1, head_decay=0.5)
    assert objective == Objective(1, (1.0, 0.5, 0.25), trains_backbone=False)
    assert objective.offsets((1, 3, 5, 7)) == (3, 5, 7)


def test_stage_two_adds_them_to_the_next_token():
    objective = Objective.of_stage(2, num_heads=2, head_weight=0.1, head_decay=1.0)
    assert objective == Objective(0, (1.0, 0.1, 0.1), trains_backbone=True)
    assert objective.offsets((1, 3, 5)) == (1, 3, 5)


def test_evaluation_weighs_every_head_alike():
    assert Objective.of_evaluation(2) == Objective(0, (1.0, 1.0, 1.0), trains_backbone=True)


@pytest.mark.parametrize("stage", [0, 3, "1"])
def test_other_stages_are_refused(stage):
    with pytest.raises(LMTPError, match="it has to be 1"):
        Objective.of_stage(stage, num_heads=2)
