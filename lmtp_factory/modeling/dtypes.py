"""Dtypes of trained fp32 layers on a backbone that may be bf16, with or without autocast."""

import torch
from torch import Tensor, nn


def computed_in(weight: Tensor) -> torch.dtype:
    """The dtype of a product with ``weight``: autocast's where it is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def cast_like(hidden: Tensor, layer: nn.Module) -> Tensor:
    """``hidden`` as ``layer`` takes it: in its dtype, unless autocast sees to that or the weights are quantised."""
    dtype = layer.weight.dtype
    return hidden.to(dtype) if dtype.is_floating_point and not torch.is_autocast_enabled(hidden.device.type) else hidden


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that sums over ``tensor``'s are taken in: fp32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
