"""Chat with heads: the same answers, how they are found, told and refused; `llamafactory-cli chat` and webchat."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import asdict

import pytest
import runs
import talkers
import tiny
import torch
from talkers import chat_model, soon

from lmtp_factory import LMTPError
from lmtp_factory.modeling import heads_of
from lmtp_factory.modeling.lmtp import LeapModel
from lmtp_factory.plugin.chat import extend_engine


FIRST = talkers.QUESTIONS[0]


def ask(model, question=FIRST, **args) -> dict:
    return asdict(model.chat([{"role": "user", "content": question}], **args)[0])


def stream(model, question=FIRST, **args) -> str:
    return "".join(model.stream_chat([{"role": "user", "content": question}], **args))


@pytest.fixture(scope="module")
def expected(ending):
    """Stock answers."""
    model = chat_model(ending, lmtp_decode="off")
    return {question: ask(model, question) for question in talkers.QUESTIONS}


@pytest.fixture(scope="module")
def streamed(ending):
    """The same as streams: bytes that are no text may be shown otherwise there."""
    model = chat_model(ending, lmtp_decode="off")
    return {question: stream(model, question) for question in talkers.QUESTIONS}


@pytest.fixture(scope="module")
def adapter(llama, data, stage1, tmp_path_factory):
    """Output of a short stage 2 with LoRA."""
    output = tmp_path_factory.mktemp("runs") / "adapter"
    runs.train(llama, data, output, stage="lmtp2", finetuning_type="lora", stage1_pretrained_path=str(stage1))
    return output


# The key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "means"),
    [("", "auto"), ("lmtp_decode: off", "off"), ("lmtp_decode: 'off'", "off"), ("lmtp_decode: forward", "forward"),
     ("lmtp_decode: on", None), ("lmtp_decode: true", None), ("lmtp_decode: sideways", None), ("lmtp_decode:", None)],
)  # fmt: skip
def test_the_key_in_yaml(written, means, llama, tmp_path, monkeypatch):
    """YAML reads off as False and on as True."""
    from llamafactory.hparams import get_infer_args

    (tmp_path / "chat.yaml").write_text(f"model_name_or_path: {llama}\ntemplate: qwen\n{written}\n")
    monkeypatch.setattr(sys, "argv", ["chat", str(tmp_path / "chat.yaml")])
    if means == "forward":  # this model has no heads
        with pytest.raises(LMTPError, match="lmtp_decode: forward asks for leap heads"):
            get_infer_args()
    elif means is None:
        with pytest.raises(LMTPError, match="lmtp_decode is .*, but it has to be one of auto, backward, forward, off."):
            get_infer_args()
    else:
        assert get_infer_args()[2].lmtp_decode == means


@pytest.mark.parametrize(
    "written",
    [["chat", "{yaml}", "lmtp_decode=off"], ["chat", "--lmtp_decode", "off", "--model_name_or_path", "{model}"]],
)
def test_the_key_on_the_command_line(written, ending, tmp_path, monkeypatch):
    from llamafactory.hparams import get_infer_args

    path = runs.write_yaml(tmp_path / "chat.yaml", {"model_name_or_path": str(ending), "template": "qwen"})
    monkeypatch.setattr(sys, "argv", [word.format(yaml=path, model=ending) for word in written])
    assert get_infer_args()[2].lmtp_decode == "off"


# Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["auto", "backward", "forward"])
def test_answers_are_stock_s(decode, ending, expected, streamed, lines):
    """Text, lengths and the reason of the end, whole and streamed; a line before and after each."""
    model = chat_model(ending, lmtp_decode=decode)
    strategy = "backward" if decode == "auto" else decode
    assert lines[-1].startswith(f"Decoding with the leap heads of {ending}/lmtp: {strategy}, dynamic tree of up to ")
    for question, answer in expected.items():
        assert ask(model, question) == answer
        tokens = answer["response_length"]
        told = re.fullmatch(
            rf"Answered with {tokens} tokens, [\d.]+ tokens/s, tau ([\d.]+) \(tokens a forward, {strategy}\)\.",
            lines[-1],
        )
        assert told and float(told[1]) > 1.2
        assert stream(model, question) == streamed[question]
        assert lines[-1].startswith(f"Answered with {tokens} tokens, ")
    assert expected[FIRST]["finish_reason"] == "stop"


def test_whole_answers_in_inference_mode_and_streams_outside(ending, expected, streamed):
    """Whole answers run in inference mode, streams do not, and both use what the other has kept."""
    model = chat_model(ending)
    with torch.inference_mode():
        assert ask(model) == expected[FIRST]
    assert stream(model) == streamed[FIRST]


def test_several_answers_at_once(ending, lines):
    """num_return_sequences, as the API's n."""
    model = chat_model(ending)
    answers = model.chat([{"role": "user", "content": FIRST}], num_return_sequences=2)
    assert len(answers) == 2
    assert lines[-1].startswith("Answered with ")


