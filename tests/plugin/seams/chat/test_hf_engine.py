"""Chat with heads: the same answers, how heads are found and told."""

import re
import sys

import pytest
import torch
from helpers import chat_models
from helpers import llamafactory_runs as runs
from helpers.chat_models import ask, chat_model, eventually, stream
from transformers import GenerationMixin

from lmtp_factory import LMTPError
from lmtp_factory.decoding.mixin import LookBackDecoding
from lmtp_factory.modeling import heads_of


FIRST = chat_models.QUESTIONS[0]


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


@pytest.fixture
def drafts_in_every_step(monkeypatch):
    chat_models.draft_in_every_step(monkeypatch)


@pytest.mark.parametrize("decode", ["auto", "backward", "forward"])
def test_answers_are_stock_s(decode, ending, expected, streamed, lines, drafts_in_every_step):
    """Text, lengths and the reason of the end, whole and streamed; a line before and after each."""
    model = chat_model(ending, lmtp_decode=decode)
    strategy = "backward" if decode == "auto" else decode
    assert lines[-1].startswith(f"Decoding with the leap heads of {ending}/lmtp: {strategy}, dynamic tree of up to ")
    for question, answer in expected.items():
        assert ask(model, question) == answer
        tokens = answer["response_length"]
        told = re.fullmatch(
            rf"Answered with {tokens} tokens, [\d.]+ tokens/s, tau ([\d.]+) \(tokens a forward, {strategy}\), "
            r"mean acceptance length ([\d.]+) \(by position [\d% ]+\)\.",
            lines[-1],
        )
        assert told and float(told[2]) >= float(told[1]) > 1.2
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


def test_generate_is_look_back_decoding_in_front_of_stock(ending):
    """Upstream's patcher puts stock generate on the instance where it does not know a model's."""
    model = chat_model(ending).engine.model
    assert model.generate.__func__ is LookBackDecoding.generate
    defining = [kind for kind in type(model).__mro__ if "generate" in vars(kind)]
    assert defining == [LookBackDecoding, GenerationMixin]


@pytest.mark.parametrize("decode", ["auto", "off"])
def test_an_export_whose_code_is_trusted(decode, ending, expected, tmp_path, lines):
    """As the web UI loads everything. transformers then takes generate from the export, where upstream stumbles."""
    runs.export(model_name_or_path=ending, export_dir=tmp_path / "export", lmtp_export="custom_generate")
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
    assert model.engine.model.objective is None
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
    texts = model.stream_chat([{"role": "user", "content": FIRST}], max_new_tokens=chat_models.LENGTH - 200)
    assert [next(texts) for _ in range(3)]
    texts.close()
    del texts
    told = eventually(lambda: next((line for line in lines if line.startswith("Stopped an answer")), None))
    assert told and int(re.search(r"(\d+) tokens", told)[1]) < 2000
    assert (ask(model), stream(model)) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "broken_part", ["mixin.decode", "tree_builder.TreeBuilder.build"], ids=["at once", "after a token"]
)
def test_a_stream_whose_generation_fails_ends(broken_part, ending, expected, lines, monkeypatch):
    model = chat_model(ending)
    with monkeypatch.context() as broken:

        def fail(*args):
            raise RuntimeError("out of memory")

        broken.setattr(f"lmtp_factory.decoding.{broken_part}", fail)
        streamed = stream(model)
        assert expected[FIRST]["response_text"].startswith(streamed)
        assert bool(streamed) == (broken_part != "mixin.decode")
        with pytest.raises(RuntimeError, match="out of memory"):
            ask(model)
    assert not any(line.startswith("Answered") for line in lines)
    assert ask(model) == expected[FIRST]
