"""The journal of a run. Rows are appended as soon as they are finished, so a killed run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, Self

from ..errors import LMTPError


try:
    import fcntl
except ImportError:  # Windows has no flock, so two runs on one file are not detected there
    fcntl = None

# Key of the lines that are no rows, and the first bytes of every journal.
_KEY = "lmtp_distill"
_BEGINNING = f'{{"{_KEY}": '.encode()


def digest(lists_of_ids: Iterable[Iterable[int]]) -> str:
    """Return a hexadecimal hash of lists of token ids, in order."""
    hasher = hashlib.sha256()
    for ids in lists_of_ids:
        hasher.update((" ".join(map(str, ids)) + "\n").encode())
    return hasher.hexdigest()[:16]


class Journal:
    """An append-only JSONL file: a header line with the run's settings, then one row per line.

    Settings that `record` adds are a line of their own before the first row. Opening an existing file reads its rows and
    drops an incomplete last line. Use the journal as a context manager.

    Args:
        path: The file.
        settings: Settings that determine the rows; flat and JSON-serialisable.

    Raises:
        LMTPError: The file has other settings, is damaged or no journal, is in use, or cannot be written.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        self.path = Path(path)
        self.rows: dict[int, dict[str, Any]] = {}
        self._recorded: dict[str, Any] = {}
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise LMTPError(
                f"{self.path} cannot be written ({error.strerror}): choose another --output-dir."
            ) from error
        try:
            self._lock()
            self._recover(settings)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LMTPError(f"Another run is writing {self.path}: wait for it, or choose another --name.") from None

    def _recover(self, settings: dict[str, Any]) -> None:
        """Read the file. It is changed only if it is empty or a journal of the same settings."""
        content = self.path.read_bytes()
        self._end = content.rfind(b"\n") + 1
        if not self._end and not (content.startswith(_BEGINNING) or _BEGINNING.startswith(content)):
            self._refuse(1)
        for number, line in enumerate(content[: self._end].split(b"\n")[:-1], start=1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._compare(entry[_KEY], settings)
                elif _KEY in entry:
                    self._recorded |= entry[_KEY]
                else:
                    self.rows[entry["id"]] = entry
            except LMTPError:
                raise
            except (ValueError, KeyError, TypeError) as error:
                self._refuse(number, error)
        os.ftruncate(self._descriptor, self._end)  # drop an incomplete last line
        if not self._end:
            self._append([{_KEY: settings}])

    def _refuse(self, number: int, error: Exception | None = None) -> NoReturn:
        if number == 1:
            raise LMTPError(
                f"{self.path} is no journal of a distillation run (see line 1): choose another --name, or delete the file."
            ) from error
        raise LMTPError(
            f"{self.path}, line {number} is not a row of a distillation run: delete the file to start over."
        ) from error

    def _compare(self, begun_with: dict[str, Any], settings: dict[str, Any]) -> None:
        for key in begun_with | settings:
            before, now = begun_with.get(key), settings.get(key)
            if before != now:
                raise LMTPError(
                    f"{self.path} was begun with {key} = {before!r}, now it is {now!r}: use the same settings, choose "
                    "another --name, or delete the file to start over."
                )

    def record(self, settings: dict[str, Any]) -> None:
        """Add settings that are known only once the engine runs, before its first row.

        Args:
            settings: Flat and JSON-serialisable.

        Raises:
            LMTPError: The file has rows with other such settings, or it cannot be extended.
        """
        if self.rows:
            self._compare(self._recorded, settings)
        elif settings != self._recorded:
            self._append([{_KEY: settings}])
            self._recorded = settings

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append finished rows, each with an integer `id`.

        Raises:
            LMTPError: The disk is full or fails. The file then ends with its last complete row.
        """
        self._append(rows)
        self.rows.update((row["id"], row) for row in rows)

    def _append(self, entries: list[dict[str, Any]]) -> None:
        data = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
        try:
            written = 0
            while written < len(data):  # os.write may write only a part when the disk becomes full
                written += os.write(self._descriptor, data[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, self._end)
            raise LMTPError(
                f"{self.path} cannot be extended ({error.strerror}): make room and run the same command again; the "
                f"{len(self.rows)} finished rows are kept."
            ) from error
        self._end += len(data)

    def close(self) -> None:
        """Close the file and release its lock."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
