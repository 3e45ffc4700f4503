"""Names of per-head metrics: written and read in one place."""

import pytest

from lmtp_factory.evaluation.plots import TrainingCurve
from lmtp_factory.plugin.training.head_metrics import ACCURACY, LOSS, TAU, HeadMetric, heads_metrics
from lmtp_factory.plugin.training.plots import head_curves


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (HeadMetric(LOSS, 1), "loss_head_1"),
        (HeadMetric(ACCURACY, 0, "eval_"), "eval_acc_head_0"),
        (HeadMetric(TAU, None, "eval_"), "eval_tau"),
        (HeadMetric(LOSS, 12, "eval_my_loss_head_data_"), "eval_my_loss_head_data_loss_head_12"),
    ],
)
def test_a_name_is_read_as_it_is_written(metric, name):
    assert str(metric) == name
    assert HeadMetric.parse(name) == metric


@pytest.mark.parametrize(
    "name", ["loss", "eval_loss", "loss_head", "loss_head_x", "myloss_head_1", "mytau", "tau_head_1", "tau_per_second"]
)
def test_other_entries_are_no_metrics_of_heads(name):
    assert HeadMetric.parse(name) is None


def test_curves_of_a_log():
    log = [
        {"step": 1, "loss": 9.0, "loss_head_1": 4.0, "acc_head_1": 0.1},
        {"step": 2, "eval_loss_head_1": 3.0, "eval_tau": 1.5, "eval_acceptance_1": 0.5},
        {"step": 2, "loss_head_1": 2.0},
    ]
    assert heads_metrics(log[1]) == {HeadMetric(LOSS, 1, "eval_"): 3.0, HeadMetric(TAU, None, "eval_"): 1.5}
    assert head_curves(log, "step") == [
        TrainingCurve("loss", 1, is_evaluation=False, points=[(1, 4.0), (2, 2.0)]),
        TrainingCurve("loss", 1, is_evaluation=True, points=[(2, 3.0)]),
        TrainingCurve("top-1 accuracy", 1, is_evaluation=False, points=[(1, 0.1)]),
        TrainingCurve("tau of a chain (tokens per forward)", None, is_evaluation=True, points=[(2, 1.5)]),
    ]
