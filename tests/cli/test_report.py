"""lmtp-cli report on tiny models."""

import json

import pytest
from helpers import tiny_data, tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.cli import main
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
