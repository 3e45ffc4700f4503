"""What the L-MTP authors' code writes in stage 1 (github.com/Xiaohao-Liu/L-MTP): the heads beside the whole backbone.

Its own code sets `skip_token` anew whenever it builds a model, whatever the configuration says and whatever the heads
were trained with, and takes the number of heads from an argument. So neither is read from `config.json`: the heads are
counted, and the leaps have to be asked for or measured.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any


TITLE = "L-MTP release"
EXAMPLE = "heads.heads.0.resblock.0.l_proj.weight"
ADJACENT = False

_TENSOR = re.compile(r"(?:.*\.)?heads\.heads\.(\d+)\.(?:resblock\.(\d+)\.l_proj\.(weight|bias)|lm_head\.weight)")


def locate(tensors: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a tensor's name in `LeapHeads` and in the checkpoint; what belongs to no head is left out."""
    for theirs in tensors:
        if match := _TENSOR.fullmatch(theirs):
            head, block, leaf = match.groups()
            yield f"heads.{head}." + (f"blocks.{block}.leap_proj.{leaf}" if leaf else "unembed.weight"), theirs


def layers(config: dict[str, Any]) -> int | None:
    """Residual blocks in each head, as the configuration has it."""
    return config.get("head_num_layers")


def base_model(config: dict[str, Any]) -> str | None:
    """The base model, as the configuration has it."""
    return config.get("model_name")
