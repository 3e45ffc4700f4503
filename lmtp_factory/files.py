"""Names of files, and writing them so that a crash, a kill or a full disk leaves nothing half-written to be read back."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


# The sub-folder of a model, adapter or checkpoint directory that holds leap heads, and what is in it.
HEADS_FOLDER = "lmtp"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TREE_FILE = "tree.json"
# Below such a directory; its presence makes the directory a checkpoint.
HEADS_CHECKPOINT = f"{HEADS_FOLDER}/{WEIGHTS_FILE}"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` for writing; it takes the name `path` only when the block ends well.

    Args:
        path: the file to make or replace. Its folder must exist.
        mode: `"w"` (UTF-8 text, newlines as written) or `"wb"`.

    Raises:
        OSError: what the operating system said (a full disk: ENOSPC). The temporary file is gone and whatever
            `path` held before is untouched.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a data set or a config should follow the umask like any other file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
