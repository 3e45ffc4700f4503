"""The finished data set: JSONL rows and their entry in dataset_info.json, each written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import LMTPError
from ..files import atomic_write
from .rows import dataset_entry


_INFO = "dataset_info.json"


def read_info(directory: Path) -> dict[str, Any]:
    """The dataset_info.json of a directory, empty when there is none.

    Raises:
        LMTPError: it is there but is not a JSON object.
    """
    path = directory / _INFO
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LMTPError(
            f"`{path}` cannot be read as JSON ({error}): mend it or choose another --output-dir."
        ) from error
    if not isinstance(info, dict):
        raise LMTPError(f"`{path}` is not a JSON object: mend it or choose another --output-dir.")
    return info


def write_dataset(directory: Path, name: str, rows: Iterable[dict[str, Any]]) -> Path:
    """Write `name`.jsonl and its entry in dataset_info.json; other entries stay.

    Raises:
        LMTPError: the disk is full or the directory cannot be written; older files are untouched.
    """
    path = directory / f"{name}.jsonl"
    try:
        with atomic_write(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        info = read_info(directory) | {name: dataset_entry(path.name)}
        with atomic_write(directory / _INFO) as file:
            file.write(json.dumps(info, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise LMTPError(
            f"`{path}` cannot be written ({error.strerror}): make room and run the same command again."
        ) from error
    return path
