"""Stage-1 checkpoints of the L-MTP authors' code (github.com/Xiaohao-Liu/L-MTP), which hold heads and backbone.

The authors' code overwrites `skip_token` whenever it builds a model and takes the number of heads from an argument. So
neither is read from `config.json`: heads are counted in the weights, and the user gives the offsets or has them
measured.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any


TITLE = "L-MTP release"
EXAMPLE = "heads.heads.0.resblock.0.l_proj.weight"
ADJACENT = False

_TENSOR = re.compile(r"(?:.*\.)?heads\.heads\.(\d+)\.(?:resblock\.(\d+)\.l_proj\.(weight|bias)|lm_head\.weight)")


def locate(tensors: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of a tensor's name in `LeapHeads` and in the checkpoint; other tensors are skipped."""
    for theirs in tensors:
        if match := _TENSOR.fullmatch(theirs):
            head, block, leaf = match.groups()
            yield f"heads.{head}." + (f"blocks.{block}.leap_proj.{leaf}" if leaf else "unembed.weight"), theirs


def layers(config: dict[str, Any]) -> int | None:
    """Return the number of residual blocks in each head from the configuration."""
    return config.get("head_num_layers")


def base_model(config: dict[str, Any]) -> str | None:
    """Return the base model from the configuration."""
    return config.get("model_name")
