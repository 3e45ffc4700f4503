"""Loading a model with leap heads in one call."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ..config import LMTPConfig
from ..errors import LMTPError
from ..files import CONFIG_FILE
from .attach import attach_heads
from .checkpoint import base_fingerprint, check_base, load_heads
from .vocabulary import new_tokens


_ADAPTER_FILE = "adapter_config.json"


def base_of_heads(path: str | os.PathLike, config: LMTPConfig) -> str:
    """Return the directory or hub id of the weights that the heads of a directory belong to.

    Args:
        path: Local directory of a heads export, of an adapter with heads, or of a stage-1 output.
        config: Configuration of the heads.

    Raises:
        LMTPError: Neither the adapter nor the heads name their base model.
    """
    adapter = Path(path, _ADAPTER_FILE)
    of_adapter = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else {}
    here = str(path) if Path(path, CONFIG_FILE).is_file() else None
    base = of_adapter.get("base_model_name_or_path") or here or config.base_model
    if not base:
        raise LMTPError(f"{path} does not say which base model its leap heads belong to: export it with heads first.")
    return base


def load_model(path: str, *, attach: Callable = attach_heads, **from_pretrained_kwargs) -> nn.Module:
    """Load a model with leap heads for inference.

    Args:
        path: Local directory or hub id of a heads export, of an adapter with heads (its base model is loaded, then the
            adapter), or of a stage-1 output (`lmtp/config.json` names the base model).
        attach: Function that attaches the heads, with the signature of `attach_heads`.
        from_pretrained_kwargs: Passed to the base model's `from_pretrained`, e.g. `dtype` or `device_map`.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        LMTPError: `path` has no heads, or they do not fit the model.
    """
    hub_options = {k: v for k, v in from_pretrained_kwargs.items() if k in ("token", "revision", "cache_dir")}
    if not os.path.isdir(path):
        path = snapshot_download(path, **hub_options)
        from_pretrained_kwargs.pop("revision", None)  # a revision of `path`, not of its base model
    heads = load_heads(path)
    is_adapter, base_path = os.path.isfile(os.path.join(path, _ADAPTER_FILE)), base_of_heads(path, heads.config)
    config_options = {k: v for k, v in from_pretrained_kwargs.items() if k in (*hub_options, "trust_remote_code")}
    config = AutoConfig.from_pretrained(base_path, **config_options)
    has_new_tokens = is_adapter and bool(new_tokens(path, heads.config, base_path, **config_options))
    if not has_new_tokens:
        check_base(heads.config, config, base_fingerprint(base_path, **config_options))
    is_image_text = type(config) in AutoModelForImageTextToText._model_mapping
    auto_class = AutoModelForImageTextToText if is_image_text else AutoModelForCausalLM
    model = auto_class.from_pretrained(base_path, **from_pretrained_kwargs)
    if has_new_tokens and heads.config.vocab_size > config.get_text_config().vocab_size:
        model.resize_token_embeddings(heads.config.vocab_size, mean_resizing=False)  # the adapter overwrites every row
    if is_adapter:
        from peft import PeftModel  # imported here because an export needs transformers only

        model = PeftModel.from_pretrained(model, path)
    attach(model, heads=heads)
    return model.requires_grad_(False).eval()
