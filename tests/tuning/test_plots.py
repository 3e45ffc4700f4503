"""Figures are written whole or not at all."""

import errno

import pytest
from matplotlib.figure import Figure

from lmtp_factory.decoding.tree_config import TreeConfig
from lmtp_factory.tuning.plots import draw_tree
from lmtp_factory.tuning.tree_search import Option


def test_a_full_disk_leaves_the_older_figure(tmp_path, monkeypatch):
    path = tmp_path / "tree.png"
    arguments = TreeConfig("chain", 2), [[0.5]], {1: 1.0, 2: 1.1}, [Option("chain", 2, 1.5, 10.0)], path
    draw_tree(*arguments)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def full(figure, file, **options):
        with open(file, "wb") if not hasattr(file, "write") else file as opened:
            opened.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        draw_tree(*arguments)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
