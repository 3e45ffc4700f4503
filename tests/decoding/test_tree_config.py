"""Which tree a model drafts with: the measured one where it was measured, else the device's default."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, LMTPError, attach_heads, load_model
from lmtp_factory.decoding import cpu_prepacked, loop, packed_speed, support
from lmtp_factory.decoding.machine import processor_name
from lmtp_factory.decoding.tree_choice import (
    PLAIN_CPU,
    Conditions,
    read_accuracies,
    read_tree,
    tree_config_for,
    write_tree,
)
from lmtp_factory.decoding.tree_config import AcceptanceCalibration, CostCurve, TreeConfig


MEASURED = TreeConfig("static", 3, paths=((), (0,), (1,)), cost=CostCurve({1: 1.0, 8: 1.5}))
HERE = Conditions("cpu", "float32", True, processor_name(), torch.get_num_threads())


@pytest.fixture
def export(tmp_path):
    path = tiny_models.save_llama(tmp_path / "model")
    attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig()).save_pretrained(path)
    return path


def test_a_plan_is_read_as_it_was_written(tmp_path):
    write_tree(MEASURED, tmp_path, HERE, measured={})
    assert read_tree(tmp_path) == (MEASURED, HERE)


def test_a_plan_without_an_expected_gain_expects_none(tmp_path):
    """Older versions did not write it."""
    path = write_tree(replace(MEASURED, expected_gain=0.5), tmp_path, HERE, measured={})
    values = json.loads(path.read_text())
    assert values.pop("expected_gain") == 0.5
    path.write_text(json.dumps(values))
    assert read_tree(tmp_path) == (MEASURED, HERE)


def test_a_tree_is_used_where_it_was_measured(export):
    write_tree(MEASURED, export / "lmtp", HERE, measured={})
    plan = tree_config_for(load_model(export))
    assert plan == MEASURED and plan.source.endswith("tree.json")


@pytest.mark.parametrize(
    "elsewhere",
    [
        Conditions("cuda", "float32", True, processor_name(), torch.get_num_threads()),
        Conditions("cpu", "bfloat16", False, processor_name(), torch.get_num_threads()),
        Conditions("cpu", "float32", False, processor_name(), torch.get_num_threads()),
        replace(HERE, machine="Another Processor"),
        replace(HERE, threads=1000),
    ],
    ids=["device", "dtype", "weights", "machine", "threads"],
)
def test_a_tree_that_was_measured_elsewhere_is_not_used(export, elsewhere, caplog):
    support.warn_once.cache_clear()
    write_tree(MEASURED, export / "lmtp", elsewhere, measured={})
    model = load_model(export)
    for _ in range(2):
        plan = tree_config_for(model)
    assert plan.kind == "dynamic" and plan.cost is not None
    why = f"tree.json was measured on {elsewhere}, this is {HERE}"
    assert why in plan.source
    said = [record.getMessage() for record in caplog.records if record.name.startswith("lmtp_factory")]
    assert [why in message for message in said] == [True]  # once


@pytest.mark.parametrize("fewest", [4, None])
def test_a_measured_tree_does_not_depend_on_how_a_process_times_its_weights(export, fewest, monkeypatch):
    """Where packed and ordinary weights are about as fast, each process may find otherwise."""
    write_tree(MEASURED, export / "lmtp", HERE, measured={})
    model = load_model(export)
    monkeypatch.setattr(packed_speed, "_fewest_tokens", lambda shape, threads: fewest)
    assert tree_config_for(model) == MEASURED and Conditions.of(model) == HERE
    (export / "lmtp" / "tree.json").unlink()
    assert tree_config_for(model).cost == PLAIN_CPU  # the default's costs are those of the weights that are used


def test_conditions_name_the_machine_and_its_threads(export, monkeypatch):
    model, threads = load_model(export), torch.get_num_threads()
    here = Conditions.of(model)
    assert here.machine and here.threads == threads and f"({here.machine}, threads: {threads})" in str(here)
    torch.set_num_threads(threads + 1)
    try:
        assert Conditions.of(model) == replace(here, threads=threads + 1)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    there = Conditions.of(model)
    assert (there.device, there.machine, there.threads) == ("cuda", "H200", None) and "cuda (H200)" in str(there)


def test_a_tree_measured_with_prepacked_weights_is_not_used_without(export, monkeypatch):
    write_tree(MEASURED, export / "lmtp", HERE, measured={})
    model = load_model(export)
    monkeypatch.setattr(cpu_prepacked, "free_memory", lambda: None)  # as where psutil is missing
    plan = tree_config_for(model)
    assert plan.kind == "dynamic" and plan.cost.at(8) == 1.6
    monkeypatch.undo()
    assert tree_config_for(model) == MEASURED
    assert tree_config_for(model.to(torch.bfloat16)).kind == "dynamic"


def test_the_tree_is_that_of_the_weights_that_the_loop_uses(export, monkeypatch):
    """The loop does not use prepacked weights under autocast or with a compiled forward."""
    write_tree(MEASURED, export / "lmtp", HERE, measured={})
    model, seen = load_model(export), []

    def generate():
        model.generate(torch.arange(20, 26)[None], max_new_tokens=4, do_sample=False)
        return seen.pop()

    def run(model, state, tree_config, *args):
        seen.append((tree_config, cpu_prepacked._is_prepacked(model.lm_head)))
        original(model, state, tree_config, *args)

    original = loop.run
    monkeypatch.setattr(loop, "run", run)
    assert generate() == (MEASURED, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tree, is_prepacked = generate()
    assert tree.cost == PLAIN_CPU and not is_prepacked
    monkeypatch.setattr(loop.compat, "compiles", lambda *args: True)
    monkeypatch.setattr(loop, "compiled_for", lambda model, options: None)
    tree, is_prepacked = generate()
    assert tree.cost == PLAIN_CPU and not is_prepacked


@pytest.mark.parametrize("missing", [("prepacked", "machine", "threads"), ("machine", "threads")], ids=str)
def test_a_tree_that_does_not_say_what_it_was_measured_with_is_not_used(export, missing, caplog):
    """Older versions wrote less."""
    support.warn_once.cache_clear()
    path = write_tree(MEASURED, export / "lmtp", HERE, measured={})
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in missing}))
    plan = tree_config_for(load_model(export))
    assert plan.kind == "dynamic" and "was measured on an unknown machine" in plan.source
    assert "was measured on an unknown machine" in caplog.text


def test_a_damaged_plan_is_named(export):
    (export / "lmtp" / "tree.json").write_text("{}")
    with pytest.raises(LMTPError, match="tree.json is damaged"):
        tree_config_for(load_model(export))


@pytest.mark.parametrize(
    "values",
    [
        {"paths": [[0], [1], [2]]},
        {"paths": [[], [0, 1], [0]]},
        {"paths": [[], [1, 0], [0]]},
        {"paths": [[], [0], [-1]]},
        {"paths": [[], [0]]},
        {"paths": [[], 0, 1]},
        {"kind": "bush"},
        {"nodes": 0},
        {"nodes": "many"},
        {"cost": {"1": 0.0}},
        {"cost": {"1": "fast"}},
        {"cost": [1.0, 2.0]},
        {"expected_gain": "much"},
        {"expected_gain": float("nan")},
    ],
    ids=str,
)
def test_impossible_values_of_a_plan_are_damage(values, tmp_path):
    """They are found when the file is read, not by the first generation."""
    path = write_tree(MEASURED, tmp_path, HERE, measured={})
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(LMTPError, match=r"tree.json is damaged \(.*\): delete it or run lmtp-cli tree again\.$"):
        read_tree(tmp_path)


def test_costs_between_and_beyond_the_measured_sizes():
    curve = CostCurve({1: 1.0, 4: 2.5, 8: 3.5})
    assert [curve.at(tokens) for tokens in (1, 2, 4, 6, 8, 12)] == [1.0, 1.5, 2.5, 3.0, 3.5, 4.5]
    assert CostCurve({8: 2.0}).at(1) == CostCurve({8: 2.0}).at(64) == 2.0


def test_calibrated_heads_keep_a_ratio_of_one():
    calibration = AcceptanceCalibration()
    assert calibration.ratio == 1.0
    for accepted in (0, 1, 2, 1, 0, 2) * 20:
        calibration.learn(1.0, accepted)
    assert calibration.ratio == pytest.approx(1.0, abs=0.05)


def test_heads_that_promise_too_much_are_found_out_and_forgiven():
    calibration = AcceptanceCalibration()
    for _ in range(100):
        calibration.learn(2.0, 1)
    assert calibration.ratio == pytest.approx(0.5, abs=0.03)
    for _ in range(200):  # the text has changed
        calibration.learn(2.0, 2)
    assert calibration.ratio == pytest.approx(1.0, abs=0.03)


def test_one_step_says_little():
    calibration = AcceptanceCalibration()
    calibration.learn(1.0, 0)
    assert 0.5 < calibration.ratio < 1.0


def test_a_tree_is_cut_where_tokens_per_second_are_greatest():
    plan = TreeConfig("dynamic", 5, cost=CostCurve({1: 1.0, 2: 1.1, 3: 1.2, 4: 2.4, 5: 3.6}))
    values = [[1.0, 0.9, 0.5, 0.3, 0.2]]
    assert plan.best_size(values, 1.0) == 3  # (1 + 0.9 + 0.5) / 1.2 is the greatest
    assert plan.best_size(values, 0.05) == 1  # heads whose drafts are not accepted
    # Two rows share a forward: its cost is that of twice the nodes.
    assert plan.best_size(values * 2, 1.0) == 1
    assert TreeConfig("dynamic", 5).best_size(values, 1.0) == 5  # without costs nothing is cut


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tree", 4), "kind is 'tree', but it has to be one of chain, static, dynamic"),
        (("chain", 0), "no root: write 1 or more"),
        (("static", 3, ((), (0,))), "static tree of 3 nodes needs as many paths"),
        (("static", 3, ((), (0, 0), (0,))), r"The parent of path \(0, 0\) does not precede it"),
        (("dynamic", 3, (), 0), "width 0 has no candidates"),
    ],
)
def test_impossible_trees_are_refused(arguments, said):
    with pytest.raises(LMTPError, match=said):
        TreeConfig(*arguments)


def test_ranks_beyond_the_vocabulary_are_refused():
    plan = TreeConfig("static", 3, paths=((), (0,), (9,)))
    plan.check_ranks(10)
    with pytest.raises(LMTPError, match=r"down to rank 9, but the heads draft 9 tokens \(ranks 0 to 8\)"):
        plan.check_ranks(9)
    TreeConfig("dynamic", 64, width=40).check_ranks(9)  # takes what there is


@pytest.mark.parametrize("accuracies", ['[["x"]]', "[[0.5], [1.5]]", "[[]]", "5", "[5]", "[[0.5]"])
def test_damaged_accuracies_are_refused(tmp_path, accuracies):
    (tmp_path / "tree.json").write_text(f'{{"measured": {{"accuracies": {accuracies}}}}}')
    with pytest.raises(LMTPError, match=r"tree\.json is damaged .*: delete it or run lmtp-cli tree again\."):
        read_accuracies(tmp_path)


def test_accuracies_are_those_that_were_measured(tmp_path):
    assert read_accuracies(tmp_path) is None
    (tmp_path / "tree.json").write_text('{"measured": {"accuracies": [[0.5, 0.25], [1]]}}')
    assert read_accuracies(tmp_path) == [[0.5, 0.25], [1.0]]
    for nothing in ("{}", '{"measured": {}}', '{"measured": {"accuracies": []}}'):
        (tmp_path / "tree.json").write_text(nothing)
        assert read_accuracies(tmp_path) is None
