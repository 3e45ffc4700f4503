"""lmtp-cli report on tiny models."""

import gc
import json
import weakref

import pytest
from helpers import tiny_data, tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.cli import main
from lmtp_factory.errors import LMTPError
from lmtp_factory.evaluation import marginal_scores, scoring
from lmtp_factory.evaluation import report as report_module


@pytest.fixture
def model(tmp_path):
    return AutoModelForCausalLM.from_pretrained(tiny_models.save_llama(tmp_path / "model"))


@pytest.fixture
def rows(tmp_path):
    return tiny_data.save_token_rows(tmp_path / "rows.jsonl")


def test_report_command(model, rows, tmp_path, capsys):
    attach_heads(model, LMTPConfig(offsets=(2, 4), base_model="base"), stage=2).save_pretrained(tmp_path / "heads")
    plain = model.config.name_or_path
    assert (
        main(
            [
                "report",
                f"plain={plain}",
                f"ours={tmp_path / 'heads'}",
                "--rows",
                str(rows),
                "--output-dir",
                str(tmp_path),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["plain"]["offsets"] == report["ours"]["offsets"] == [1, 2, 4]
    assert report["plain"]["losses"] == pytest.approx(
        report["ours"]["losses"], rel=1e-5
    )  # untrained heads are the LM head
    assert f"{report['ours']['perplexity']:.3f}" in printed
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_marginal_beside_heads(model, rows, tmp_path, capsys):
    """A plain model has the columns of marginalisation alone."""
    attach_heads(model, LMTPConfig(offsets=(2, 4), base_model="base"), stage=2).save_pretrained(tmp_path / "heads")
    arguments = ["report", f"plain={model.config.name_or_path}", f"ours={tmp_path / 'heads'}", "--rows", str(rows)]
    options = ["--output-dir", str(tmp_path), "--marginal", "4", "1", "4", "--marginal-positions", "9"]
    assert main([*arguments, *options]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    plain, ours = report["plain"]["marginal"], report["ours"]["marginal"]
    assert [score["k"] for score in plain["by_k"]] == [1, 4] and plain["positions"] == ours["positions"] == 9
    assert plain["by_k"] == ours["by_k"]  # stage 2 of no step: the same backbone
    assert (plain["heads"], list(ours["heads"])) == ({}, ["+2"])
    assert plain["by_k"][1]["+3"]["forwards"] == 2 and plain["by_k"][1]["+3"]["rows"] == 8
    assert 0 < plain["by_k"][0]["+2"]["mass"] < plain["by_k"][1]["+2"]["mass"] < 1
    assert "(9, evenly spread, of 19)" in printed
    assert main(arguments + options[:2]) == 0
    assert "marginal" not in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--marginal-positions", "9"], "--marginal-positions is for --marginal"),
        (["--marginal", "4"], "No output of --rows has 3 tokens"),
    ],
)
def test_marginal_is_refused_before_a_model_loads(tmp_path, capsys, monkeypatch, options, message):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt_ids": "1 2", "output_ids": "3 4"}\n')
    monkeypatch.setattr(report_module, "load_for_scoring", lambda *args: pytest.fail("a model was about to load"))
    assert main(["report", "model", "--rows", str(rows), *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("k", ["0", "65", "4,16", "model"])
def test_a_k_is_a_number_from_1_to_64(rows, capsys, k):
    with pytest.raises(SystemExit):
        main(["report", "model", "--rows", str(rows), "--marginal", "1", k])
    assert f"{k} is no whole number from 1 to 64" in capsys.readouterr().err


@pytest.fixture
def refused(model, rows, monkeypatch, capsys):
    """Arguments behind a plain model -> the sentence of a refusal before anything is scored."""
    monkeypatch.setattr(scoring, "score_heads", lambda *args: pytest.fail("a model was about to be scored"))

    def refuse(*arguments) -> str:
        first = f"first={model.config.name_or_path}"
        assert main(["report", first, *map(str, arguments), "--rows", str(rows)]) == 1
        line = capsys.readouterr().err.splitlines()[-1]  # progress bars of saving models come before it
        return line.removeprefix("lmtp-cli report: ")

    return refuse


@pytest.fixture
def nothing_loads(monkeypatch):
    monkeypatch.setattr(report_module, "load_for_scoring", lambda *args: pytest.fail("a model was about to load"))


def save_heads(folder, base=None, **config):
    """A stage-1 directory."""
    base = base or tiny_models.save_llama(folder.with_name("base"))
    model = AutoModelForCausalLM.from_pretrained(base)
    attach_heads(model, LMTPConfig(base_model=str(base), **config), stage=1).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("nothing_loads")
def test_other_offsets_are_refused_before_a_model_loads(refused, tmp_path):
    one, two = save_heads(tmp_path / "one", num_heads=2), save_heads(tmp_path / "two", num_heads=1)
    assert refused(one, two) == (
        f"{two} has heads at other offsets than the models before it: compare them in separate reports."
    )


@pytest.mark.usefixtures("nothing_loads")
def test_a_model_that_is_not_there_is_refused_before_another_is_scored(refused, tmp_path):
    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere")
    heads = save_heads(tmp_path / "heads", num_heads=1)
    (tmp_path / "base").rename(tmp_path / "moved")
    assert refused(heads).startswith(f"No model can be loaded from {heads} (")
    (tmp_path / "moved").rename(tmp_path / "base")
    weights = heads / "lmtp" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is truncated or damaged" in refused(heads)


@pytest.mark.usefixtures("nothing_loads")
def test_an_output_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written (Not a directory)" in refused("--output-dir", tmp_path / "file" / "report")


def test_damaged_weights_are_a_sentence(model, rows, tmp_path, capsys):
    weights = next((tmp_path / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["report", model.config.name_or_path, "--rows", str(rows)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"lmtp-cli report: No model can be loaded from {tmp_path / 'model'} (") and line.endswith(
        "."
    )


def test_scores_of_finished_models_are_printed_if_a_later_one_fails(model, rows, tmp_path, capsys):
    broken = tiny_models.save_qwen3(tmp_path / "broken")
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["report", f"whole={model.config.name_or_path}", f"cut={broken}", "--rows", str(rows)]) == 1
    printed = capsys.readouterr()
    assert any(line.startswith("whole ") for line in printed.out.splitlines())
    assert f"No model can be loaded from {broken} (" in printed.err


def test_marginalisation_is_tried_on_every_model_before_one_is_scored(refused, tmp_path, monkeypatch):
    second = tiny_models.save_qwen3(tmp_path / "second")

    def check(model, rows):
        if model.config.model_type == "qwen3":
            raise LMTPError("It cannot.")

    monkeypatch.setattr(marginal_scores, "check_marginal", check)
    assert refused(second, "--marginal", "4") == "It cannot."


def test_one_model_at_a_time_is_in_memory(model, rows, tmp_path, monkeypatch):
    load, loaded = report_module.load_for_scoring, []

    def watch(*args):
        assert [reference for reference in loaded if reference() is not None] == []
        one = load(*args)
        loaded.append(weakref.ref(one))
        return one

    monkeypatch.setattr(report_module, "load_for_scoring", watch)
    gc.disable()  # the report has to free it
    try:
        paths = [f"{number}={model.config.name_or_path}" for number in range(2)]
        assert main(["report", *paths, "--rows", str(rows), "--marginal", "1", "--marginal-positions", "3"]) == 0
    finally:
        gc.enable()
    assert len(loaded) == 4
