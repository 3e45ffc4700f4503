"""Saving and loading leap heads in `lmtp/`, a sub-folder of a model, adapter or checkpoint directory.

Heads are read from `lmtp/config.json` and `lmtp/model.safetensors` only. A new folder is written under a temporary name
and then renamed, so a crash or a full disk leaves the old heads or none, but no partial heads.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from httpx import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from ..config import LMTPConfig
from ..errors import LMTPError, first_line
from ..files import CONFIG_FILE, HEADS_FOLDER, TREE_FILE, WEIGHTS_FILE
from .draft_vocabulary import check_tables
from .heads import LeapHeads


# Keys that change what the weights mean. They must be in a saved config.json; defaults are not applied.
_FACTS = ("offsets", "head_kind", "head_layers", "hidden_size", "vocab_size")
# Keys that 0.1.0 did not write yet. Its heads are the paper's: a file has all of these keys or none. draft_vocab_size is not
# one of them, because transformers writes no null; the weights show whether it is missing.
_LATER_FACTS = ("head_block", "head_inputs", "head_backs")
# safetensors' names of the dtypes that heads can be loaded in.
_DTYPES = ("F16", "BF16", "F32", "F64")
_TABLE_DTYPES = {"d2t": ("I64",), "t2d": ("BOOL",)}


def save_heads(
    heads: LeapHeads,
    folder: str | os.PathLike,
    state_dict: Mapping[str, Tensor] | None = None,
    tree: bytes | None = None,
) -> None:
    """Write `heads` to `folder`. Older heads there are replaced after everything is written.

    Args:
        heads: Heads to save.
        folder: Directory to write to, usually `<directory>/lmtp`.
        state_dict: Tensors to write instead of `heads.state_dict()`, e.g. gathered from ZeRO-3 shards.
        tree: Contents of `tree.json`, if a draft tree was measured for these heads.

    Raises:
        OSError: Writing failed. Older heads are unchanged.
    """
    folder = Path(folder)
    fresh, stale = folder.with_name(f"{folder.name}.writing"), folder.with_name(f"{folder.name}.replaced")
    if stale.exists() and not folder.exists():  # an earlier call was killed between its two renames
        stale.rename(folder)
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        tensors = heads.state_dict() if state_dict is None else state_dict
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
        heads.config.dtype = str(dtype).removeprefix("torch.")
        heads.config.architectures = [type(heads).__name__]
        heads.config.save_pretrained(fresh)
        if tree is not None:
            (fresh / TREE_FILE).write_bytes(tree)
        _replace(folder, fresh, stale)
    except SafetensorError as error:  # safetensors reports a full disk as its own error
        raise OSError(f"Could not write the leap heads to {folder}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def _replace(folder: Path, fresh: Path, stale: Path) -> None:
    """Rename `fresh` to `folder`. The old folder becomes `stale`, or `folder` again if that fails."""
    replaces = folder.exists()
    if replaces:
        folder.rename(stale)
    try:
        fresh.rename(folder)
    except OSError:
        if replaces:
            stale.rename(folder)
        raise


def find_heads(path: str | os.PathLike, **hub_options: Any) -> Path | None:
    """Return the `lmtp/` folder of a local directory or hub id, or None if it has none.

    Without network access, a repository in the local cache is looked up there.

    Args:
        path: Local directory or hub id.
        hub_options: Passed to the hub: `revision`, `token` and `cache_dir`.

    Raises:
        LMTPError: The hub request failed and the repository is not cached, so it is unknown whether it has heads.
    """
    if os.path.isdir(path):
        folder = Path(path, HEADS_FOLDER)
        return folder if folder.is_dir() else None
    try:
        snapshot = snapshot_download(str(path), allow_patterns=f"{HEADS_FOLDER}/*", **hub_options)
    except HFValidationError:  # no hub id
        return None
    # OSError: the hub refused the request, or there is no connection and the repository is not cached.
    except (OSError, HTTPError) as error:
        # A gated repository exists, although its error is a RepositoryNotFoundError.
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            return None
        raise LMTPError(
            f"No directory {path} exists, and the hub request for it failed ({first_line(error)}): name a local "
            "directory or try again."
        ) from None
    folder = Path(snapshot, HEADS_FOLDER)
    return folder if folder.is_dir() else None


def read_config(folder: str | os.PathLike) -> LMTPConfig:
    """Read the configuration in an `lmtp/` folder.

    Raises:
        LMTPError: The file is missing, unreadable or inconsistent, lacks a required key, or has a key that this version
            does not know.
    """
    path = Path(folder, CONFIG_FILE)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LMTPError(f"{path} is missing: name a directory whose lmtp/ folder stage 1 or stage 2 wrote.") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LMTPError(f"{path} is damaged ({error}): copy or train the leap heads again.") from None
    if not isinstance(values, dict) or values.pop("model_type", None) != LMTPConfig.model_type:
        raise LMTPError(
            f"{path} does not describe leap heads (its model_type is not {LMTPConfig.model_type}): name a directory "
            "whose lmtp/ folder stage 1 or stage 2 wrote."
        )
    missing = [name for name in _FACTS if values.get(name) is None]
    if any(name in values for name in _LATER_FACTS):
        missing += [name for name in _LATER_FACTS if name not in values]
    if values.get("head_inputs") == "layers" and values.get("base_layers") is None:
        missing.append("base_layers")
    if missing:
        raise LMTPError(f"{path} does not say {', '.join(missing)}: copy or train the leap heads again.")
    try:
        return LMTPConfig(**values)
    except LMTPError as error:
        raise LMTPError(f"{path} cannot be used. {error}") from None


def validate_checkpoint(folder: str | os.PathLike) -> LMTPConfig:
    """Check that the weights in an `lmtp/` folder are complete and match its configuration; return the configuration.

    Reads only the header of the weights, so the check is fast enough to run before a model is loaded.

    Raises:
        LMTPError: A file is missing, damaged or truncated, the weights do not match the configuration, or they are not
            floating-point numbers.
    """
    folder, config = Path(folder), read_config(folder)
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as weights:  # raises if the file is shorter than its header says
            tensors = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118  not a dict
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
    for name, dtype in sorted(dtypes.items()):
        if dtype not in (allowed := _TABLE_DTYPES.get(name, _DTYPES)):
            raise LMTPError(
                f"{path} holds {name} as {dtype}, but it is read as {', '.join(allowed)} only: save it in such a dtype."
            )
    return config


def load_heads(path: str | os.PathLike) -> LeapHeads:
    """Load leap heads from the `lmtp/` folder of a directory or hub id, on the CPU, in the dtype of the file.

    Raises:
        LMTPError: There are no heads, or they are damaged, truncated, incomplete or not finite.
    """
    folder = find_heads(path)
    if folder is None:
        raise LMTPError(f"{path} has no lmtp/ folder, so no leap heads: name the output directory of an L-MTP stage.")
    config = validate_checkpoint(folder)
    with torch.device("meta"):  # skips the initialisation of weights that are loaded below
        heads = LeapHeads(config)
    tensors = load_file(folder / WEIGHTS_FILE)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise LMTPError(
                f"{folder / WEIGHTS_FILE} holds NaN or infinity in {name}: train the leap heads again, with a lower "
                "learning rate if the training diverged."
            )
    heads.load_state_dict(tensors, assign=True)
    if heads.d2t is not None:
        check_tables(heads.d2t, heads.t2d, str(folder / WEIGHTS_FILE))
    heads.folder = folder
    return heads


def tokenizer_fingerprint(tokenizer) -> str:
    """Return a hash of a tokenizer's (token, id) pairs. Equal hashes mean equal token ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=False).encode()).hexdigest()[:16]


