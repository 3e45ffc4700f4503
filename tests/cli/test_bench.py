"""lmtp-cli bench on a tiny model."""

import json

import pytest
from helpers import tiny_data, tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.cli import main
from lmtp_factory.evaluation import report


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


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Arguments -> the sentence of a refusal that comes before a model loads."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"instruction": "what?"}))
    monkeypatch.setattr(report, "load_for_scoring", lambda *args, **kwargs: pytest.fail("a model was about to load"))

    def refuse(model, *options) -> str:
        assert main(["bench", str(model), "--prompts", str(prompts), *map(str, options)]) == 1
        line = capsys.readouterr().err.splitlines()[-1]  # progress bars of saving models come before it
        return line.removeprefix("lmtp-cli bench: ")

    return refuse


def test_a_model_without_heads_is_refused(refused, tmp_path):
    """It could be loaded with untrained heads, whose numbers would look like those of trained ones."""
    path = tiny_models.save_qwen3(tmp_path / "model")
    assert refused(path) == (
        f"{path} has no lmtp/ folder, so no leap heads: name an export with heads, an adapter or a stage-1 directory."
    )


@pytest.mark.parametrize(
    "content", ["{", '{"kind": "chain", "nodes": 2, "paths": [], "width": 8, "cost": null, "measured": 1}']
)
def test_a_damaged_tree_is_refused(refused, tmp_path, content):
    (tmp_path / "model" / "lmtp").mkdir(parents=True)
    (tmp_path / "model" / "lmtp" / "tree.json").write_text(content)
    line = refused(tmp_path / "model")
    assert "tree.json is damaged (" in line and line.endswith(": delete it or run lmtp-cli tree again.")


def test_an_output_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "model" / "lmtp").mkdir(parents=True)
    (tmp_path / "file").touch()
    line = refused(tmp_path / "model", "--output-dir", tmp_path / "file")
    assert line == f"--output-dir {tmp_path / 'file'} cannot be written (Not a directory): name another directory."