def test_generate_is_ours(ending):
    """Upstream's patcher puts stock generate back where it does not know a model's."""
    model = chat_model(ending).engine.model
    assert model.generate.__func__ is LeapModel.generate
    assert "GenerationMixin" in str(type(model).__mro__[2].generate)


@pytest.mark.parametrize("decode", ["auto", "off"])
def test_an_export_whose_code_is_trusted(decode, ending, expected, tmp_path, lines):
    """As the web UI loads everything. transformers then takes generate from the export, where upstream stumbles."""
    runs.export(model_name_or_path=ending, export_dir=tmp_path / "export", lmtp_export="heads")
    assert (tmp_path / "export" / "custom_generate" / "generate.py").is_file()
    model = chat_model(tmp_path / "export", trust_remote_code=True, lmtp_decode=decode)
    assert ask(model) == expected[FIRST]
    assert lines[-1].startswith("Answered with " if decode == "auto" else "Exporting with ")


def test_off_is_stock(ending, lines):
    model = chat_model(ending, lmtp_decode="off")
    ask(model)
    stream(model)
    assert heads_of(model.engine.model) is None
    assert lines == []


def test_a_model_without_heads_is_plain(llama, lines):
    model = chat_model(llama)
    ask(model)
    stream(model)
    assert heads_of(model.engine.model) is None
    assert lines == []


def test_the_adapter_s_heads_come_first(llama, stage1, adapter, lines):
    model = chat_model(llama, adapter_name_or_path=adapter, stage1_pretrained_path=stage1, max_new_tokens=20)
    assert f"leap heads of {adapter}/lmtp" in lines[-1]
    stock = chat_model(llama, adapter_name_or_path=adapter, lmtp_decode="off", max_new_tokens=20)
    assert ask(model) == ask(stock)


def test_base_and_stage_one_heads(llama, stage1, lines):
    model = chat_model(llama, stage1_pretrained_path=stage1, max_new_tokens=20)
    assert f"leap heads of {stage1}/lmtp" in lines[-1]
    assert ask(model) == ask(chat_model(llama, lmtp_decode="off", max_new_tokens=20))


def test_the_yaml_of_a_stage_chats_too(ending, expected, lines):
    """What it says about training does not matter, and nothing is attached for training."""
    model = chat_model(ending, stage="lmtp2", finetuning_type="full", num_heads=2)
    assert model.engine.model.leap_stage is None
    assert ask(model) == expected[FIRST]


def test_generation_that_heads_cannot_help_is_told(ending, lines):
    """Beam search never comes to them."""
    answer = ask(chat_model(ending, num_beams=2))
    assert re.fullmatch(
        rf"Answered with {answer['response_length']} tokens, [\d.]+ tokens/s, tau 1.00 .*, off: beam search.*\)\.",
        lines[-1],
    )
    assert answer == ask(chat_model(ending, num_beams=2, lmtp_decode="off"))


# Streams that end otherwise --------------------------------------------------------------------------------------


def test_a_stream_that_nobody_reads_stops(endless, lines):
    model = chat_model(endless)
    before = ask(model), stream(model)
    texts = model.stream_chat([{"role": "user", "content": FIRST}], max_new_tokens=talkers.LENGTH - 200)
    assert [next(texts) for _ in range(3)]
    texts.close()
    del texts
    told = soon(lambda: next((line for line in lines if line.startswith("Stopped an answer")), None))
    assert told and int(re.search(r"(\d+) tokens", told)[1]) < 2000
    assert (ask(model), stream(model)) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_stream_whose_generation_fails_ends(ending, expected, lines, monkeypatch):
    model = chat_model(ending)
    with monkeypatch.context() as broken:

        def fail(*args):
            raise RuntimeError("out of memory")

        broken.setattr("lmtp_factory.decoding.generate.decode", fail)
        assert stream(model) == ""
        with pytest.raises(RuntimeError, match="out of memory"):
            ask(model)
    assert not any(line.startswith("Answered") for line in lines)
    assert ask(model) == expected[FIRST]


# Refusals --------------------------------------------------------------------------------------------------------


def refused(message: str, model, **args) -> None:
    with pytest.raises(LMTPError, match=message) as caught:
        chat_model(model, **args)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize("decode", ["auto", "backward"])
@pytest.mark.parametrize("damage", ["truncated", "no weights", "broken config", "broken tree"])
def test_damaged_heads(damage, decode, ending, tmp_path, no_model_loads):
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


def test_heads_of_another_model(stage1, tmp_path, no_model_loads):
    other = tiny.tiny_llama(tmp_path / "other", hidden_size=16, head_dim=4)
    refused(r"belong to .*tiny-llama \(hidden size 32\), not to .*other", other, stage1_pretrained_path=stage1)


@pytest.mark.parametrize("decode", ["backward", "forward"])
def test_no_heads(decode, llama, no_model_loads):
    refused(f"lmtp_decode: {decode} asks for leap heads, but neither", llama, lmtp_decode=decode)


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
        extend_engine(module)
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
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(ending)], env=env, capture_output=True, text=True, timeout=180
    )
    assert result.stdout.splitlines()[-1] == "5", result.stderr[-2000:]
    assert "llamafactory.chat.hf_engine" in result.stderr.splitlines()[-1]


