"""A model's own layers for multi-token prediction (`mtp.*`, `nextn`), kept when the model is saved.

Transformers loads such a model without these layers, so that saving it loses them. Their tensors are copied, unchanged, from
the files of the model that was loaded into what was saved. They then predict from states that tuning has changed since.
"""

import functools
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files import CONFIG_FILE, atomic_write


logger = logging.getLogger(__name__)

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
        hub_options: Where the hub's files are cached: `revision` and `cache_dir`.

    Returns:
        Number of tensors of these layers. With none, nothing changes.
    """
    folder = _folder(base, hub_options)
    if folder is None:
        logger.warning(
            f"The files of {base} are not found on this machine, so native multi-token prediction layers are not kept if it "
            "has any: name a local directory of the model to keep them."
        )
        return 0
    files = native_mtp_files(folder, model.config)
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
    # Not by snapshot_download, which wants every file of the repository. Loading a model downloads only some of them.
    try:
        config = try_to_load_from_cache(base, CONFIG_FILE, **hub_options)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a model directory. As for loaders, a single file comes before an index."""
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        return dict.fromkeys(_names(single), single)
    return {name: folder / file for name, file in _weight_map(index).items()} if index.is_file() else {}


def _weight_map(index: Path) -> dict[str, str]:
    return json.loads(index.read_text(encoding="utf-8"))["weight_map"]


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _save(upstream: Callable, base: Path, files: dict[str, Path], save_directory, *args, **kwargs) -> None:
    """Save the model by `upstream`, then add the native MTP layers."""

    def of_base() -> tuple[dict[str, Tensor], dict[str, Any]]:
        return _read(files), _read_config(base)

    replaces_base = Path(save_directory).resolve() == base.resolve()
    before = of_base() if replaces_base else None
    upstream(save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        _add(Path(save_directory), *(before or of_base()))


def _read(files: dict[str, Path]) -> dict[str, Tensor]:
    """Read tensors, given with their files, into memory."""
    tensors = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as opened:
            # A clone outlives the file: the tensor is a view of it.
            tensors |= {name: opened.get_tensor(name).clone() for name in files if files[name] == file}
    return tensors


def _read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def _add(saved: Path, tensors: dict[str, Tensor], original: dict[str, Any]) -> None:
    """Write the tensors beside saved weights, name them in the index, and carry over what the configuration says of them.

    The directory can be loaded after each step.
    """
    if _is_sharded(saved):
        (saved / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # an older save's, which loaders would read instead
    present = _tensor_files(saved)
    if not present:  # an adapter, or not in safetensors
        return
    tensors = {name: tensor for name, tensor in tensors.items() if name not in present}
    if tensors:
        fresh = saved / f"{NATIVE_MTP_FILE}.writing"  # no name that loaders look for
        try:
            save_file(tensors, fresh, metadata={"format": "pt"})
            fresh.replace(saved / NATIVE_MTP_FILE)
        finally:
            fresh.unlink(missing_ok=True)
        _index(saved, present, {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()})
    written = _read_config(saved)
    if _carry(written, original):
        with atomic_write(saved / CONFIG_FILE) as file:
            file.write(json.dumps(written, indent=2, sort_keys=True) + "\n")


def _is_sharded(saved: Path) -> bool:
    """Return whether the last save wrote shards. It removes the shards of an older save, but not the index of one."""
    index = saved / SAFE_WEIGHTS_INDEX_NAME
    files = set(_weight_map(index).values()) if index.is_file() else {NATIVE_MTP_FILE}
    return NATIVE_MTP_FILE not in files and all((saved / file).is_file() for file in files)


def _index(saved: Path, present: dict[str, Path], added: dict[str, int]) -> None:
    """Add tensors, given with their bytes, to the index. A single file of weights becomes the first of two."""
    path, single = saved / SAFE_WEIGHTS_INDEX_NAME, saved / SAFE_WEIGHTS_NAME
    if single.is_file():  # an index, if there is one, is an older save's
        index = {"metadata": {"total_size": single.stat().st_size}, "weight_map": dict.fromkeys(present, _ONLY_SHARD)}
    else:
        index = json.loads(path.read_text(encoding="utf-8"))
    index["metadata"]["total_size"] += sum(added.values())
    index["weight_map"] |= dict.fromkeys(added, NATIVE_MTP_FILE)
    with atomic_write(path) as file:
        file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
    if single.is_file():  # loaders read a file of this name before an index, and would not see the other
        single.replace(saved / _ONLY_SHARD)


def _carry(written: dict[str, Any], original: dict[str, Any]) -> bool:
    """Copy the keys about native MTP into `written`, also of nested configurations. Returns whether any changed."""
    changed = False
    for key, value in original.items():
        if isinstance(value, dict) and isinstance(written.get(key), dict):
            changed |= _carry(written[key], value)
        elif _ABOUT_MTP.search(key) and written.get(key) != value:
            written[key], changed = value, True
    return changed
