"""lmtp-cli bench on a tiny model."""

import json

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
    assert {"stock generate", "our loop, no heads", "backward, chain", "forward, dynamic"} <= set(arms)
    assert all(arm["differing"] == 0 for arm in arms.values())
    assert "tau" in capsys.readouterr().out and (tmp_path / "out" / "bench.png").stat().st_size > 5_000
