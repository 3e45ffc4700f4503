"""README's main path, run as it is written: data, both stages, exports, report, decoding and the Python blocks.

What is read from README: every YAML block, saved under the name in its first line, and every command of *Your model in three
YAMLs* and *Decode*, in their order. They run in this process through the programs' own entry points. Substitutions:

- the model's hub id becomes ``base``, a tiny model that was taught to answer a few questions (no network);
- ``prompts.jsonl`` holds these questions;
- :data:`SMALL` is appended to the commands: the CPU, a few steps, short answers.

docs/*.md share these commands; of theirs the Python blocks run. ``export`` with ``lmtp_export: custom_generate`` runs where
the key takes that value; an export with heads stands in for it elsewhere.
"""

import builtins
import json
import shutil
import sys

import pytest
import torch
from helpers import documents, tiny_data, tiny_models
from helpers.documents import README, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmtp_factory.cli import main as lmtp_cli


MODEL = "Qwen/Qwen2.5-3B-Instruct"
TRAIN = ["use_cpu=true", "max_steps=6", "per_device_train_batch_size=4", "gradient_accumulation_steps=1"]
TRAIN += ["preprocessing_num_workers=1", "logging_steps=2", "learning_rate=1.0e-2", "draft_vocab_size=100"]
SMALL = {
    ("lmtp-cli", "distill"): ["--max-new-tokens", "64"],
    ("lmtp-cli", "tree"): ["--limit", "2", "--max-new-tokens", "16", "--context", "16"],
    ("lmtp-cli", "bench"): ["--limit", "2", "--max-new-tokens", "16"],
    ("llamafactory-cli", "train"): TRAIN,
    ("llamafactory-cli", "chat"): ["max_new_tokens=24", "do_sample=false"],
}
# Questions of the tiny dataset, made different from each other: distill asks a prompt once.
TEXTS = [(f"{question} {number}", answer) for number, (question, answer) in enumerate(tiny_data.texts(60))]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("documents")]


def teach(directory):
    """A tiny model of README's architecture that answers the questions of the tiny dataset and ends its answers."""
    tiny_models.save_qwen2(directory, tie=True, hidden_size=64, intermediate_size=128)
    settings = directory / "tokenizer_config.json"
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}  # as Qwen's tokenizer: no token types
    settings.write_text(json.dumps(json.loads(settings.read_text()) | inputs))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    asked = [[{"role": "user", "content": question}] for question, _ in TEXTS]
    prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in asked]
    texts = [prompt + answer + tiny_data.EOS for prompt, (_, answer) in zip(prompts, TEXTS)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)


def run(command, monkeypatch):
    """One command with its substitutions, in this process."""
    program, verb, *arguments = (word.replace(MODEL, "base") for word in command.arguments)
    arguments += SMALL.get((program, verb), [])
    if program == "lmtp-cli":
        assert lmtp_cli([verb, *arguments]) == 0
        return
    from llamafactory.cli import main as llamafactory_cli

    monkeypatch.setattr(sys, "argv", [program, verb, *arguments])
    typed = iter([TEXTS[0][0], "exit"])
    monkeypatch.setattr(builtins, "input", lambda prompt="": next(typed))
    llamafactory_cli()


def execute(block, **names):
    """A Python block, the model's id replaced."""
    names = dict(names)
    exec(compile(block.text.replace(MODEL, "base"), str(block), "exec"), names)
    return names


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The reader's folder after README's commands."""
    folder = tmp_path_factory.mktemp("reader")
    torch.set_num_threads(1)
    teach(folder / "base")
    rows = [json.dumps({"instruction": question}) for question, _ in TEXTS]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    for block in documents.blocks(README, "yaml"):
        (folder / block.file_name).write_text(block.text.replace(MODEL, "base"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for command in main_path():
            run(command, monkeypatch)
    return folder


def main_path():
    """README's commands from distill to bench."""
    commands = [command for block in documents.blocks(README, "bash") for command in block.commands]
    verbs = [tuple(command.arguments[:2]) for command in commands]
    return commands[verbs.index(("lmtp-cli", "distill")) : verbs.index(("lmtp-cli", "bench")) + 1]


def test_the_main_path_is_whole():
    assert [command.arguments[1] for command in main_path()] == [
        *("distill", "train", "train", "export", "export", "report"),
        *("tree", "chat", "bench"),
    ]


def test_what_the_commands_leave(workplace):
    saves = workplace / "saves" / "my_model"
    for folder in ("stage1", "stage2", "heads"):
        assert {"config.json", "model.safetensors"} <= {path.name for path in (saves / folder / "lmtp").iterdir()}
    assert not (saves / "stage1" / "model.safetensors").exists()
    assert (saves / "stage2" / "adapter_model.safetensors").is_file()
    assert not (saves / "ntp" / "lmtp").exists() and (saves / "ntp" / "config.json").is_file()
    for folder in ("stage1", "stage2"):
        assert (saves / folder / "training_heads.png").is_file() and (saves / folder / "trainer_log.jsonl").is_file()
    tree = json.loads((saves / "heads" / "lmtp" / "tree.json").read_text())
    assert {"device", "dtype", "prepacked"} <= tree.keys()
    assert {path.name for path in (workplace / "bench").iterdir()} == {"bench.json", "bench.png"}
    assert sum(1 for _ in (workplace / "data" / "my_model_heldout.jsonl").open()) >= 1


def test_python_of_readme_and_decoding(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    exported = workplace / "saves" / "my_model" / "custom_generate"
    export_custom(exported)
    for block in (*documents.blocks(README, "python"), *documents.blocks(ROOT / "docs" / "decoding.md", "python")):
        execute(block)
    assert "tau" in capsys.readouterr().out


def export_custom(directory):
    """docs/decoding.md's export for plain transformers."""
    from llamafactory.train.tuner import export_model

    keys = {"model_name_or_path": "base", "adapter_name_or_path": "saves/my_model/stage2", "template": "qwen"}
    keys |= {"export_dir": str(directory), "lmtp_export": "custom_generate"}
    try:
        export_model(keys)
    except ValueError as error:
        if "has to be one of ntp, heads." not in str(error):
            raise
        shutil.copytree("saves/my_model/heads", directory)
    assert (directory / "custom_generate" / "generate.py").is_file()


def test_python_of_training(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (block,) = documents.blocks(ROOT / "docs" / "training.md", "python")
    tokens = AutoTokenizer.from_pretrained("base")(TEXTS[0][1], return_tensors="pt")
    names = execute(block, ids=tokens.input_ids, mask=tokens.attention_mask, labels=tokens.input_ids)
    assert len(names["outputs"].losses) == 3
    assert {path.name for path in (workplace / "heads").iterdir()} == {"lmtp"}
