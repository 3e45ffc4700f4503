"""Medusa's heads (github.com/FasterDecoding/Medusa), by the names of three programs.

============================== ====================================================== ===========================
program                        block j of head i                                      unembedding of head i
============================== ====================================================== ===========================
Medusa, text-generation-inf.   `{i}.{j}.linear.weight`, `.bias`                   `{i}.{blocks}.weight`
a model with its heads         the same behind `medusa_head.`                       the same
vLLM                           `blocks.{i}.layers.{j}.weight`, perhaps `.bias`    `lm_heads.{i}.weight`
============================== ====================================================== ===========================

Heads without an unembedding (Medusa's training script since version 2 writes such) read the base model's LM head. Head i,
counted from 0, predicts token i + 2: 0 is not the LM head. `config.json` of the published checkpoints says two heads
where the weights hold five, so they are counted in the weights.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any


TITLE = "Medusa"
EXAMPLE = "0.0.linear.weight"
ADJACENT = True

_TENSOR = re.compile(r"(?:(?:.*\.)?medusa_head\.)?(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")
_VLLM_TENSOR = re.compile(r"(?:medusa_heads\.)?(?:blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)|lm_heads\.(\d+)\.weight)")


def locate(tensors: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a tensor's name in `LeapHeads` and in the checkpoint; what belongs to no head is left out."""
    for theirs in tensors:
        if match := _TENSOR.fullmatch(theirs):
            head, block, leaf = match.groups()
            is_block = leaf.startswith("linear.")
        elif match := _VLLM_TENSOR.fullmatch(theirs):
            head, block, leaf = match[1] or match[4], match[2], match[3] or ""
            is_block = bool(leaf)
        else:
            continue
        part = f"blocks.{block}.leap_proj.{leaf.removeprefix('linear.')}" if is_block else "unembed.weight"
        yield f"heads.{head}.{part}", theirs


def layers(config: dict[str, Any]) -> int | None:
    """Residual blocks in each head, as the configuration has it."""
    return config.get("medusa_num_layers")


def base_model(config: dict[str, Any]) -> str | None:
    """The base model, as the configuration has it."""
    return config.get("base_model_name_or_path")