def state_size(text_config: PretrainedConfig) -> int:
    """Return the width of the LM head's inputs. OPT projects its hidden states to the width of the embeddings."""
    return getattr(text_config, "word_embed_proj_dim", None) or text_config.hidden_size


def base_difference(
    config: LMTPConfig, base: PretrainedConfig, fingerprint: str | None = None
) -> tuple[str, int | str, int | str] | None:
    """Return the first difference between the model that heads were trained on and a base model.

    Args:
        config: Configuration of the heads.
        base: Configuration of the base model.
        fingerprint: Fingerprint of the base model's tokenizer.

    Returns:
        What differs (hidden size, vocabulary size, number of layers or tokenizer), the heads' value and the base
        model's. None if they agree on all that both sides say.
    """
    text_config = base.get_text_config()
    facts = [
        ("hidden size", config.hidden_size, state_size(text_config)),
        ("vocabulary size", config.vocab_size, text_config.vocab_size),
        ("number of layers", config.base_layers, text_config.num_hidden_layers),
        ("tokenizer", config.tokenizer_fingerprint, fingerprint),
    ]
    return next((fact for fact in facts if None not in fact and fact[1] != fact[2]), None)


def check_base(config: LMTPConfig, base: PretrainedConfig, fingerprint: str | None = None) -> None:
    """Check that heads were trained on a base model. The arguments are those of `base_difference`.

    Raises:
        LMTPError: Hidden size, vocabulary size, number of layers or tokenizer differ.
    """
    if difference := base_difference(config, base, fingerprint):
        what, theirs, ours = difference
        raise LMTPError(
            f"These leap heads belong to {config.base_model} ({what} {theirs}), not to {base.name_or_path} "
            f"({what} {ours}): load them on their own base model or train heads for this one."
        )


def check_base_files(config: LMTPConfig, base: str, **hub_options: Any) -> None:
    """Run `check_base` on a model directory or hub id without loading its weights.

    Args:
        config: Configuration of the heads.
        base: Model directory or hub id.
        hub_options: Passed to `from_pretrained`, e.g. `token` or `revision`.

    Raises:
        LMTPError: Hidden size, vocabulary size or tokenizer differ.
    """
    fingerprint = base_fingerprint(base, **hub_options) if config.tokenizer_fingerprint else None
    check_base(config, AutoConfig.from_pretrained(base, **hub_options), fingerprint)


def base_fingerprint(base: str, **hub_options: Any) -> str | None:
    """Return the fingerprint of the tokenizer in a model directory or hub id, or None if it has none.

    The tokenizer is read from the files because LLaMA-Factory's templates may add tokens to a loaded tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **hub_options)
    except (OSError, ValueError):
        return None
    return tokenizer_fingerprint(tokenizer)
