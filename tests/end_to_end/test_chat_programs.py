"""The programs that answer: `llamafactory-cli chat`, webchat, batch prediction."""

import json
import os
import shutil
import subprocess
import sys
from inspect import signature

import pytest
from helpers import chat_models, tiny_data
from helpers import llamafactory_runs as runs
from helpers.chat_models import chat_model, stream

from lmtp_factory import LMTPError


FIRST = chat_models.QUESTIONS[0]


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
    said = converse(runs.write_yaml(tmp_path / "chat.yaml", args), *chat_models.QUESTIONS[:2])
    assert f"Decoding with the leap heads of {ending}/lmtp: backward" in said
    for question in chat_models.QUESTIONS[:2]:
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
    chat_models.draft_in_every_step(monkeypatch)  # an answer without drafts has nothing to unfold
    monkeypatch.chdir(tmp_path)  # upstream makes a cache folder
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    args = {"model_name_or_path": str(ending), "template": "qwen", "do_sample": False}
    monkeypatch.setattr(sys, "argv", ["webchat", runs.write_yaml(tmp_path / "chat.yaml", args)])
    import gradio_client
    from llamafactory.webui.chatter import WebChatModel
    from llamafactory.webui.interface import create_web_demo

    demo = create_web_demo().queue()
    _, url, _ = demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        client = gradio_client.Client(url, verbose=False)
        chatbot, _ = client.predict([], "user", FIRST, False, api_name="/append")
        settings = {"max_new_tokens": 60, "top_p": 0.7, "temperature": 0.95}
        if "seed" in signature(WebChatModel.__base__.stream).parameters:  # LLaMA-Factory 0.9.6
            settings["seed"] = -1
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
        args |= {
            "eval_dataset": tiny_data.DATASET,
            "max_samples": 6,
            "per_device_eval_batch_size": 3,
            "cutoff_len": 256,
        }
        args |= {
            "do_sample": False,
            "max_new_tokens": 30,
            "lmtp_decode": decode,
            "export_dir": str(tmp_path / "unused"),
        }
        run_exp(runs.arguments(ending, data, output, **args))
        rows = (output / "generated_predictions.jsonl").read_text().splitlines()
        predictions[decode] = [json.loads(row)["predict"] for row in rows]
    assert predictions["auto"] == predictions["off"]
    assert sum(line.startswith("Decoding with the leap heads") for line in lines) == 1
    assert not any("xporting" in line for line in lines)


def test_batch_prediction_checks_its_heads(ending, data, tmp_path, no_model_loads):
    broken = shutil.copytree(ending, tmp_path / "broken")
    (broken / "lmtp" / "model.safetensors").unlink()
    args = {"stage": "sft", "do_train": False, "do_predict": True, "predict_with_generate": True, "dataset": None}
    with pytest.raises(LMTPError, match="is missing"):
        from llamafactory.hparams import get_train_args

        get_train_args(runs.arguments(broken, data, tmp_path / "out", eval_dataset=tiny_data.DATASET, **args))
