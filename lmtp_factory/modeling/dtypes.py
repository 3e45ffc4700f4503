"""Dtype rules for fp32 heads on a backbone that may be bf16, with or without autocast."""

import torch
from torch import Tensor, nn


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of a matmul with `weight`: the autocast dtype if autocast is on, else the weight's dtype."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def cast_like(hidden: Tensor, layer: nn.Module) -> Tensor:
    """Cast `hidden` to the dtype of `layer`'s weight, unless autocast does so or the weight is quantised."""
    dtype = layer.weight.dtype
    return hidden.to(dtype) if dtype.is_floating_point and not torch.is_autocast_enabled(hidden.device.type) else hidden


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which to accumulate values of `tensor`: fp32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
