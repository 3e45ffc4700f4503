"""What the commands of this folder refuse before a model loads."""

import pytest

from lmtp_factory.cli import main
from lmtp_factory.cli.arguments import labelled_models
from lmtp_factory.errors import LMTPError


COUNTS = {
    "tree": ["--limit", "--max-new-tokens", "--context"],
    "bench": ["--limit", "--max-new-tokens", "--nodes", "--repeats"],
    "report": ["--limit", "--batch-size"],
    "quality": ["--limit", "--max-new-tokens", "--batch-size"],
}
OTHERS = {"tree": ["--prompts", "none.jsonl"], "bench": ["--prompts", "none.jsonl"], "report": ["--rows", "none.jsonl"]}
OTHERS["quality"] = []


@pytest.mark.parametrize(("command", "option"), [(command, option) for command in COUNTS for option in COUNTS[command]])
@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
def test_counts_are_whole_numbers_above_zero(command, option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "no_model", *OTHERS[command], f"{option}={value}"])
    assert stop.value.code == 2
    assert f"argument {option}: {value} is no whole number of 1 or more" in capsys.readouterr().err


def test_models_have_labels():
    models = labelled_models(["before=Qwen/Qwen2.5-3B", "saves/ntp/", "a=b=c"])
    assert models == {"before": "Qwen/Qwen2.5-3B", "ntp": "saves/ntp/", "a": "b=c"}
    with pytest.raises(LMTPError, match="Two models are labelled ntp: write LABEL=other/ntp with another label"):
        labelled_models(["saves/ntp", "other/ntp"])
