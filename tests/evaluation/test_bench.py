"""Ways of decoding side by side: the same answers, and counts that agree with each other."""

import copy
import dataclasses

import pytest
import torch
from helpers import tiny_models

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.decoding.tree_config import TreeConfig
from lmtp_factory.evaluation.bench import (
    OWN_LOOP,
    STOCK,
    Arm,
    always_drafting,
    default_arms,
    margins,
    results,
    run_arms,
    table,
)
from lmtp_factory.evaluation.plots import draw_bench


PROMPTS = [[30, 40, 50], [60, 61, 62, 63]]


@pytest.fixture(scope="module")
def model():
    return attach_heads(tiny_models.qwen3(), LMTPConfig()).eval()


@pytest.fixture(scope="module")
def arms(model):
    arms = default_arms(model, [[0.5, 0.2], [0.4]], nodes=4)
    for name, arm in arms.items():  # how many steps draft must not depend on how fast this machine is
        arms[name] = dataclasses.replace(arm, options=always_drafting(arm.options))
    run_arms(model, arms, PROMPTS, max_new_tokens=12, repeats=2)
    return arms


def test_every_arm_answers_every_prompt_once_for_the_record(arms):
    for arm in arms.values():
        assert [output.shape[1] for output in arm.outputs] == [len(ids) + 12 for ids in PROMPTS]
        assert len(arm.seconds) == len(PROMPTS)
    assert arms[STOCK].forwards == arms[OWN_LOOP].forwards == 12 * len(PROMPTS)
    assert arms["backward, chain"].forwards < arms[STOCK].forwards


def test_rows_of_the_table(arms):
    rows = {row.name: row for row in results(arms, PROMPTS)}
    assert rows[STOCK].tau == rows[OWN_LOOP].tau == 1 and rows[STOCK].over_stock == 1
    for name, row in rows.items():
        assert row.differing == 0
        assert row.is_ours == (name == OWN_LOOP or name.startswith(("backward", "forward")))
        assert row.is_ours or row.verify_share is None
        if name.endswith(("chain", "static", "dynamic")):
            assert row.mean_acceptance_length == pytest.approx(1 + sum(row.acceptance))
            assert row.mean_acceptance_length >= row.tau > 1  # not every forward verifies a draft
        if row.tau > 1 and row.is_ours:
            assert 0 < row.verify_share < 1
        if not arms[name].stats.drafts:
            assert row.mean_acceptance_length is None and row.acceptance == ()
    lines = table(list(rows.values())).splitlines()
    assert len(lines) == 1 + len(rows) and lines[0].endswith("accepted at level    1    2    3    4    5    6")


def test_unsynchronised_times_of_a_gpu_are_no_share_of_verification(arms, tmp_path):
    """The row then has no share, but it is still one of ours."""
    stats = copy.deepcopy(arms["backward, chain"].stats)
    with stats.timed("verify", torch.device("cuda")):
        pass
    rows = results({**arms, "backward, chain": dataclasses.replace(arms["backward, chain"], stats=stats)}, PROMPTS)
    row = next(row for row in rows if row.name == "backward, chain")
    assert row.verify_share is None and row.is_ours
    assert [line.count("%") for line in table([row]).splitlines()[1:]] == [len(row.acceptance)]
    draw_bench(rows, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 5_000


def test_where_answers_part_their_logits_are_compared(model, arms):
    parted = torch.cat([arms[STOCK].outputs[0][:, :5], arms[STOCK].outputs[0][:, 5:] + 1], dim=1)
    other = Arm({}, outputs=[parted, arms[STOCK].outputs[1]])
    found = margins(model, {STOCK: arms[STOCK], "other": other})
    logits = model(parted[:, :5]).logits[0, -1].detach()
    stock_token, token = arms[STOCK].outputs[0][0, 5], parted[0, 5]
    assert found == {"other": [pytest.approx(float(logits[stock_token] - logits[token]), abs=1e-5)]}
    assert margins(model, {STOCK: arms[STOCK]}) == {}


def test_the_tree_that_is_left_to_the_model_is_the_devices_default(model):
    arms = default_arms(model, [[0.5]], nodes=4)
    assert arms["backward, default tree"].options["lmtp_tree"] == model.tree_config()
    assert arms[OWN_LOOP].options["lmtp_tree"] == TreeConfig("chain", 1)
