"""Final hidden states of a frozen model on disk, computed once and read in every epoch.

A folder holds `manifest.json`, which says what the states were computed from, and shards `hidden-00000.safetensors`, ... A
shard holds the states of consecutive documents (training examples) in one tensor `hidden`, one row a token. The documents
of each shard follow from their lengths alone, so all processes agree on them and a killed run continues with the missing
shards.
"""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...errors import LMTPError, first_line
from ...files import atomic_write
from .shard_layout import DTYPE, ShardLayout


FORMAT = 3
MANIFEST_FILE = "manifest.json"
_TENSOR = "hidden"
_HEADER_DTYPE = "BF16"  # safetensors' name of DTYPE


@functools.lru_cache(maxsize=128)
def _open_shard(path: Path, process: int, identity: tuple[int, ...]) -> Any:
    """The rows of a shard, memory-mapped and not yet read. Failures are not cached.

    Args:
        path: File of the shard.
        process: Id of the process; a forked DataLoader worker must not use its parent's handles.
        identity: Inode, time and size; a replaced file is opened again, and reading a truncated one is no bus error.
    """
    return safe_open(path, framework="pt").get_slice(_TENSOR)


class HiddenCache:
    """A folder of hidden states, made by `HiddenCache.open`. It can be pickled and used in DataLoader workers."""

    def __init__(self, folder: Path, layout: ShardLayout):
        self.folder, self.layout = folder, layout

    @classmethod
    def open(cls, folder: str | os.PathLike[str], layout: ShardLayout, facts: dict[str, str]) -> Self:
        """Create a cache or continue one. Several processes may open the same folder at once.

        Args:
            folder: Created if it does not exist; otherwise empty, or a cache of the same layout and facts.
            layout: Documents of each shard.
            facts: What the states depend on (model, weights, data), in words that a message can repeat.

        Raises:
            LMTPError: The folder holds other states, other files or a damaged manifest, cannot be used, or its disk has
                no room for the missing shards. Nothing has been written then.
        """
        cache = cls(Path(folder), layout)
        path = cache.folder / MANIFEST_FILE
        described = {
            "format": FORMAT,
            "facts": facts,
            "hidden_size": layout.hidden_size,
            "documents": layout.documents,
            "tokens": layout.tokens,
            "lengths": layout.lengths_digest,
            "shard_bytes": layout.shard_bytes,
            "dtype": str(DTYPE).removeprefix("torch."),
        }
        try:
            names = os.listdir(cache.folder) if cache.folder.exists() else []
            if MANIFEST_FILE in names:
                cache._compare(_read_manifest(path, described), described)
                cache._check_room()
            # another process may be writing the manifest, or was killed while it did
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
        tokens = sum(self.layout.shape(shard_index)[0] for shard_index in self.missing())
        needed = tokens * self.layout.hidden_size * DTYPE.itemsize
        existing = next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            from accelerate.utils import convert_bytes  # imported here: benchmarks fill caches without accelerate

            raise LMTPError(
                f"The hidden states still to be written to `{self.folder}` take {convert_bytes(needed)}, and its disk has "
                f"{convert_bytes(free)} free: name a folder on a larger disk, make room, or leave hidden_cache_dir out."
            )

    def missing(self) -> list[int]:
        """Indices of shards that are absent, truncated, or of another shape or dtype."""
        return [shard_index for shard_index in range(len(self.layout.shards)) if not self._is_there(shard_index)]

    def _is_there(self, shard_index: int) -> bool:
        try:
            self._rows(shard_index)
        except LMTPError:
            return False
        return True

    def write(self, shard_index: int, hidden: Tensor) -> None:
        """Write a shard completely or not at all. Needs memory for one more copy of it.

        Args:
            shard_index: Index of the shard.
            hidden: (tokens, hidden) states of the shard's documents one after the other, on any device; rounded to bf16.

        Raises:
            ValueError: `hidden` has another shape.
            LMTPError: The disk is full or failing.
        """
        if tuple(hidden.shape) != self.layout.shape(shard_index):
            raise ValueError(f"shard {shard_index} is {self.layout.shape(shard_index)}, not {tuple(hidden.shape)}")
        path = self._path(shard_index)
        try:
            for leftover in self.folder.glob(f".{path.name}.*.tmp"):  # a killed `atomic_write` leaves them
                leftover.unlink(missing_ok=True)
            with atomic_write(path, "wb") as file:
                file.write(save({_TENSOR: hidden.detach().to("cpu", DTYPE).contiguous()}))
        except OSError as error:
            raise LMTPError(
                f"`{path}` cannot be written ({error.strerror}): make room and run the same command again, the shards "
                "that are finished are kept."
            ) from error

    def document(self, index: int) -> Tensor:
        """A copy of a document's final hidden states, (length, hidden), bf16 on the CPU.

        Raises:
            IndexError: There is no such document.
            LMTPError: The document's shard is missing or damaged.
        """
        shard_index, rows = self.layout.locate(index)
        # A slice shares the storage of the shard, which a DataLoader worker would send as a whole.
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
            raise LMTPError(f"{path} is missing: start the training again, which computes it again.") from None
        except (SafetensorError, OSError) as error:
            raise LMTPError(
                f"{path} is truncated or damaged ({first_line(error)}): start the training again, which computes it again."
            ) from None
        if found != (self.layout.shape(shard_index), _HEADER_DTYPE):
            raise LMTPError(f"{path} holds states of another shape: start the training again, which computes it again.")
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
