"""Files are written whole or not at all."""

import pytest

from lmtp_factory.files import atomic_write


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
