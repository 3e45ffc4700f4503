"""lmtp-cli report on tiny models."""

import json

import pytest
from helpers import tiny_data, tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.cli import main


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
