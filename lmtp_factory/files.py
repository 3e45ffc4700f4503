"""File names of the checkpoint layout, and atomic writes that survive crashes and full disks."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


# Leap heads are stored in this sub-folder of a model, adapter or checkpoint directory, in these files.
HEADS_FOLDER = "lmtp"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TREE_FILE = "tree.json"
TREE_PLOT_FILE = "tree.png"
# Below such a directory; its presence makes the directory a checkpoint.
HEADS_CHECKPOINT = f"{HEADS_FOLDER}/{WEIGHTS_FILE}"
# In a checkpoint of training: the stage that saved it.
STAGE_FILE = "lmtp_stage.json"


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Check that a file can be created in a directory or, if it does not exist, in the nearest one above it.

    Nothing is left behind.

    Raises:
        OSError: No file can be created there.
    """
    directory = Path(directory).absolute()
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    with tempfile.TemporaryFile(dir=existing):
        pass


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO]:
    """Open a temporary file for writing and rename it to `path` when the block ends without an exception.

    Args:
        path: File to create or replace. Its directory must exist.
        mode: `"w"` (UTF-8 text, newlines unchanged) or `"wb"`.

    Raises:
        OSError: Writing failed, e.g. because the disk is full. The temporary file is deleted and `path` is unchanged.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates files with mode 0600; restore the mode that open() would have used.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
