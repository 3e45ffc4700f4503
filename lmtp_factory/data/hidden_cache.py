"""Final hidden states of a frozen model on disk, computed once and read in every epoch.

A folder with `manifest.json`, which says what the states were computed from, and shards `hidden-00000.safetensors`,
... A shard holds the states of consecutive documents (training examples), one row a token, in one tensor `hidden`.
Which documents are in which shard follows from their lengths alone, so that every process plans the same shards and
a killed run goes on with those that are not there yet.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any, Self

from accelerate.utils import convert_bytes
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import LMTPError, first_line
from ..files import atomic_write
from .cache_plan import DTYPE, CachePlan


FORMAT = 2
MANIFEST_FILE = "manifest.json"
_TENSOR = "hidden"
_HEADER_DTYPE = "BF16"  # safetensors' name of DTYPE


@functools.lru_cache(maxsize=128)
def _open_shard(path: Path, process: int, identity: tuple[int, ...]) -> Any:
    """The rows of a shard, memory-mapped and not yet read; an errored opening is not remembered.

    `process` keeps a forked DataLoader worker from its parent's handles. `identity` (inode, time, size) keeps everyone
    from a file that has since been replaced, and from a bus error where it has been cut short.
    """
    return safe_open(path, framework="pt").get_slice(_TENSOR)


class HiddenCache:
    """The folder; get one by `HiddenCache.open`. It can be pickled and used in DataLoader workers."""

    def __init__(self, folder: Path, plan: CachePlan):
        self.folder, self.plan = folder, plan

    @classmethod
    def open(cls, folder: str | os.PathLike[str], plan: CachePlan, facts: dict[str, str]) -> Self:
        """Begin a cache, or go on with one. Several processes may open the same folder at once.

        Args:
            folder: made where it is not there; otherwise empty or a cache of the same plan and facts.
            facts: what decides the states, in words that an error message can repeat: model, weights, data.

        Raises:
            LMTPError: the folder holds other states, other files or a damaged manifest, cannot be used, or its disk
                has no room for the missing shards. Nothing was written then.
        """
        cache = cls(Path(folder), plan)
        path = cache.folder / MANIFEST_FILE
        described = {
            "format": FORMAT,
            "facts": facts,
            "hidden_size": plan.hidden_size,
            "documents": plan.documents,
            "tokens": plan.tokens,
            "lengths": plan.lengths_digest,
            "shard_bytes": plan.shard_bytes,
            "dtype": str(DTYPE).removeprefix("torch."),
        }
        try:
            names = os.listdir(cache.folder) if cache.folder.exists() else []
            if MANIFEST_FILE in names:
                cache._compare(_read_manifest(path, described), described)
                cache._check_room()
            # another process may be writing the manifest at this moment, or was killed over it
            elif all(name.startswith(f".{MANIFEST_FILE}.") for name in names):
                cache._check_room()
                cache.folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as file:
                    json.dump(described, file, indent=2, ensure_ascii=False)
            else:
                raise LMTPError(
                    f"`{folder}` holds other files and no {MANIFEST_FILE}, so it is no cache of hidden states: name "
                    "another folder in hidden_cache_dir, or an empty one."
                )
        except OSError as error:
            raise LMTPError(
                f"`{folder}` cannot hold hidden states ({error.strerror}): name another folder in hidden_cache_dir."
            ) from error
        return cache

    def _compare(self, found: dict[str, Any], described: dict[str, Any]) -> None:
        for before, now in ((found["facts"], described["facts"]), (found, described)):
            for key in before | now:
                if before.get(key) != now.get(key):
                    raise LMTPError(
                        f"The hidden states in `{self.folder}` were computed with {key} = {before.get(key)!r}, now it "
                        f"is {now.get(key)!r}: write another hidden_cache_dir, or delete this one."
                    )

    def _check_room(self) -> None:
        tokens = sum(self.plan.shape(shard_index)[0] for shard_index in self.missing())
        needed = tokens * self.plan.hidden_size * DTYPE.itemsize
        existing = next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise LMTPError(
                f"The hidden states still to be written to `{self.folder}` take {convert_bytes(needed)}, and its disk has "
                f"{convert_bytes(free)} free: name a folder on a larger disk, make room, or leave hidden_cache_dir out."
            )

    def missing(self) -> list[int]:
        """Indices of the shards that are still to be written: not there, cut short, or of another shape or dtype."""
        return [shard_index for shard_index in range(len(self.plan.shards)) if not self._is_there(shard_index)]

    def _is_there(self, shard_index: int) -> bool:
        try:
            self._rows(shard_index)
        except LMTPError:
            return False
        return True

    def write(self, shard_index: int, hidden: Tensor) -> None:
        """Write a shard, all of it or nothing. Takes its size once more in memory.

        Args:
            hidden: states of the documents `plan.shards[shard_index]` one after the other, of shape
                `plan.shape(shard_index)`; on any device, rounded to bf16.

        Raises:
            ValueError: another shape.
            LMTPError: the disk is full or failing.
        """
        if tuple(hidden.shape) != self.plan.shape(shard_index):
            raise ValueError(f"shard {shard_index} is {self.plan.shape(shard_index)}, not {tuple(hidden.shape)}")
        path = self._path(shard_index)
        try:
            for leftover in self.folder.glob(f".{path.name}.*.tmp"):  # what a kill left of `atomic_write`
                leftover.unlink(missing_ok=True)
            with atomic_write(path, "wb") as file:
                file.write(save({_TENSOR: hidden.detach().to("cpu", DTYPE).contiguous()}))
        except OSError as error:
            raise LMTPError(
                f"`{path}` cannot be written ({error.strerror}): make room and run the same command again, the shards "
                "that are finished are kept."
            ) from error

    def document(self, index: int) -> Tensor:
        """Final hidden states (length, hidden_size) of a document, bf16 on the CPU, the caller's own.

        Raises:
            IndexError: no such document.
            LMTPError: its shard is missing or damaged.
        """
        shard_index, rows = self.plan.locate(index)
        # a slice shares the storage of the whole shard, all of which would travel from a worker to its trainer
        return self._rows(shard_index)[rows].clone()

    def _path(self, shard_index: int) -> Path:
        return self.folder / f"hidden-{shard_index:05d}.safetensors"

    def _rows(self, shard_index: int) -> Any:
        path = self._path(shard_index)
        try:
            status = path.stat()
            rows = _open_shard(path, os.getpid(), (status.st_ino, status.st_mtime_ns, status.st_size))
            found = tuple(rows.get_shape()), rows.get_dtype()
        except FileNotFoundError:
            raise LMTPError(f"{path} is missing: start the training again, which computes it anew.") from None
        except (SafetensorError, OSError) as error:
            raise LMTPError(
                f"{path} is truncated or damaged ({first_line(error)}): start the training again, which computes it anew."
            ) from None
        if found != (self.plan.shape(shard_index), _HEADER_DTYPE):
            raise LMTPError(
                f"{path} holds other states than planned: start the training again, which computes it anew."
            )
        return rows


def _read_manifest(path: Path, described: dict[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        other_format = found.get("format", FORMAT) != FORMAT
        whole = described.keys() <= found.keys() and isinstance(found["facts"], dict)
    except (ValueError, AttributeError):  # no JSON, no object
        other_format = whole = False
    if other_format:
        raise LMTPError(
            f"The hidden states in `{path.parent}` are in format {found['format']}, this version reads format {FORMAT}: "
            "write another hidden_cache_dir, or delete this one."
        )
    if not whole:
        raise LMTPError(f"{path} is damaged: write another hidden_cache_dir, or delete this one.")
    return found
