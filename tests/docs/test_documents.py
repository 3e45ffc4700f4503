"""What the documents say is so: commands and YAML are accepted, names exist, keys are those of the code.

Every fenced block of README.md, README_zh.md and docs/*.md is checked as far as a machine without GPU and network allows:
``yaml`` goes through upstream's parser, commands through the parsers of their programs, ``python`` is compiled and its
imports are resolved. test_documents_run.py runs README's main path. ``text`` blocks show output or layers: not checked.

Not run, and why: ``pip install`` and ``vllm serve`` (network), ``--engine server`` (needs a server; its options are parsed),
torchrun, DeepSpeed, several nodes and Ray (the files that the commands name are read and the other arguments parsed;
tests/plugin trains with them), ``llamafactory-cli webui`` (the browser tests drive it), ``make`` (its targets are looked
up), benchmarks (their arguments are parsed), ``lmtp-cli import`` (needs published checkpoints; its options are parsed).
"""

import argparse
import ast
import importlib
import json
import re
import runpy
import sys
from dataclasses import MISSING, fields

import pytest
from helpers import documents, tiny_models
from helpers.documents import DOCUMENTS, README, README_ZH, ROOT
from transformers import AutoConfig

from lmtp_factory import LMTPConfig
from lmtp_factory.cli import build_parser
from lmtp_factory.modeling import LeapHeads, save_heads


NOT_RUN = ("pip", "source", "vllm")
MODEL = "Qwen/Qwen2.5-3B-Instruct"
FOLDERS = ("lmtp_factory", "configs", "data", "benchmarks", "docs", "tests", "experiments")
OF_THE_READER = "my_model"  # in names of files that commands write
MAP = ROOT / "docs" / "architecture.md"
# These have tests of their own for what they hold beside sentences.
WITH_OTHERS = (*DOCUMENTS, ROOT / "configs" / "README.md", ROOT / "benchmarks" / "README.md")
# LLaMA-Factory's own keys that mean something more in L-MTP stages.
UPSTREAM_KEYS = {"stage", "packing"}
YAML_BLOCKS, BASH_BLOCKS, PYTHON_BLOCKS = map(documents.all_blocks, ("yaml", "bash", "python"))
COMMANDS = [command for block in BASH_BLOCKS for command in block.commands]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the documents' YAML names: datasets, heads, an adapter and an export, all tiny."""
    folder = tmp_path_factory.mktemp("documents")
    base = tiny_models.save_qwen2(folder / "base", tie=True)
    text = AutoConfig.from_pretrained(base)
    heads = LeapHeads(LMTPConfig(3, 2, hidden_size=text.hidden_size, vocab_size=text.vocab_size))
    saves = folder / "saves" / "my_model"
    tiny_models.save_qwen2(saves / "heads", tie=True)
    for name in ("stage1", "stage2", "heads"):
        save_heads(heads, saves / name / "lmtp")
    (saves / "stage2" / "adapter_config.json").write_text("{}")
    columns = {"prompt": "prompt_ids", "response": "output_ids"}
    entry = {"file_name": "my_model_train.jsonl", "formatting": "alpaca", "columns": columns}
    (folder / "data").mkdir()
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"my_model_train": entry}))
    return folder


def parse_keys(keys, workplace, monkeypatch):
    """Upstream's and this package's checks of a YAML.

    The model's id is replaced by a tiny model, whose vocabulary is smaller than a draft vocabulary of a real one, and
    ``output_dir``, which holds the next step's heads here, by an empty one.
    """
    from llamafactory.hparams import get_infer_args, get_train_args

    monkeypatch.chdir(workplace)
    if keys["model_name_or_path"] == MODEL:
        keys = keys | {"model_name_or_path": "base"}
    if "draft_vocab_size" in keys:
        keys = keys | {"draft_vocab_size": 100}
    if "stage" in keys:
        # bf16 is refused without a GPU unless the CPU is asked for
        return get_train_args(keys | {"output_dir": "output", "use_cpu": True})[3]
    return get_infer_args(keys)[2]


def yaml_files():
    """Those that README tells to save, by name."""
    return {block.file_name: block.keys for block in documents.blocks(README, "yaml")}


# Blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_blocks_are_of_languages_that_are_checked(document):
    assert {block.language for block in documents.blocks(document)} <= {"bash", "yaml", "python", "text"}
    assert document.read_text("utf-8").count("```") == 2 * len(documents.blocks(document))


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=str)
def test_yaml_is_accepted(block, workplace, monkeypatch):
    assert block.file_name
    parsed = parse_keys(block.keys, workplace, monkeypatch)
    assert parsed.lmtp_stage == {"lmtp1": 1, "lmtp2": 2}.get(block.keys.get("stage"))


