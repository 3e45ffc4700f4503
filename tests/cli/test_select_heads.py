"""lmtp-cli select on tiny models."""

import errno
import json
import re
import shutil

import pytest
import torch
from helpers import llamafactory_runs as runs
from helpers import tiny_data, tiny_models
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmtp_factory import LMTPConfig, attach_heads, load_model
from lmtp_factory.cli import main
from lmtp_factory.decoding import tree_choice
from lmtp_factory.decoding.machine import processor_name
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.tree_choice import Conditions, read_tree
from lmtp_factory.decoding.tree_config import TreeConfig
from lmtp_factory.evaluation.self_generated import generate_greedy
from lmtp_factory.modeling.checkpoint import load_heads, read_config


TRAINED = (2, 3, 4, 6)
QUICK = ["--max-new-tokens", "12", "--context", "16"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_models.save_qwen3(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A directory as stage 1 leaves it, with bf16 heads."""
    folder = tmp_path_factory.mktemp("runs") / "stage1"
    model = attach_heads(AutoModelForCausalLM.from_pretrained(base), LMTPConfig(offsets=TRAINED), stage=1)
    tiny_models.randomise_heads(model)
    model.leap_heads.to(torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": text}) for text, _ in tiny_data.texts(4)))
    return str(path)


@pytest.fixture(scope="module")
def selected(trained, prompts, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "selected"
    arguments = ["--num-heads", "2", "--prompts", prompts, "--output", str(output)]
    assert main(["select", str(trained), *arguments, *QUICK]) == 0
    return output


def test_the_chosen_heads_are_the_trained_ones_bit_for_bit(trained, selected):
    old, new = read_config(trained / "lmtp"), read_config(selected / "lmtp")
    assert new.num_heads == 2 and set(new.offsets[1:]) <= set(TRAINED)
    same = {name: value for name, value in old.to_dict().items() if name != "offsets"}
    assert same == {name: value for name, value in new.to_dict().items() if name != "offsets"}
    before, after = (
        load_file(trained / "lmtp" / "model.safetensors"),
        load_file(selected / "lmtp" / "model.safetensors"),
    )
    sources = [TRAINED.index(offset) for offset in new.offsets[1:]]
    assert len(after) == len(before) / 2
    for name, tensor in after.items():
        heads, number, rest = name.split(".", 2)
        source = before[f"{heads}.{sources[int(number)]}.{rest}"]
        assert tensor.dtype == source.dtype == torch.bfloat16 and torch.equal(tensor, source)


def test_the_output_holds_the_tree_and_what_it_rests_on(selected):
    tree, conditions = read_tree(selected / "lmtp")
    facts = json.loads((selected / "lmtp" / "tree.json").read_text())["measured"]
    assert conditions == Conditions("cpu", "float32", True, processor_name(), torch.get_num_threads())
    best = max(facts["options"], key=lambda option: option["tokens_per_second"])
    assert best["nodes"] >= tree.nodes
    assert len(facts["subsets"]) == 6
    assert facts["subsets"][0]["offsets"] == list(read_config(selected / "lmtp").offsets[1:])
    assert facts["subsets"][0]["tokens_per_second"] == best["tokens_per_second"]
    assert (selected / "lmtp" / "tree.png").stat().st_size > 10_000


def test_the_output_decodes_as_stock(base, selected):
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model, tokenizer = load_model(str(selected), dtype=torch.float32), AutoTokenizer.from_pretrained(selected)
    ids = tokenizer("what does a frog do?", return_tensors="pt").input_ids
    stats = DecodeStats()
    ours = generate_greedy(
        model, ids[0].tolist(), 20, lmtp_tree=TreeConfig("dynamic", 8, always=True), lmtp_stats=stats
    )
    theirs = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert torch.equal(ours, theirs)
    assert model.tree_config().source.endswith("tree.json") and stats.steps


def test_every_subset_is_printed_the_fastest_first(trained, prompts, tmp_path, capsys):
    arguments = ["--num-heads", "2", "--prompts", prompts, "--output", str(tmp_path / "two"), "--limit", "2"]
    assert main(["select", str(trained), *arguments, *QUICK]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\d+,\d+) +[\d.]+ +([\d.]+)  \w", printed, re.MULTILINE)
    assert len({offsets for offsets, _ in rows}) == 6 and "Ways to keep 2 of 4 heads: 6, " in printed
    speeds = [float(speed) for _, speed in rows]
    assert speeds == sorted(speeds, reverse=True)


def test_choosing_all_heads_leaves_them_as_they_are(trained, prompts, tmp_path, capsys):
    arguments = ["--num-heads", "4", "--prompts", prompts, "--output", str(tmp_path / "all"), "--limit", "2"]
    assert main(["select", str(trained), *arguments, *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "Ways to keep 4 of 4 heads: 1, " in printed and printed.count("<- chosen") == 1
    old, new = load_heads(trained).state_dict(), load_heads(tmp_path / "all").state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_stage_two_and_export_start_from_the_output(base, selected, data, tmp_path):
    run = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(selected), "max_steps": 1}
    runs.train(base, data, tmp_path / "stage2", **run)
    assert read_config(tmp_path / "stage2" / "lmtp").offsets == read_config(selected / "lmtp").offsets
    runs.export(
        model_name_or_path=base,
        stage1_pretrained_path=str(selected),
        lmtp_export="heads",
        export_dir=tmp_path / "export",
    )
    assert read_config(tmp_path / "export" / "lmtp").offsets == read_config(selected / "lmtp").offsets
    assert load_model(str(tmp_path / "export")).leap_heads.config.num_heads == 2


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(trained, prompts, tmp_path, monkeypatch, capsys):
    """Arguments -> the sentence of a refusal that comes before a model is loaded and leaves the output alone."""

    def load(*args, **kwargs):
        raise AssertionError("a model was about to load")

    def refuse(model=trained, num_heads=2, output=tmp_path / "output"):
        before = sorted(output.rglob("*")) if output.is_dir() else None
        arguments = ["--num-heads", str(num_heads), "--prompts", prompts, "--output", str(output)]
        assert main(["select", str(model), *arguments]) == 1
        assert (sorted(output.rglob("*")) if output.is_dir() else None) == before
        message = capsys.readouterr().err.strip()
        assert message.startswith("lmtp-cli select: ") and message.count("\n") == 0 and message.endswith(".")
        return message

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    return refuse


def test_more_heads_than_trained_are_refused(refused):
    assert "has 4 heads: write --num-heads 4 or less." in refused(num_heads=5)


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_no_heads_are_refused(number, trained, prompts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["select", str(trained), f"--num-heads={number}", "--prompts", prompts, "--output", str(tmp_path)])
    assert f"--num-heads: {number} is no whole number of 1 or more" in capsys.readouterr().err


def test_an_output_with_heads_is_refused(refused, selected):
    assert "has an lmtp/ already: name another --output or move that folder away." in refused(output=selected)


def test_an_output_that_is_its_source_is_refused(refused, trained):
    assert "has an lmtp/ already" in refused(output=trained)


def test_an_output_with_a_model_is_refused(refused, base):
    assert "holds a model: name another --output." in refused(output=base)


def test_an_output_that_is_a_file_is_refused(refused, prompts, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file: name a directory." in refused(output=tmp_path / "file")


def test_an_output_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").touch()
    message = refused(output=tmp_path / "file" / "output")
    assert message.endswith("cannot be written (Not a directory): name another directory.")


def test_a_directory_without_heads_is_refused(refused, base, tmp_path):
    for model in (base, tmp_path / "nowhere"):
        assert "has no heads: name the output directory of stage 1." in refused(model=model)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_heads_beside_a_tuned_backbone_are_refused(file, refused, trained, tmp_path):
    """Heads of stage 2 belong to the backbone that was tuned with them."""
    shutil.copytree(trained, tmp_path / "stage2")
    (tmp_path / "stage2" / file).write_text("{}")
    message = refused(model=tmp_path / "stage2")
    assert "heads alone would lose it: name the output directory of stage 1." in message


def test_answers_without_a_step_are_refused(trained, prompts, tmp_path, capsys):
    arguments = ["--num-heads", "2", "--prompts", prompts, "--output", str(tmp_path / "output")]
    assert main(["select", str(trained), *arguments, "--max-new-tokens", "1", "--context", "16"]) == 1
    assert "no draft can be measured" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_the_table_is_printed_even_if_the_heads_cannot_be_written(trained, prompts, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tree_choice, "write_tree", full)
    arguments = ["--num-heads", "4", "--prompts", prompts, "--output", str(tmp_path / "all"), "--limit", "1"]
    assert main(["select", str(trained), *arguments, *QUICK]) == 1
    printed = capsys.readouterr()
    assert "<- chosen" in printed.out and "Written" not in printed.out
    assert printed.err.endswith("(No space left on device): make room and run the same command again.\n")
    assert not (tmp_path / "all" / "lmtp").exists()  # the same command would refuse it
