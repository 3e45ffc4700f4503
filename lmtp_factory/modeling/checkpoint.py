"""Leap heads on disk: the sub-folder ``lmtp/`` of a model, adapter or checkpoint directory.

``lmtp/config.json`` and ``lmtp/model.safetensors``, nothing else is ever read. The folder is written beside its final
name and renamed, so a crash or a full disk leaves the old heads or none, never half of the new ones.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from ..config import LMTPConfig
from ..errors import LMTPError
from ..files import CONFIG_FILE, HEADS_FOLDER, WEIGHTS_FILE
from .heads import LeapHeads


# What heads mean: never left to a default when it is read back.
_FACTS = ("offsets", "head_kind", "head_layers", "hidden_size", "vocab_size")
# safetensors' names of the dtypes that a head can compute in.
_DTYPES = ("F16", "BF16", "F32", "F64")


def save_heads(heads: LeapHeads, folder: str | os.PathLike, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write ``heads`` to ``folder`` (a path that ends in ``lmtp``), replacing what is there only when all is written.

    Args:
        state_dict: tensors to write instead of the heads' own, e.g. those gathered from ZeRO-3 shards.

    Raises:
        OSError: as the file system says; the old heads, if any, are still there.
    """
    folder = Path(folder)
    fresh, stale = folder.with_name(f"{folder.name}.writing"), folder.with_name(f"{folder.name}.replaced")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        tensors = heads.state_dict() if state_dict is None else state_dict
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        heads.config.dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        heads.config.architectures = [type(heads).__name__]
        heads.config.save_pretrained(fresh)
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
    except SafetensorError as error:  # safetensors reports a full disk as its own error
        raise OSError(f"Could not write the leap heads to {folder}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def find_heads(path: str | os.PathLike) -> Path | None:
    """The ``lmtp/`` folder of ``path``, a local directory or a hub id; None where it has none."""
    if os.path.isdir(path):
        folder = Path(path, HEADS_FOLDER)
        return folder if folder.is_dir() else None
    try:
        snapshot = snapshot_download(str(path), allow_patterns=f"{HEADS_FOLDER}/*")
    except (RepositoryNotFoundError, HFValidationError, LocalEntryNotFoundError):
        return None
    except HfHubHTTPError as error:
        raise LMTPError(
            f"The hub could not be asked for {path} ({error}): try again or name a local directory."
        ) from None
    folder = Path(snapshot, HEADS_FOLDER)
    return folder if folder.is_dir() else None


def read_config(folder: str | os.PathLike) -> LMTPConfig:
    """The configuration in an ``lmtp/`` folder.

    Raises:
        LMTPError: it is missing, unreadable or impossible; it lacks a fact without which heads mean something else, or holds
            one that this version does not know.
    """
    path = Path(folder, CONFIG_FILE)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LMTPError(f"{path} is missing: give the directory whose lmtp/ folder stage 1 or stage 2 wrote.") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LMTPError(f"{path} is damaged ({error}): copy or train the leap heads again.") from None
    if not isinstance(values, dict) or values.pop("model_type", None) != LMTPConfig.model_type:
        raise LMTPError(
            f"{path} does not describe leap heads (its model_type is not {LMTPConfig.model_type}): give a directory whose "
            "lmtp/ folder stage 1 or stage 2 wrote."
        )
    missing = [name for name in _FACTS if values.get(name) is None]
    if missing:
        raise LMTPError(f"{path} does not say {', '.join(missing)}: copy or train the leap heads again.")
    try:
        return LMTPConfig(**values)
    except LMTPError as error:
        raise LMTPError(f"{path} cannot be used. {error}") from None


def validate_checkpoint(folder: str | os.PathLike) -> LMTPConfig:
    """The configuration of an ``lmtp/`` folder whose weights are there, whole, and of the shapes it describes.

    Reads the header of the weights only, so it is cheap enough to run before a model loads.

    Raises:
        LMTPError: a file is missing, damaged or truncated, the two do not fit each other, or weights are no floats.
    """
    folder, config = Path(folder), read_config(folder)
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as weights:  # refuses a file shorter than its header says
            tensors = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118  no dict
            found = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
            dtypes = {name: tensor.get_dtype() for name, tensor in tensors.items()}
    except FileNotFoundError:
        raise LMTPError(f"{path} is missing: copy or train the leap heads again.") from None
    except (SafetensorError, OSError) as error:
        raise LMTPError(f"{path} is truncated or damaged ({error}): copy or train the leap heads again.") from None
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in LeapHeads(config).state_dict().items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise LMTPError(
            f"{path} does not fit {folder / CONFIG_FILE} (first at {wrong[0]}): train the leap heads again."
        )
    odd = sorted(name for name, dtype in dtypes.items() if dtype not in _DTYPES)
    if odd:
        raise LMTPError(
            f"{path} holds {odd[0]} as {dtypes[odd[0]]}, but leap heads are read as {', '.join(_DTYPES)} only: write them "
            "in one of these."
        )
    return config


def load_heads(path: str | os.PathLike) -> LeapHeads:
    """Leap heads from a directory or hub id that has an ``lmtp/`` folder, on the CPU, in the dtype they were saved in.

    Raises:
        LMTPError: no heads there, or damaged, truncated or incomplete ones, or weights that are not finite.
    """
    folder = find_heads(path)
    if folder is None:
        raise LMTPError(f"{path} has no lmtp/ folder, so no leap heads: give the output directory of an L-MTP stage.")
    config = validate_checkpoint(folder)
    with torch.device("meta"):  # no random numbers for matrices that are about to be read
        heads = LeapHeads(config)
    tensors = load_file(folder / WEIGHTS_FILE)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise LMTPError(
                f"{folder / WEIGHTS_FILE} holds NaN or infinity in {name}: train the leap heads again, with a lower "
                "learning rate if that is how they came about."
            )
    heads.load_state_dict(tensors, assign=True)
    heads.folder = folder
    return heads


def tokenizer_fingerprint(tokenizer) -> str:
    """Hash of a tokenizer's vocabulary (token and id pairs): equal where token ids mean the same."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=False).encode()).hexdigest()[:16]


def state_size(text_config: PretrainedConfig) -> int:
    """Width of the final hidden states, as the LM head reads them: OPT projects them to that of its embeddings."""
    return getattr(text_config, "word_embed_proj_dim", None) or text_config.hidden_size


def check_base(config: LMTPConfig, base: PretrainedConfig, fingerprint: str | None = None) -> None:
    """Refuse heads on a base model that they were not trained on.

    Args:
        config: the heads'.
        base: the base model's configuration.
        fingerprint: of the base model's tokenizer; not compared where either side has none.

    Raises:
        LMTPError: hidden size, vocabulary size or tokenizer differ; the sentence names both models.
    """
    text_config = base.get_text_config()
    facts = [
        ("hidden size", config.hidden_size, state_size(text_config)),
        ("vocabulary size", config.vocab_size, text_config.vocab_size),
        ("tokenizer", config.tokenizer_fingerprint, fingerprint),
    ]
    for what, theirs, ours in facts:
        if theirs is not None and ours is not None and theirs != ours:
            raise LMTPError(
                f"These leap heads belong to {config.base_model} ({what} {theirs}), not to {base.name_or_path} "
                f"({what} {ours}): load them on their own base model or train heads for this one."
            )


def check_base_files(config: LMTPConfig, base: str, **hub_options: Any) -> None:
    """:func:`check_base` from a base model's files, without its weights; ``hub_options`` as ``from_pretrained``'s."""
    fingerprint = base_fingerprint(base, **hub_options) if config.tokenizer_fingerprint else None
    check_base(config, AutoConfig.from_pretrained(base, **hub_options), fingerprint)


def base_fingerprint(base: str, **hub_options: Any) -> str | None:
    """Fingerprint of the tokenizer in a model directory or hub id; None where it has none.

    Read from the files, not taken from a tokenizer in use: LLaMA-Factory's templates may have added tokens to that.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **hub_options)
    except (OSError, ValueError):
        return None
    return tokenizer_fingerprint(tokenizer)
