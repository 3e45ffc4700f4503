"""Rows of a benchmark, from a local file or from the hub."""

import json
from pathlib import Path
from typing import Any

from ...errors import LMTPError, first_line
from .benchmarks import Benchmark


def read_rows(benchmark: Benchmark, data_dir: str | None, limit: int | None = None) -> tuple[list[dict[str, Any]], str]:
    """Read a benchmark's rows.

    Args:
        benchmark: The benchmark.
        data_dir: Directory that holds one JSONL file whose name begins with the benchmark's; None reads the hub.
        limit: Number of rows to take from the start. Default: all.

    Returns:
        The rows, and where they come from.

    Raises:
        LMTPError: There is no such file or dataset, or a row lacks a field.
    """
    if data_dir is None:
        return _hub_rows(benchmark, limit), benchmark.hub.path
    path = find_file(benchmark, Path(data_dir))
    return _file_rows(benchmark, path, limit), path.name


def find_file(benchmark: Benchmark, directory: Path) -> Path:
    """Return the benchmark's file in a directory.

    Raises:
        LMTPError: There is none, or more than one.
    """
    if not directory.is_dir():
        raise LMTPError(f"--data-dir {directory} is no directory: name the one with {benchmark.name}*.jsonl.")
    files = sorted(directory.glob(f"{benchmark.name}*.jsonl"))
    if not files:
        raise LMTPError(
            f"--data-dir {directory} has no file {benchmark.name}*.jsonl: put it there, or leave {benchmark.name} out of "
            "--tasks."
        )
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise LMTPError(f"--data-dir {directory} has {names}: keep one file for {benchmark.name} there.")
    return files[0]


def _file_rows(benchmark: Benchmark, path: Path, limit: int | None) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if len(rows) == limit:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise LMTPError(f"Line {number} of {path} is no JSON ({first_line(error)}): correct it.") from error
            rows.append(_checked(benchmark, row, f"Line {number} of {path}"))
    if not rows:
        raise LMTPError(f"{path} has no rows: write one JSON object a line.")
    return rows


def _hub_rows(benchmark: Benchmark, limit: int | None) -> list[dict[str, Any]]:
    from datasets import load_dataset

    hub = benchmark.hub
    try:
        loaded = load_dataset(hub.path, hub.name, split="test")
        rows = [hub.to_row(row, number) for number, row in enumerate(loaded) if limit is None or number < limit]
    except Exception as error:  # of the network, the hub, its cache or another layout of the dataset
        raise LMTPError(
            f"{hub.path} cannot be read from the hub ({first_line(error)}): name a directory with {benchmark.name}*.jsonl "
            "in --data-dir."
        ) from error
    return [_checked(benchmark, row, f"Row {number} of {hub.path}") for number, row in enumerate(rows)]


def _checked(benchmark: Benchmark, row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise LMTPError(f"{where} is no JSON object: write one with id, instruction and {', '.join(benchmark.fields)}.")
    for field, kind in {"id": str, "instruction": str, **benchmark.fields}.items():
        if not isinstance(row.get(field), kind) or not row[field]:
            what = {str: "text", list: "a list of texts"}[kind]
            raise LMTPError(f"{where} has no {field}, which {benchmark.name} needs: write {what} there.")
    for field in ("input", "test_setup_code"):
        if not isinstance(row.get(field) or "", str):
            raise LMTPError(f"{where} has a {field} that is no text: write text there, or leave it out.")
    if not all(isinstance(test, str) for test in row.get("test_list", [])):
        raise LMTPError(f"{where} has a test_list with something else than texts: write each assertion as a text.")
    return row
