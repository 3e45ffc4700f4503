"""A tiny model to distil from, prompts for it, and the command to do it."""

import json
from pathlib import Path

import pytest
from tiny_model import build_tokenizer, parse, save_model

from lmtp_factory.cli import distill as cli


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Directory of the tiny model."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(directory)
    return directory


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    prompts = [f"tell me about {'the head and ' * (number % 5)}token {number}" for number in range(14)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def distil():
    """Run `distill` with a command line; the rows of each data set come back by its name."""

    def run(*arguments):
        args = parse(*arguments)
        assert cli.run(args) == 0
        rows = {}
        directory = Path(args.output_dir)
        for name, entry in json.loads((directory / "dataset_info.json").read_text()).items():
            lines = (directory / entry["file_name"]).read_text(encoding="utf-8").splitlines()
            rows[name] = [json.loads(line) for line in lines]
        return rows

    return run
