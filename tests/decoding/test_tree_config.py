"""Which tree a model drafts with: the measured one where it was measured, else the device's default."""

import json

import pytest
import torch
from helpers import tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, LMTPError, attach_heads, load_model
from lmtp_factory.decoding import cpu_prepacked
from lmtp_factory.decoding.tree_config import Conditions, CostCurve, TreeConfig, read_tree, tree_config_for, write_tree


MEASURED = TreeConfig("static", 3, paths=((), (0,), (1,)), cost=CostCurve({1: 1.0, 8: 1.5}))
HERE = Conditions("cpu", "float32", True)


@pytest.fixture
def export(tmp_path):
    path = tiny_models.save_llama(tmp_path / "model")
    attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig()).save_pretrained(path)
    return path


def test_a_plan_is_read_as_it_was_written(tmp_path):
    write_tree(MEASURED, tmp_path, HERE, measured={})
    assert read_tree(tmp_path) == (MEASURED, HERE)


def test_a_tree_is_used_where_it_was_measured(export):
    write_tree(MEASURED, export / "lmtp", HERE, measured={})
    plan = tree_config_for(load_model(export))
    assert plan == MEASURED and plan.source.endswith("tree.json")


@pytest.mark.parametrize(
    "elsewhere",
    [Conditions("cuda", "float32", True), Conditions("cpu", "bfloat16", False), Conditions("cpu", "float32", False)],
)
def test_a_tree_that_was_measured_elsewhere_is_not_used(export, elsewhere):
    write_tree(MEASURED, export / "lmtp", elsewhere, measured={})
    plan = tree_config_for(load_model(export))
    assert plan.kind == "dynamic" and plan.cost is not None
    assert f"was measured on {elsewhere}, this is {HERE}" in plan.source


def test_a_tree_measured_with_prepacked_weights_is_not_used_without(export, monkeypatch):
    write_tree(MEASURED, export / "lmtp", HERE, measured={})
    model = load_model(export)
    monkeypatch.setattr(cpu_prepacked, "free_memory", lambda: None)  # as where psutil is missing
    plan = tree_config_for(model)
    assert plan.kind == "dynamic" and plan.cost.at(8) == 1.6
    monkeypatch.undo()
    assert tree_config_for(model) == MEASURED
    assert tree_config_for(model.to(torch.bfloat16)).kind == "dynamic"


def test_a_tree_that_does_not_say_what_it_was_measured_with_is_not_used(export):
    path = write_tree(MEASURED, export / "lmtp", HERE, measured={})
    values = json.loads(path.read_text())
    del values["prepacked"]
    path.write_text(json.dumps(values))
    plan = tree_config_for(load_model(export))
    assert plan.kind == "dynamic" and "was measured on an unknown machine" in plan.source


def test_a_damaged_plan_is_named(export):
    (export / "lmtp" / "tree.json").write_text("{}")
    with pytest.raises(LMTPError, match="tree.json is damaged"):
        tree_config_for(load_model(export))