def test_a_key_that_nobody_knows_is_refused(workplace, monkeypatch):
    """Or the test above would prove little."""
    with pytest.raises(ValueError, match="leap_strides"):
        parse_keys(yaml_files()["stage1.yaml"] | {"leap_strides": 2}, workplace, monkeypatch)


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=str)
def test_python_imports_what_exists(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


# Commands ------------------------------------------------------------------------------------------------------------


class _Parsed(Exception):
    """Raised instead of going on to work."""


def parse_script(script, arguments, monkeypatch):
    """Let a script's own parser read its arguments, and stop there."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend((ROOT / script).parent)
    with pytest.raises(_Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def check_llamafactory(verb, arguments, workplace, monkeypatch):
    """A YAML file of README with overrides behind it."""
    assert verb in ("train", "export", "chat", "api", "webchat")
    overrides = dict(argument.split("=", 1) for argument in arguments[1:])
    deepspeed = overrides.pop("deepspeed", None)  # would look for the other processes
    assert deepspeed is None or json.loads((ROOT / deepspeed).read_text("utf-8"))
    keys = yaml_files()[arguments[0]]
    assert ("stage" in keys) == (verb == "train") and ("export_dir" in keys) == (verb == "export")
    parse_keys(keys | overrides, workplace, monkeypatch)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_accepted(command, workplace, monkeypatch, capsys):
    program, *arguments = command.arguments
    if program == "lmtp-cli":
        build_parser().parse_args(arguments)
    elif program == "llamafactory-cli" and arguments != ["webui"]:
        check_llamafactory(arguments[0], arguments[1:], workplace, monkeypatch)
    elif program == "make":
        assert set(arguments) <= make_targets()
    elif program == "python" and arguments[:2] == ["-m", "venv"]:
        assert len(arguments) == 3
    elif program == "python" and arguments[:2] == [
        "-m",
        "vllm.entrypoints.openai.api_server",
    ]:  # in another environment
        speculative = json.loads(arguments[arguments.index("--speculative-config") + 1])
        assert f'"{speculative["model"]}"' in (ROOT / "lmtp_factory/cli/serve.py").read_text("utf-8")
    elif program == "python" and arguments[0] == "-c":
        exec(arguments[1], {})
        assert "configs" in capsys.readouterr().out
    elif program == "python":
        parse_script(arguments[0], arguments[1:], monkeypatch)
    else:
        assert program in (*NOT_RUN, "llamafactory-cli")


def test_an_option_that_nobody_knows_is_refused(monkeypatch, capsys):
    """Or the test above would prove little."""
    with pytest.raises(SystemExit):
        build_parser().parse_args(["bench", "model", "--prompts", "file", "--node", "x"])
    with pytest.raises(SystemExit):
        parse_script("benchmarks/loss_memory.py", ["--sweeps", "tokens"], monkeypatch)
    assert "--sweeps" in capsys.readouterr().err


def make_targets():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("document", WITH_OTHERS, ids=lambda document: str(document.relative_to(ROOT)))
def test_commands_in_sentences_exist(document):
    for span in documents.code_spans(document):
        program, *arguments = span.split()
        if program == "make":
            assert set(arguments) <= make_targets(), span
        if program == "lmtp-cli" and len(arguments) == 1:  # the command's name alone
            with pytest.raises(SystemExit) as stop:
                build_parser().parse_args([*arguments, "--help"])
            assert stop.value.code == 0, span
        elif program == "lmtp-cli" and arguments and "--help" not in arguments:
            # sentences may leave the prompts out
            build_parser().parse_args(arguments if "--prompts" in arguments else [*arguments, "--prompts", "file"])
        if program == "python":
            with pytest.MonkeyPatch.context() as monkeypatch:
                parse_script(arguments[0], arguments[1:], monkeypatch)


# Names ---------------------------------------------------------------------------------------------------------------


def named_paths(document):
    """Paths of this repository in sentences and commands, without those that the reader's commands write."""
    words = [word for block in documents.blocks(document, "bash") for word in re.split(r"[\s=]+", block.text)]
    spans = [*documents.code_spans(document), *words]
    return {
        path for path in spans if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", path) and OF_THE_READER not in path
    }


@pytest.mark.parametrize(
    "document", [d for d in WITH_OTHERS if d != MAP], ids=lambda document: str(document.relative_to(ROOT))
)
def test_paths_exist(document):
    assert [path for path in sorted(named_paths(document)) if not (ROOT / path).exists()] == []


@pytest.mark.skipif(not (ROOT / "lmtp_factory" / "convert").is_dir(), reason="the map shows the layout with convert/")
def test_the_map_shows_what_is_there():
    assert [path for path in sorted(named_paths(MAP)) if not (ROOT / path).exists()] == []
    names = {path.name for path in (ROOT / "lmtp_factory").rglob("*.py")}
    files = [span.rpartition("/")[2] for span in documents.code_spans(MAP) if span.endswith(".py") and "<" not in span]
    assert [name for name in files if name not in names] == []
    shown = set(documents.code_spans(MAP))
    folders = {f"lmtp_factory/{path.parent.name}/" for path in (ROOT / "lmtp_factory").glob("*/*.py")}
    assert folders - shown == set(), "folders that the map leaves out"


@pytest.mark.parametrize("document", WITH_OTHERS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_resolve(document):
    for link in documents.links(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in documents.anchors(target), link


# Keys ----------------------------------------------------------------------------------------------------------------


def key_table():
    """Rows of docs/training.md's table of keys."""
    (table,) = (t for t in documents.tables(ROOT / "docs" / "training.md") if t[0][:2] == ["key", "default"])
    return table


def keys_class():
    """The part of upstream's arguments that this package adds."""
    from llamafactory.hparams import FinetuningArguments

    return next(part for part in FinetuningArguments.__mro__ if part.__name__ == "LMTPArguments")


def key_defaults():
    """Key -> default as a user sees it: what is left out of the YAML is left to the heads' configuration."""
    config = LMTPConfig()
    defaults = {}
    for field in fields(keys_class()):
        value = field.default if field.default is not MISSING else field.default_factory()
        if value is None:
            value = getattr(config, field.name.removeprefix("leap_"), getattr(config, field.name, None))
            value = None if field.name == "leap_offsets" else value
        defaults[field.name] = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return defaults


def test_key_table_equals_the_code():
    documented = {row[0].strip("`"): row[1].strip("`") for row in key_table()[1:]}
    assert documented.keys() - UPSTREAM_KEYS == key_defaults().keys()
    assert {key: documented[key] for key in key_defaults()} == key_defaults()


def test_the_key_table_explains_every_value():
    """Words in code font of a key's help, which are mostly the values that it takes."""
    meanings = {row[0].strip("`"): " ".join(row[1:]) for row in key_table()[1:]}
    for field in fields(keys_class()):
        words = set(re.findall(r"`(\w+)`", field.metadata["help"]))
        assert words <= set(re.findall(r"`(\w+)`", meanings[field.name])), field.name


# README --------------------------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 200


@pytest.mark.parametrize("readme", [README, README_ZH], ids=lambda readme: readme.name)
def test_the_first_sixty_lines_end_with_a_trained_stage_1(readme):
    first = [b for b in documents.blocks(readme) if b.line + b.text.count("\n") + 1 <= 60]
    commands = [c.arguments for b in first if b.language == "bash" for c in b.commands]
    assert [c[:2] for c in commands] == [
        ["pip", "install"],
        ["lmtp-cli", "doctor"],
        ["lmtp-cli", "distill"],
        ["llamafactory-cli", "train"],
    ]
    (stage1,) = (b for b in first if b.language == "yaml")
    assert commands[-1][2] == stage1.file_name and stage1.keys["stage"] == "lmtp1"


def code_of(block):
    """A block without comments."""
    if block.language == "yaml":
        return block.file_name, block.keys
    if block.language == "bash":
        return [command.words for command in block.commands]
    return ast.dump(ast.parse(block.text))


def test_both_readmes_say_the_same():
    assert [level for level, _ in documents.headings(README)] == [level for level, _ in documents.headings(README_ZH)]
    english, chinese = documents.blocks(README), documents.blocks(README_ZH)
    assert [code_of(block) for block in english] == [code_of(block) for block in chinese]
    shapes = [[[len(row) for row in table] for table in documents.tables(readme)] for readme in (README, README_ZH)]
    assert shapes[0] == shapes[1]
    figures = [re.findall(r"\d[\d,.]*\d", str(documents.tables(readme))) for readme in (README, README_ZH)]
    assert figures[0] == figures[1]
    swapped = {"README_zh.md": "README.md"}
    assert [swapped.get(link, link) for link in documents.links(README)] == documents.links(README_ZH)


@pytest.mark.parametrize("readme", [README, README_ZH], ids=lambda readme: readme.name)
def test_the_other_language_is_linked_at_the_top(readme):
    other = {README: "README_zh.md", README_ZH: "README.md"}[readme]
    assert f"]({other})" in "".join(readme.read_text("utf-8").splitlines()[:3])
