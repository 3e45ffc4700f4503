"""lmtp-cli tree on tiny models."""

import argparse
import errno
import json

import pytest
import torch
from helpers import tiny_data, tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.cli import main
from lmtp_factory.cli.tree import seconds_by_length
from lmtp_factory.decoding import tree_choice
from lmtp_factory.decoding.machine import processor_name
from lmtp_factory.decoding.tree_choice import Conditions, read_tree
from lmtp_factory.evaluation import report, self_generated
from lmtp_factory.modeling import checkpoint


def test_tree_command(tmp_path, capsys):
    path = tiny_models.save_qwen3(tmp_path / "model")
    model = attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig(num_heads=2))
    model.save_pretrained(path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"instruction": text}) for text, _ in tiny_data.texts(4)))
    arguments = ["--prompts", str(prompts), "--max-new-tokens", "12", "--context", "16"]
    assert main(["tree", str(path), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "<- chosen" in printed and "level 1:" in printed
    plan, conditions = read_tree(path / "lmtp")
    assert plan.source.endswith("tree.json")
    facts = json.loads((path / "lmtp" / "tree.json").read_text())["measured"]
    best = max(facts["options"], key=lambda option: option["tokens_per_second"])
    assert best["nodes"] == plan.nodes
    assert (path / "lmtp" / "tree.png").stat().st_size > 10_000
    assert conditions == Conditions("cpu", "float32", True, processor_name(), torch.get_num_threads())


def test_the_chain_of_an_engine(tmp_path, capsys):
    path = tiny_models.save_qwen3(tmp_path / "model")
    attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig(num_heads=2)).save_pretrained(path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"instruction": text}) for text, _ in tiny_data.texts(4)))
    command = ["tree", str(path), "--prompts", str(prompts), "--max-new-tokens", "12", "--context", "16"]
    assert main([*command, "--chain", "--step-seconds", "0:1,1:1.0,2:9,4:9"]) == 0
    assert capsys.readouterr().out.endswith("--num-speculative-tokens 1\n")
    assert main([*command, "--chain", "--step-seconds", "0:1,3:9"]) == 0
    assert capsys.readouterr().out.endswith("Drafts do not pay: serve without them.\n")
    assert main([*command, "--chain"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("chain ") == 4 and "dynamic" not in printed
    assert main([*command, "--chain", "--step-seconds", "0:1,5:1"]) == 1
    assert "5 drafts are given, but these heads draft 4" in capsys.readouterr().err
    assert main([*command, "--step-seconds", "0:1"]) == 1
    assert "--step-seconds needs --chain" in capsys.readouterr().err
    assert not (path / "lmtp" / "tree.json").exists()


@pytest.mark.parametrize("text", ["", "1:2", "0:0", "0:nan", "0:1,-1:2", "0:1,x:2", "0.03"])
def test_seconds_of_steps_are_checked(text):
    with pytest.raises(argparse.ArgumentTypeError, match="from 0 on"):
        seconds_by_length(text)


def test_missing_heads_are_named(tmp_path, capsys):
    path = tiny_models.save_llama(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "what?"}')
    assert main(["tree", str(path), "--prompts", str(prompts)]) == 1
    assert f"{path} has no lmtp/ folder, so no leap heads: name " in capsys.readouterr().err


@pytest.fixture
def command(tmp_path):
    path = tiny_models.save_qwen3(tmp_path / "model")
    attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig(num_heads=1)).save_pretrained(path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"instruction": text}) for text, _ in tiny_data.texts(2)))
    return ["tree", str(path), "--prompts", str(prompts), "--max-new-tokens", "8", "--context", "16"]


def test_a_chain_is_found_for_a_hub_id(command, tmp_path, monkeypatch, capsys):
    """Nothing is written, so heads need not lie in a directory."""
    path = command[1]
    load, read = report.load_for_scoring, self_generated.read_prompts
    monkeypatch.setattr(checkpoint, "find_heads", lambda model: tmp_path / "model" / "lmtp")
    monkeypatch.setattr(report, "load_for_scoring", lambda model: load({"org/heads": path}[model]))
    monkeypatch.setattr(self_generated, "read_prompts", lambda model, *rest: read({"org/heads": path}[model], *rest))
    assert main(["tree", "org/heads", *command[2:], "--chain", "--step-seconds", "0:1,1:1.0"]) == 0
    assert "--num-speculative-tokens 1" in capsys.readouterr().out
    assert main(["tree", "org/heads", *command[2:]]) == 1
    assert "org/heads is no directory with an lmtp/ folder: name one, since tree.json" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_a_model_loads(command, monkeypatch, capsys):
    monkeypatch.setattr(report, "load_for_scoring", lambda *args: pytest.fail("a model was about to load"))
    monkeypatch.setattr("lmtp_factory.cli.output.check_writable", read_only)
    assert main(command) == 1
    assert f"MODEL {command[1]}/lmtp cannot be written (Read-only file system)" in capsys.readouterr().err


def read_only(*args):
    raise OSError(errno.EROFS, "Read-only file system")


def test_the_table_is_printed_even_if_it_cannot_be_written(command, monkeypatch, capsys):
    monkeypatch.setattr(tree_choice, "write_tree", read_only)
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "<- chosen" in printed.out and "Written" not in printed.out
    assert printed.err.endswith("(Read-only file system): name another directory that can be written.\n")


def test_answers_without_a_draft_to_measure_are_refused(tmp_path, capsys):
    path = tiny_models.save_qwen3(tmp_path / "model")
    model = attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig(num_heads=1))
    model.save_pretrained(path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"instruction": "what?"}))
    assert main(["tree", str(path), "--prompts", str(prompts), "--max-new-tokens", "1", "--context", "16"]) == 1
    assert "no draft can be measured" in capsys.readouterr().err
    assert not (path / "lmtp" / "tree.json").exists()
