"""What chat refuses before a model loads, and engines that it leaves as they are."""

import shutil
import types

import pytest
from helpers import chat_models, tiny_models
from helpers.chat_models import ask, chat_model
from helpers.processes import python

from lmtp_factory import LMTPError
from lmtp_factory.modeling import heads_of
from lmtp_factory.plugin.seams.chat.hf_engine import extend


FIRST = chat_models.QUESTIONS[0]


def refused(message: str, model, **args) -> None:
    with pytest.raises(LMTPError, match=message) as caught:
        chat_model(model, **args)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize("decode", ["auto", "backward"])
@pytest.mark.parametrize("damage", ["truncated", "no weights", "broken config", "broken tree"])
def test_damaged_heads_are_refused(damage, decode, ending, tmp_path, no_model_loads):
    broken = shutil.copytree(ending, tmp_path / "broken")
    weights = broken / "lmtp" / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    else:
        name = "config.json" if damage == "broken config" else "tree.json"
        (broken / "lmtp" / name).write_text("{")
    refused("truncated or damaged|is missing|is damaged", broken, lmtp_decode=decode)


def test_damaged_heads_do_not_matter_where_they_are_off(ending, expected, tmp_path):
    broken = shutil.copytree(ending, tmp_path / "broken")
    (broken / "lmtp" / "model.safetensors").unlink()
    assert ask(chat_model(broken, lmtp_decode="off")) == expected[FIRST]


def test_heads_of_another_model_are_refused(stage1, tmp_path, no_model_loads):
    other = tiny_models.save_llama(tmp_path / "other", hidden_size=16, head_dim=4)
    refused(r"belong to .*tiny-llama \(hidden size 32\), not to .*other", other, stage1_pretrained_path=stage1)


@pytest.mark.parametrize("decode", ["backward", "forward"])
def test_a_strategy_without_heads_is_refused(decode, llama, no_model_loads):
    refused(f"lmtp_decode: {decode} asks for leap heads, but neither", llama, lmtp_decode=decode)


def test_an_export_dir_of_a_yaml_that_chats_changes_nothing(llama, ending, expected, tmp_path, lines):
    """One YAML for export and chat: each command checks and does its own part."""
    keys = {"export_dir": tmp_path / "export", "lmtp_export": "heads"}
    model = chat_model(ending, **keys)
    assert ask(model) == expected[FIRST]
    assert [line.split()[0] for line in lines] == ["Decoding", "Answered"]  # not "Exporting"
    assert not (tmp_path / "export").exists()
    assert heads_of(chat_model(ending, lmtp_decode="off", **keys).engine.model) is None
    assert heads_of(chat_model(llama, **keys).engine.model) is None  # only an export misses heads


def test_a_strategy_without_heads_is_refused_beside_an_export_dir(llama, tmp_path, no_model_loads):
    for keys in ({"export_dir": tmp_path}, {"export_dir": tmp_path, "lmtp_export": "heads"}):
        refused("lmtp_decode: backward asks for leap heads, but neither", llama, lmtp_decode="backward", **keys)
    refused("does not go with infer_backend", llama, lmtp_decode="backward", infer_backend="vllm", export_dir=tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("infer_backend", "vllm"), ("infer_backend", "sglang"), ("stage", "rm"), ("use_unsloth", True)]
)
def test_engines_that_do_not_use_heads(key, value, ending, no_model_loads):
    refused(f"lmtp_decode: backward does not go with {key}", ending, lmtp_decode="backward", **{key: value})
    with pytest.raises(
        Exception
    ) as caught:  # auto leaves it to upstream, which misses a package or calls from_pretrained
        chat_model(ending, **{key: value})
    assert not isinstance(caught.value, LMTPError)


@pytest.mark.parametrize("missing", ["chat", "stream_chat", "_chat", "_stream_chat", "load_model"])
def test_an_engine_of_another_layout_is_left_as_it_is(missing):
    from llamafactory.chat import hf_engine

    engine = type("Engine", (), {n: f for n, f in vars(hf_engine.HuggingfaceEngine).items() if n != missing})
    module = types.SimpleNamespace(HuggingfaceEngine=engine, load_model=hf_engine.load_model)
    if missing == "load_model":
        del module.load_model
    before = dict(vars(module)), dict(vars(engine))
    with pytest.raises((AttributeError, TypeError)):
        extend(module)
    assert (dict(vars(module)), dict(vars(engine))) == before


def test_an_unknown_engine_chats_without_heads(ending):
    """Fail closed: auto goes on without heads, a strategy that was asked for is refused."""
    program = (
        "import sys\nimport lmtp_factory.plugin.hooks as hooks\nextend = hooks._extend\n"
        "def edited(seam, module):\n"
        "    if seam.name == 'llamafactory.chat.hf_engine':\n"
        "        module.HuggingfaceEngine.stream_chat = module.HuggingfaceEngine.chat\n"
        "    extend(seam, module)\n"
        "hooks._extend = edited\n"
        "from llamafactory.chat import ChatModel\n"
        "args = dict(model_name_or_path=sys.argv[1], template='qwen', do_sample=False, max_new_tokens=5)\n"
        "model = ChatModel(args)\nassert not hasattr(model.engine.model, 'leap_heads')\n"
        "print(model.chat([{'role': 'user', 'content': 'hi'}])[0].response_length)\n"
        "ChatModel(args | {'lmtp_decode': 'backward'})\n"
    )
    result = python(program, str(ending), check=False)
    assert result.stdout.splitlines()[-1] == "5", result.stderr[-2000:]
    assert "llamafactory.chat.hf_engine" in result.stderr.splitlines()[-1]
