"""`head_inputs: layers` and `head_learning_rate` from YAML to decoding, through both programs."""

import json

import pytest
import torch
from helpers import llamafactory_runs as runs
from helpers import tiny_data, tiny_models

from lmtp_factory import load_model
from lmtp_factory.cli import main
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.modeling.checkpoint import load_heads, read_config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_models.save_qwen3(tmp_path_factory.mktemp("models") / "base", num_hidden_layers=4)


@pytest.fixture(scope="module")
def stage1(base, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "stage1"
    args = runs.arguments(base, data, output, head_inputs="layers", leap_offsets="2,3,4", max_steps=8)
    runs.cli("train", runs.write_yaml(output.parent / "stage1.yaml", args))
    return output


@pytest.fixture(scope="module")
def export(base, data, stage1, tmp_path_factory):
    """Of a stage 2 whose heads train with a rate of their own."""
    folder = tmp_path_factory.mktemp("runs")
    args = runs.arguments(
        base, data, folder / "stage2", stage="lmtp2", finetuning_type="lora", stage1_pretrained_path=str(stage1),
        learning_rate=1e-4, head_learning_rate=1e-2,
    )  # fmt: skip
    runs.cli("train", runs.write_yaml(folder / "stage2.yaml", args))
    steps = [entry for entry in runs.history(folder / "stage2") if "loss" in entry]
    assert {(entry["learning_rate"], entry["head_learning_rate"]) for entry in steps} == {(1e-4, 1e-2)}
    runs.export(
        model_name_or_path=base,
        adapter_name_or_path=folder / "stage2",
        export_dir=folder / "export",
        lmtp_export="heads",
    )
    return folder / "export"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": text}) for text, _ in tiny_data.texts(4)))
    return str(path)


def test_both_stages_train_the_weights_of_the_layers(stage1, export):
    config = read_config(stage1 / "lmtp")
    assert (config.head_inputs, config.base_layers) == ("layers", 4)
    warm, tuned = (load_heads(folder).heads for folder in (stage1, export))
    for before, after in zip(warm, tuned, strict=True):
        assert before.leap_mix.abs().sum() > 0 and not torch.equal(before.leap_mix, after.leap_mix)


@torch.no_grad()
def test_the_export_decodes_as_stock(export):
    model, stats = load_model(str(export), dtype=torch.float32), DecodeStats()
    ids = torch.arange(40, 52)[None]
    run = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    output = model.generate(ids, lmtp_stats=stats, **run)
    assert stats.strategy == "backward" and torch.equal(output, model.generate(ids, lmtp_decode="off", **run))


def test_other_inputs_are_refused_in_stage_two(base, data, stage1, tmp_path):
    args = runs.arguments(
        base,
        data,
        tmp_path,
        stage="lmtp2",
        finetuning_type="lora",
        stage1_pretrained_path=str(stage1),
        head_inputs="state",
    )
    result = runs.cli("train", runs.write_yaml(tmp_path / "x.yaml", args), check=False)
    assert result.returncode and "head_inputs state, the heads have layers" in result.stderr


def test_every_command_takes_such_heads(stage1, export, prompts, tmp_path):
    quick = ["--prompts", prompts, "--max-new-tokens", "12"]
    selected, rows = tmp_path / "selected", tiny_data.save_token_rows(tmp_path / "rows.jsonl")
    assert main(["select", str(stage1), "--num-heads", "2", "--output", str(selected), "--context", "16", *quick]) == 0
    assert read_config(selected / "lmtp").base_layers == 4
    assert main(["tree", str(export), "--context", "16", *quick]) == 0
    assert main(["bench", str(export), "--nodes", "4", "--output-dir", str(tmp_path / "bench"), *quick]) == 0
    arms = json.loads((tmp_path / "bench" / "bench.json").read_text())["arms"]
    # Stock's prompt lookup may write more tokens than it is told.
    assert [arm["name"] for arm in arms if arm["differing"]] in ([], ["prompt lookup"])
    assert main(["report", f"ours={export}", "--rows", str(rows), "--output-dir", str(tmp_path)]) == 0
