"""A model's own layers for multi-token prediction (`mtp.*`, `nextn`), kept when the model is saved.

Transformers loads such a model without these layers, so that saving it loses them. Their tensors are copied, unchanged, from
the files of the model that was loaded into what was saved. They then predict from states that tuning has changed since.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files import CONFIG_FILE, atomic_write


# The file that holds the layers in what was saved, and the one that held all else before.
NATIVE_MTP_FILE = "model-native-mtp.safetensors"
_ONLY_SHARD = "model-00001-of-00001.safetensors"
_NAMED_MTP = re.compile(r"(^|\.)mtp(_\w+)?\.")
_LAYER = re.compile(r"\blayers\.(\d+)\.")
# Keys of config.json that say how many such layers there are.
_ABOUT_MTP = re.compile(r"mtp|nextn")


def keep_native_mtp(model: PreTrainedModel, base: str, **hub_options: Any) -> int:
    """Let `model.save_pretrained` also write the base's native MTP layers.

    Args:
        model: A loaded model.
        base: Local directory or hub id that it was loaded from.
        hub_options: Passed to the hub, e.g. `revision` or `cache_dir`.

    Returns:
        Number of tensors of these layers. With none, nothing changes.
    """
    folder = _folder(base, hub_options)
    files = {} if folder is None else native_mtp_files(folder, model.config)
    if files:
        model.save_pretrained = functools.partial(_save, model.save_pretrained, folder, files)
    return len(files)


def native_mtp_files(folder: Path, config: PretrainedConfig) -> dict[str, Path]:
    """Return the file of each native MTP tensor of a model directory, by the tensor's name.

    Native MTP tensors have `mtp` in their name, or belong to decoder layers beyond `num_hidden_layers` that
    `num_nextn_predict_layers` counts.

    Args:
        folder: Directory with safetensors files. Others are not read.
        config: Configuration of the model.
    """
    text_config = config.get_text_config()
    first = text_config.num_hidden_layers
    beyond = range(first, first + (getattr(text_config, "num_nextn_predict_layers", None) or 0))

    def is_native_mtp(name: str) -> bool:
        layer = _LAYER.search(name)
        return bool(_NAMED_MTP.search(name)) or (layer is not None and int(layer[1]) in beyond)

    return {name: file for name, file in _tensor_files(folder).items() if is_native_mtp(name)}


def _folder(base: str, hub_options: dict[str, Any]) -> Path | None:
    """Return the directory of a loaded model's files; None if they are not on this machine."""
    if Path(base).is_dir():
        return Path(base)
    try:
        return Path(snapshot_download(base, local_files_only=True, **hub_options))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a model directory."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    file = folder / SAFE_WEIGHTS_NAME
    return dict.fromkeys(_names(file), file) if file.is_file() else {}


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _save(upstream: Callable, base: Path, files: dict[str, Path], save_directory, *args, **kwargs) -> None:
    """Save the model by `upstream`, then add the native MTP layers."""
    if Path(save_directory, NATIVE_MTP_FILE).is_file() and Path(save_directory).resolve() != base.resolve():
        # An earlier call's; its index would name files that upstream replaces.
        for name in (NATIVE_MTP_FILE, SAFE_WEIGHTS_INDEX_NAME, _ONLY_SHARD):
            Path(save_directory, name).unlink(missing_ok=True)
    upstream(save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        _add(Path(save_directory), base, files)


def _add(saved: Path, base: Path, files: dict[str, Path]) -> None:
    """Write the tensors beside saved weights, name them in the index, and carry over what the configuration says of them."""
    present = _tensor_files(saved)
    if not present:  # an adapter, or not in safetensors
        return
    tensors = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in files if files[name] == file and name not in present}
    if tensors:
        save_file(tensors, saved / NATIVE_MTP_FILE, metadata={"format": "pt"})
        _index(saved, present, {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()})
    written, original = (json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")) for folder in (saved, base))
    if _carry(written, original):
        with atomic_write(saved / CONFIG_FILE) as file:
            file.write(json.dumps(written, indent=2, sort_keys=True) + "\n")


def _index(saved: Path, present: dict[str, Path], added: dict[str, int]) -> None:
    """Add tensors, given with their bytes, to the index. A single file of weights becomes the first of two."""
    path, single = saved / SAFE_WEIGHTS_INDEX_NAME, saved / SAFE_WEIGHTS_NAME
    if path.is_file():
        index = json.loads(path.read_text(encoding="utf-8"))
    else:
        # Loaders prefer a file of the usual name to an index, and would not see the other.
        index = {"metadata": {"total_size": single.stat().st_size}, "weight_map": dict.fromkeys(present, _ONLY_SHARD)}
        single.rename(saved / _ONLY_SHARD)
    index["metadata"]["total_size"] += sum(added.values())
    index["weight_map"] |= dict.fromkeys(added, NATIVE_MTP_FILE)
    with atomic_write(path) as file:
        file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _carry(written: dict[str, Any], original: dict[str, Any]) -> bool:
    """Copy the keys about native MTP into `written`, also of nested configurations. Returns whether any changed."""
    changed = False
    for key, value in original.items():
        if isinstance(value, dict) and isinstance(written.get(key), dict):
            changed |= _carry(written[key], value)
        elif _ABOUT_MTP.search(key) and written.get(key) != value:
            written[key], changed = value, True
    return changed
