"""lmtp-cli bench on a tiny model."""

import json

from helpers import tiny_data, tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.cli import main


def run_bench(tmp_path, *options) -> dict[str, dict]:
    path = tiny_models.save_qwen3(tmp_path / "model")
    attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig()).save_pretrained(path)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("\n".join(json.dumps({"instruction": text}) for text, _ in tiny_data.texts(2)))
    command = ["bench", str(path), "--prompts", str(prompts), "--max-new-tokens", "16", "--output-dir", str(out)]
    assert main([*command, *options]) == 0
    facts = json.loads((out / "bench.json").read_text())
    return {arm["name"]: arm for arm in facts["arms"]}


def test_bench_command(tmp_path, capsys):
    arms = run_bench(tmp_path, "--nodes", "6")
    assert {"stock generate", "our loop, no heads", "backward, chain", "forward, dynamic"} <= set(arms)
    assert all(arm["differing"] == 0 for arm in arms.values())
    assert "tau" in capsys.readouterr().out and (tmp_path / "out" / "bench.png").stat().st_size > 5_000


def test_the_default_tree_alone(tmp_path):
    arms = run_bench(tmp_path, "--default-only")
    assert list(arms) == ["stock generate", "our loop, no heads", "backward, default tree"]
    assert arms["our loop, no heads"]["over_own_loop"] == 1
