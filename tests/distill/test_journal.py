"""The journal survives kills and full disks, and refuses to mix two runs."""

import json
import subprocess
import sys
import textwrap

import pytest

from lmtp_factory.distill.dataset import write_dataset
from lmtp_factory.distill.journal import Journal
from lmtp_factory.errors import LMTPError


SETTINGS = {"model": "m", "seed": 0}


def row(number):
    return {"id": number, "output": f"row {number} ü"}


def write(path, numbers):
    with Journal(path, SETTINGS) as journal:
        journal.append([row(number) for number in numbers])


def read(path):
    with Journal(path, SETTINGS) as journal:
        return list(journal.rows.values())


def test_rows_come_back(tmp_path):
    path = tmp_path / "raw.jsonl"
    write(path, [0, 2])
    write(path, [1])
    assert read(path) == [row(0), row(2), row(1)]


def test_an_incomplete_end_costs_at_most_one_row(tmp_path):
    path = tmp_path / "raw.jsonl"
    write(path, [0, 1, 2])
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        survivors = max(0, sum(end <= cut for end in ends) - 1)  # without the header
        assert read(path) == [row(number) for number in range(survivors)]
        write(path, [7])
        assert read(path) == [*map(row, range(survivors)), row(7)]


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "raw.jsonl"
    write(path, [0])
    with pytest.raises(LMTPError, match=r"seed = 0, now it is 1"):
        Journal(path, SETTINGS | {"seed": 1})
    with pytest.raises(LMTPError, match=r"extra = None, now it is 5"):
        Journal(path, SETTINGS | {"extra": 5})
    assert read(path) == [row(0)]


@pytest.mark.parametrize("damage", ["x\n", '{"no": "id"}\n', "[1]\n"])
def test_damage_inside_is_named_by_its_line(tmp_path, damage):
    path = tmp_path / "raw.jsonl"
    write(path, [0])
    with path.open("a") as file:
        file.write(damage + json.dumps(row(1)) + "\n")
    with pytest.raises(LMTPError, match="line 3"):
        read(path)


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text('{"id": 1}\n')
    with pytest.raises(LMTPError, match="line 1"):
        read(path)


@pytest.mark.parametrize("content", [b"a dataset", b"two lines\nand no end", b'{"id": 1}\n{"id": 2', b"\x89PNG\n\x00"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    path = tmp_path / "raw.jsonl"
    path.write_bytes(content)
    with pytest.raises(LMTPError, match=r"is no journal .*: choose another --name, or delete the file\."):
        read(path)
    assert path.read_bytes() == content


def test_a_journal_that_is_refused_is_left_alone(tmp_path):
    path = tmp_path / "raw.jsonl"
    write(path, [0, 1])
    content = path.read_bytes()[:-3]
    path.write_bytes(content)
    with pytest.raises(LMTPError, match="seed"):
        Journal(path, SETTINGS | {"seed": 1})
    assert path.read_bytes() == content


def test_what_is_recorded_later_is_compared_too(tmp_path):
    path = tmp_path / "raw.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.record({"served_model": "a"})
    with Journal(path, SETTINGS) as journal:  # no row yet, so another one may begin
        journal.record({"served_model": "b"})
        journal.append([row(0)])
        journal.record({"served_model": "b"})
    with Journal(path, SETTINGS) as journal, pytest.raises(LMTPError, match="served_model = 'b', now it is 'a'"):
        journal.record({"served_model": "a"})
    assert read(path) == [row(0)]


def test_two_runs_do_not_share_a_file(tmp_path):
    path = tmp_path / "raw.jsonl"
    with Journal(path, SETTINGS), pytest.raises(LMTPError, match="Another run"):
        Journal(path, SETTINGS)
    assert read(path) == []


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(LMTPError, match="--output-dir"):
        Journal(tmp_path / "no" / "raw.jsonl", SETTINGS)


def run_with_file_limit(code, tmp_path, limit):
    """Run code in a process whose files cannot grow beyond `limit` bytes: one write is cut, the next fails."""
    preamble = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    return subprocess.run(
        [sys.executable, "-c", preamble + textwrap.dedent(code)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_full_disk_leaves_whole_rows(tmp_path):
    result = run_with_file_limit(
        f"""
        from lmtp_factory.distill.journal import Journal
        from lmtp_factory.errors import LMTPError
        with Journal("raw.jsonl", {SETTINGS}) as journal:
            try:
                for number in range(100):
                    journal.append([{{"id": number, "output": f"row {{number}} ü"}}])
            except LMTPError as error:
                print(len(journal.rows), error)
        """,
        tmp_path,
        1000,
    )
    assert result.returncode == 0, result.stderr
    count = int(result.stdout.split()[0])
    assert 5 < count < 100
    assert "make room" in result.stdout
    assert (tmp_path / "raw.jsonl").read_bytes().endswith(b"}\n")
    assert read(tmp_path / "raw.jsonl") == [row(number) for number in range(count)]


def test_a_full_disk_keeps_the_older_dataset(tmp_path):
    write_dataset(tmp_path, "d", [row(0)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = run_with_file_limit(
        """
        from pathlib import Path
        from lmtp_factory.distill.dataset import write_dataset
        from lmtp_factory.errors import LMTPError
        try:
            write_dataset(Path(), "d", [{"id": number} for number in range(1000)])
        except LMTPError as error:
            print(error)
        """,
        tmp_path,
        1000,
    )
    assert "make room" in result.stdout, result.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
