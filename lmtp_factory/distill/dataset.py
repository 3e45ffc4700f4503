"""The dataset's files: training and held-out rows as JSONL, and their entries in dataset_info.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import LMTPError
from ..files import atomic_write
from .near_duplicates import NearDuplicates
from .rows import dataset_entry


_INFO = "dataset_info.json"


def read_info(directory: Path) -> dict[str, Any]:
    """Read the dataset_info.json of a directory; return an empty dict if there is none.

    Raises:
        LMTPError: The file cannot be read or is not a JSON object.
    """
    path = directory / _INFO
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LMTPError(
            f"{path} cannot be read as JSON ({error}): repair it or choose another --output-dir."
        ) from error
    if not isinstance(info, dict):
        raise LMTPError(f"{path} is not a JSON object: repair it or choose another --output-dir.")
    return info


def write_dataset(directory: Path, name: str, rows: Iterable[dict[str, Any]]) -> Path:
    """Write `<name>.jsonl` and add its entry to dataset_info.json, both atomically.

    Raises:
        LMTPError: The disk is full or the directory is not writable. Older files are unchanged.
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
            f"{path} cannot be written ({error.strerror}): make room and run the same command again."
        ) from error
    return path


def split_heldout(rows: list[dict[str, Any]], share: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Split rows into held-out and training rows. The split depends on the prompts, not on their order.

    Args:
        rows: The rows.
        share: Share of the held-out rows.

    Returns:
        Held-out rows; training rows; number of rows dropped because they resemble a held-out row.
    """
    ordered = sorted(rows, key=lambda row: hashlib.sha256(row["prompt_ids"].encode()).digest())
    heldout_ids = {row["id"] for row in ordered[: round(share * len(rows))]}
    heldout = [row for row in rows if row["id"] in heldout_ids]
    seen = NearDuplicates()
    for row in heldout:
        seen.add(row["instruction"])
    rest = [row for row in rows if row["id"] not in heldout_ids]
    train = [row for row in rest if row["instruction"] not in seen]
    return heldout, train, len(rest) - len(train)
