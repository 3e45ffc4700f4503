"""Medusa's heads (github.com/FasterDecoding/Medusa), under the tensor names of three programs.

============================== ================================================= =========================
program                        block j of head i                                 unembedding of head i
============================== ================================================= =========================
Medusa, text-generation-inf.   `{i}.{j}.linear.weight`, `.bias`                  `{i}.{blocks}.weight`
model with heads               same, with prefix `medusa_head.`                  same, with the prefix
vLLM                           `blocks.{i}.layers.{j}.weight`, optional `.bias`  `lm_heads.{i}.weight`
============================== ================================================= =========================

Heads without an unembedding, as Medusa's training script writes since version 2, use the base model's LM head. Head i,
counted from 0, has offset i + 2; head 0 is not the LM head. The number of heads is taken from the weights, because
`config.json` of the published checkpoints says two while the weights hold five.
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
    """Yield pairs of a tensor's name in `LeapHeads` and in the checkpoint; other tensors are skipped."""
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
    """Return the number of residual blocks in each head from the configuration."""
    return config.get("medusa_num_layers")


def base_model(config: dict[str, Any]) -> str | None:
    """Return the base model from the configuration."""
    return config.get("base_model_name_or_path")