# The programs ----------------------------------------------------------------------------------------------------


def converse(yaml: str, *questions: str) -> str:
    """What `llamafactory-cli chat` prints."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    program = [str(runs.BIN / "llamafactory-cli"), "chat", yaml]
    typed = "".join(f"{question}\nclear\n" for question in questions) + "exit\n"
    result = subprocess.run(program, input=typed.encode(), env=env, capture_output=True, timeout=180)
    said = result.stdout.decode()  # text mode would rewrite carriage returns
    assert "Welcome to the CLI application" in said, result.stderr[-4000:].decode()
    return said


def test_the_chat_command(ending, expected, streamed, tmp_path):
    args = {"model_name_or_path": str(ending), "template": "qwen", "do_sample": False, "max_new_tokens": 60}
    said = converse(runs.write_yaml(tmp_path / "chat.yaml", args), *talkers.QUESTIONS[:2])
    assert f"Decoding with the leap heads of {ending}/lmtp: backward" in said
    for question in talkers.QUESTIONS[:2]:
        assert f"User: Assistant: {streamed[question]}\n[INFO|" in said  # the log has a line of its own
        assert f">> Answered with {expected[question]['response_length']} tokens, " in said


def test_the_chat_command_with_an_adapter(llama, adapter, tmp_path):
    args = {"model_name_or_path": str(llama), "adapter_name_or_path": str(adapter), "template": "qwen"}
    args |= {"do_sample": False, "max_new_tokens": 20, "lmtp_decode": "backward"}
    said = converse(runs.write_yaml(tmp_path / "chat.yaml", args), FIRST)
    stock = chat_model(llama, adapter_name_or_path=adapter, lmtp_decode="off", max_new_tokens=20)
    assert f"Decoding with the leap heads of {adapter}/lmtp: backward" in said
    assert f"User: Assistant: {stream(stock)}\n[INFO|" in said
    assert ">> Answered with 20 tokens, " in said


def test_webchat_answers(ending, expected, streamed, lines, tmp_path, monkeypatch):
    """The app that `llamafactory-cli webchat` launches, asked over HTTP."""
    monkeypatch.chdir(tmp_path)  # upstream makes a cache folder
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    args = {"model_name_or_path": str(ending), "template": "qwen", "do_sample": False}
    monkeypatch.setattr(sys, "argv", ["webchat", runs.write_yaml(tmp_path / "chat.yaml", args)])
    import gradio_client
    from llamafactory.webui.interface import create_web_demo

    demo = create_web_demo().queue()
    _, url, _ = demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        client = gradio_client.Client(url, verbose=False)
        chatbot, _ = client.predict([], "user", FIRST, False, api_name="/append")
        settings = {"max_new_tokens": 60, "top_p": 0.7, "temperature": 0.95}
        media = dict.fromkeys(("image", "video", "audio"))
        chatbot = client.predict(
            chatbot, "en", "", "", *media.values(), *settings.values(), True, False, True, api_name="/stream"
        )
    finally:
        demo.close()
    said, told = chatbot[-1]["content"].split("\n\n<details class='lmtp-answer'>")
    assert said == streamed[FIRST]
    tokens = expected[FIRST]["response_length"]
    assert told.startswith(f"<summary>{tokens} tokens, ")
    assert lines[-1].startswith(f"Answered with {tokens} tokens, ")


def test_batch_prediction(ending, data, tmp_path, lines):
    """`stage: sft` that only predicts, in batches: the same predictions."""
    for package in ("jieba", "nltk", "rouge_chinese"):
        pytest.importorskip(package)
    from llamafactory.train.tuner import run_exp

    predictions = {}
    for decode in ("auto", "off"):
        output = tmp_path / decode
        args = {"stage": "sft", "do_train": False, "do_predict": True, "predict_with_generate": True, "dataset": None}
        args |= {"eval_dataset": tiny.DATASET, "max_samples": 6, "per_device_eval_batch_size": 3, "cutoff_len": 256}
        args |= {"do_sample": False, "max_new_tokens": 30, "lmtp_decode": decode}
        run_exp(runs.arguments(ending, data, output, **args))
        rows = (output / "generated_predictions.jsonl").read_text().splitlines()
        predictions[decode] = [json.loads(row)["predict"] for row in rows]
    assert predictions["auto"] == predictions["off"]
    assert sum(line.startswith("Decoding with the leap heads") for line in lines) == 1


def test_batch_prediction_checks_its_heads(ending, data, tmp_path, no_model_loads):
    broken = shutil.copytree(ending, tmp_path / "broken")
    (broken / "lmtp" / "model.safetensors").unlink()
    args = {"stage": "sft", "do_train": False, "do_predict": True, "predict_with_generate": True, "dataset": None}
    with pytest.raises(LMTPError, match="is missing"):
        from llamafactory.hparams import get_train_args

        get_train_args(runs.arguments(broken, data, tmp_path / "out", eval_dataset=tiny.DATASET, **args))
