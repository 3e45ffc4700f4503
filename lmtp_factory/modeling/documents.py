"""Whether a model keeps documents apart that share a row and differ by their positions alone."""

import sys

import torch
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from .lmtp import LeapModel


# Attention that is told by a mask where a document ends, in any number of rows; flash kernels see it in a single row only.
WITH_MASK = ("sdpa", "eager", "flex_attention")

# First documents of the two rows that are tried, and the length of both.
_FIRST, _LENGTH = (17, 9), 40

# A leak moves states by a good part of what other tokens would; other shapes of a matrix product by a millionth, in bf16
# by less than this.
_TOLERANCE = 1e-2


@torch.no_grad()
def keeps_documents_apart(base: LeapModel) -> bool:
    """Tried on the model itself: does the second document of a row change with the tokens of the first?

    transformers' own models take borders from positions; code that comes with a checkpoint, layers with a running state and
    models with several axes of positions may not.

    Args:
        base: a causal LM with leap heads. Under ZeRO-3, where it cannot run by itself, its code is looked at instead.
    """
    if is_deepspeed_zero3_enabled():
        return _looks_as_if(base)
    rows = 2 if base.config._attn_implementation in WITH_MASK else 1  # as packed batches will have
    ids = torch.arange(1, 1 + rows * _LENGTH, device=base.device).view(rows, _LENGTH)
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(_LENGTH - n)]) for n in _FIRST[:rows]])
    other_ids = ids.clone()
    for row, first in enumerate(_FIRST[:rows]):
        other_ids[row, :first] += rows * _LENGTH
    inputs = {"position_ids": positions.to(base.device)}
    change = base.final_hidden_states(input_ids=ids, **inputs) - base.final_hidden_states(input_ids=other_ids, **inputs)
    return all(
        _size(change[row, first:]) <= _TOLERANCE * _size(change[row, :first]) for row, first in enumerate(_FIRST[:rows])
    )


def _size(states: Tensor) -> Tensor:
    return states.float().pow(2).mean().sqrt()


def _looks_as_if(base: LeapModel) -> bool:
    config = base.config.get_text_config()
    stateful = any("attention" not in kind or "linear" in kind for kind in getattr(config, "layer_types", None) or ())
    axes = "mrope_section" in str(config.to_dict())
    return not stateful and not axes and hasattr(sys.modules[type(base.base_model).__module__], "create_causal_mask")
