"""A checkpoint that another program wrote: its configuration and, tensor by tensor, its safetensors. Pickles stay shut."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LMTPError, first_line
from ..files import CONFIG_FILE, WEIGHTS_FILE


MEDUSA_WEIGHTS_FILE = "medusa_lm_head.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
# What is asked of the hub: no pickles, and nothing of sub-folders, which may hold other checkpoints.
_HUB_PATTERNS = (CONFIG_FILE, MEDUSA_WEIGHTS_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What is in a checkpoint.

    Attributes:
        name: the directory or hub id, as the user wrote it.
        config: of its `config.json`; empty where it has none.
        files: the safetensors file of each tensor.
    """

    name: str
    config: dict[str, Any]
    files: dict[str, Path]

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        with _weights(self.files[tensor]) as weights:
            return tuple(weights.get_slice(tensor).get_shape())

    def read(self, tensor: str) -> Tensor:
        """A tensor, on the CPU and in its own dtype."""
        with _weights(self.files[tensor]) as weights:
            return weights.get_tensor(tensor)


def open_checkpoint(name: str) -> Checkpoint:
    """The checkpoint in a directory or hub repository; of its weights, the tensors' names are read and nothing else.

    Raises:
        LMTPError: no such directory or repository, no safetensors in it, or a damaged file.
    """
    folder = _folder(name)
    config = _json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    for file in (MEDUSA_WEIGHTS_FILE, WEIGHTS_FILE):
        if (folder / file).is_file():
            with _weights(folder / file) as weights:
                return Checkpoint(name, config, dict.fromkeys(weights.keys(), folder / file))
    if (folder / INDEX_FILE).is_file():
        shards = _json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(shards, dict):
            raise LMTPError(f"{folder / INDEX_FILE} has no weight_map: copy the checkpoint again.")
        return Checkpoint(name, config, {tensor: folder / shard for tensor, shard in shards.items()})
    pickles = sorted(path.name for suffix in ("pt", "pth", "bin") for path in folder.glob(f"*.{suffix}"))
    pickle = next(iter(pickles), "medusa_lm_head.pt")
    target = MEDUSA_WEIGHTS_FILE if pickle.startswith("medusa") else WEIGHTS_FILE
    raise LMTPError(
        f"{name} has no {MEDUSA_WEIGHTS_FILE}, {WEIGHTS_FILE} or {INDEX_FILE}, and a pickle such as {pickle} can run any "
        "code when it is read, so none is read here: convert it yourself, in an environment that you trust, with "
        'python -c "import torch; from safetensors.torch import save_file; save_file({k: v.clone() for k, v in '
        f"torch.load('{pickle}', map_location='cpu', weights_only=True).items()}}, '{target}')\""
    )


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise LMTPError(
            f"{name} is no directory, and as a hub id it does not load ({first_line(error)}): name the checkpoint's "
            "directory (of a repository with several, download the one)."
        ) from None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LMTPError(f"{path} is damaged ({error}): copy the checkpoint again.") from None
    if not isinstance(values, dict):
        raise LMTPError(f"{path} holds no JSON object: copy the checkpoint again.")
    return values


@contextlib.contextmanager
def _weights(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except FileNotFoundError:
        raise LMTPError(f"{path} is missing: copy the checkpoint again.") from None
    except (SafetensorError, OSError) as error:
        raise LMTPError(f"{path} is truncated or damaged ({error}): copy the checkpoint again.") from None
