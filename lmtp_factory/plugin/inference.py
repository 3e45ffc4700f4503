"""Leap heads on models that LLaMA-Factory loads to generate or to export."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from torch import nn

from ..decoding import attach_heads
from ..export.custom_generate import write_custom_generate
from ..modeling import heads_of, load_heads
from ..modeling.checkpoint import tokenizer_fingerprint
from ..modeling.model import base_of
from . import log
from .heads_source import HeadsSource


def with_heads(upstream: Callable) -> Callable:
    """Wrap upstream's `load_model` for callers that generate: the model comes with the heads of its source."""

    @functools.wraps(upstream)
    def load_model(tokenizer, model_args, finetuning_args, *args, **kwargs):
        model = upstream(tokenizer, model_args, finetuning_args, *args, **kwargs)
        source, strategy = finetuning_args.heads_source, finetuning_args.lmtp_decode
        if source is not None and strategy != "off":
            _attach_for_decoding(model, source.folder, strategy)
        return model

    return load_model


def _attach_for_decoding(model: nn.Module, folder: Path, strategy: str) -> None:
    base = base_of(model)
    if "generate" in vars(base):  # put there by upstream's patcher
        log.warning(f"{type(base).__name__} has a generate of its own: decoding without the leap heads of {folder}.")
        return
    if heads_of(model) is None:
        attach_heads(model, heads=load_heads(folder.parent))
    base.decode_strategy = strategy
    tree = base.tree_config()
    size = f"{'up to ' if tree.kind == 'dynamic' else ''}{tree.nodes} nodes"
    log.info(
        f"Decoding with the leap heads of {folder}: {'backward' if strategy == 'auto' else strategy}, {tree.kind} tree of "
        f"{size} ({tree.source})."
    )


def attach_for_export(model: nn.Module, tokenizer, source: HeadsSource, export: str) -> None:
    """Prepare a loaded model for an export with heads, or without the heads that it has on disk.

    Args:
        model: The model, adapters merged.
        tokenizer: The tokenizer that is saved beside the heads.
        source: Where the heads come from.
        export: The value of `lmtp_export`.
    """
    _untie_tuned_lm_head(model)
    if export == "ntp":
        log.info(f"Exporting without the leap heads of {source.folder}.")
        return
    log.info(f"Exporting with the leap heads of {source.folder}.")
    attach_heads(model, heads=load_heads(source.folder.parent))
    model.leap_heads.config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    if export == "custom_generate":
        base_of(model).after_export = write_custom_generate


def _untie_tuned_lm_head(model: nn.Module) -> None:
    """Set `tie_word_embeddings: false` if tuning has separated the LM head from the embeddings; saving would drop it."""
    # transformers reads the outer configuration, other programs the text model's, which may lack the key.
    configs = [c for c in (model.config, model.config.get_text_config()) if hasattr(c, "tie_word_embeddings")]
    if any(c.tie_word_embeddings for c in configs) and _lm_head_differs(model):
        for config in configs:
            config.tie_word_embeddings = False
        log.info(
            "The tuned LM head differs from the embeddings now: the export is saved with tie_word_embeddings: false."
        )


def _lm_head_differs(model: nn.Module) -> bool:
    """Return whether the weights of LM head and embeddings differ in value.

    Tied weights that are offloaded are two parameters without data until their modules are aligned.
    """
    lm_head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if lm_head.weight is embeddings.weight:
        return False
    with align_module_device(lm_head), align_module_device(embeddings):
        return not torch.equal(lm_head.weight.to(embeddings.weight), embeddings.weight)
