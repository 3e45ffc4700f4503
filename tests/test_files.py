"""Files are written whole or not at all."""

import pytest

from lmtp_factory.files import atomic_write, check_writable


def test_atomic_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "f"
    with atomic_write(path) as file:
        file.write("a\r\nb")
    assert path.read_bytes() == b"a\r\nb"
    with pytest.raises(RuntimeError), atomic_write(path, "wb") as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"a\r\nb"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_a_directory_that_can_be_written_is_left_as_it_is(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "folder", "/proc/folder"):
        with pytest.raises(OSError):
            check_writable(directory)
