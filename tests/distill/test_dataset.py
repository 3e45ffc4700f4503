"""The files that training reads: entries in dataset_info.json and the held-out split."""

import json

import pytest

from lmtp_factory.distill.dataset import split_heldout, write_dataset
from lmtp_factory.errors import LMTPError


ROWS = [{"id": 0, "output": "row 0"}]


def test_an_entry_is_added_to_those_that_exist(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    write_dataset(tmp_path, "d", ROWS)
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert info["mine"] == {"file_name": "mine.json"}
    assert info["d"]["file_name"] == "d.jsonl"


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_dataset_info_stays_as_it_is(tmp_path, content):
    (tmp_path / "dataset_info.json").write_text(content)
    with pytest.raises(LMTPError, match="repair it"):
        write_dataset(tmp_path, "d", ROWS)
    assert (tmp_path / "dataset_info.json").read_text() == content


def test_heldout_rows_have_no_near_duplicate_in_training():
    topics = ["birds", "trains", "soup", "chess", "rivers", "maps", "paint", "glass", "wool", "bells"]
    rows = [
        {
            "id": 2 * number + twin,
            "prompt_ids": f"{number} {twin}",
            "instruction": f"Tell me all there is about {topic}{end}",
        }
        for number, topic in enumerate(f"{a} {b}" for a in topics for b in topics)
        for twin, end in enumerate([" please", " please!"])
    ]
    heldout, train, dropped = split_heldout(rows, 0.1)
    assert len(heldout) == 20
    assert dropped > 0
    assert len(heldout) + len(train) + dropped == len(rows)
    words = [{row["instruction"].rstrip("!") for row in part} for part in (heldout, train)]
    assert not words[0] & words[1]
    assert split_heldout(rows[::-1], 0.1)[0] == heldout[::-1]
