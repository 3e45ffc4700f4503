"""lmtp-cli bench on a tiny model."""

import json

import pytest
from helpers import tiny_data, tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.cli import main


def test_bench_command(tmp_path, capsys):
    path = tiny_models.save_qwen3(tmp_path / "model")
    attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig()).save_pretrained(path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"instruction": text}) for text, _ in tiny_data.texts(2)))
    options = [
        "--prompts",
        str(prompts),
        "--max-new-tokens",
        "16",
        "--nodes",
        "6",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main(["bench", str(path), *options]) == 0
    facts = json.loads((tmp_path / "out" / "bench.json").read_text())
    arms = {arm["name"]: arm for arm in facts["arms"]}
    assert arms["stock generate"]["tau"] == arms["our loop, no heads"]["tau"] == 1
    for name in ("backward, chain", "backward, static", "backward, dynamic", "forward, dynamic"):
        arm = arms[name]
        assert arm["differing"] == 0
        assert arm["tau"] == pytest.approx(1 + sum(arm["acceptance"]))
        assert 0 < arm["verify_share"] < 1
    assert arms["backward, dynamic"]["tau"] >= 1
    assert "tau" in capsys.readouterr().out and (tmp_path / "out" / "bench.png").stat().st_size > 5_000
