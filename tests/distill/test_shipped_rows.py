"""The text that the package ships for its demo: broad, filtered, and held out where it says so."""

import json

import pytest

from lmtp_factory import resources
from lmtp_factory.distill.filters import filter_rows
from lmtp_factory.distill.rows import parse_ids


FOLDER = resources.folder("datasets")
VOCABULARY = 49_152  # of SmolLM2


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train():
    return read("self_distilled_smollm2_train.jsonl")


@pytest.fixture(scope="module")
def heldout():
    return read("self_distilled_smollm2_heldout.jsonl")


def test_there_is_enough_text(train):
    assert len(train) >= 3_000
    assert sum(len(parse_ids(row["output_ids"])) for row in train) >= 400_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) < 10_000_000


def test_every_kind_of_seed_is_answered(train):
    kinds = {row["prompt"]: row["kind"] for row in read("seed_prompts.jsonl")}
    answered = [kinds[row["instruction"]] for row in train if row["instruction"] in kinds]
    assert set(answered) == set(kinds.values()) and len(set(answered)) == 11
    assert min(map(answered.count, set(answered))) >= 200


def test_the_filters_drop_nothing(train, heldout):
    for rows in (train, heldout):
        kept, dropped = filter_rows(rows, keep_truncated=True)
        assert len(kept) == len(rows) and not dropped


def test_held_out_prompts_are_not_trained_on(train, heldout):
    trained = {row["prompt_ids"] for row in train}
    assert len(trained) == len(train)
    assert not trained & {row["prompt_ids"] for row in heldout}


def test_ids_are_smollm2_s(train, heldout):
    for row in train + heldout:
        assert all(max(parse_ids(row[column])) < VOCABULARY for column in ("prompt_ids", "output_ids"))
