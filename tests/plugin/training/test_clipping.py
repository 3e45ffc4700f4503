"""Stage 1 clips each head by its own norm, so one run holds the heads of every subset of its offsets."""

import pytest
import torch
from helpers import llamafactory_runs as runs

from lmtp_factory.modeling.checkpoint import load_heads


SUPERSET, SUBSET = (2, 3, 4, 5, 6, 7), (2, 3, 6)


def trained_at(offsets, model, data, output, **overrides):
    """Log entries and offset -> tensors of the heads of a stage 1 whose every gradient is clipped."""
    written = ",".join(map(str, offsets))
    entries = runs.train(model, data, output, leap_offsets=written, max_steps=6, max_grad_norm=0.01, **overrides)
    heads = load_heads(output)
    assert heads.config.offsets == (1, *offsets)
    return entries, {offset: head.state_dict() for offset, head in zip(offsets, heads.heads)}


def are_equal(heads, others):
    """Whether the heads at SUBSET are the same bit for bit."""
    return all(torch.equal(tensor, others[offset][name]) for offset in SUBSET for name, tensor in heads[offset].items())


@pytest.mark.parametrize(
    "run",
    [
        {"head_kind": "own"},
        {"head_kind": "shared", "head_layers": 2},
        {"head_kind": "own", "head_inputs": "state_token", "head_backs": 3, "draft_vocab_size": 90},
        {"head_kind": "shared", "head_inputs": "layers"},
        {"head_kind": "shared", "head_block": "mlp", "head_inputs": "state_token", "head_backs": 3},
    ],
    ids=str,
)
def test_one_stage_one_holds_the_heads_of_every_geometry(run, llama, data, tmp_path):
    """Each head is clipped by its own norm, so it does not matter which others are trained beside it."""
    _, together = trained_at(SUPERSET, llama, data, tmp_path / "superset", **run)
    _, alone = trained_at(SUBSET, llama, data, tmp_path / "subset", **run)
    assert are_equal(alone, together)


def test_a_norm_of_all_heads_would_make_them_depend_on_each_other(llama, data, tmp_path, monkeypatch):
    """Or the test above would prove little. The norm that is logged is the same."""
    from lmtp_factory.plugin.training import trainer

    entries, apart = trained_at(SUPERSET, llama, data, tmp_path / "apart")
    monkeypatch.delattr(trainer.LeapTrainer, "_clip_grad_norm")
    entries_together, together = trained_at(SUPERSET, llama, data, tmp_path / "superset")
    _, alone = trained_at(SUBSET, llama, data, tmp_path / "subset")
    assert not are_equal(alone, together) and not are_equal(apart, together)
    first, first_together = (
        next(entry["grad_norm"] for entry in log if "loss" in entry) for log in (entries, entries_together)
    )
    assert first == pytest.approx(first_together, rel=1e-5) and first > 0.1
