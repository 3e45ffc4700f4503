"""Choice of the leap loss's implementation, by name or by device."""

import importlib.util

import torch
from torch import nn

from ...errors import LMTPError


AUTO = "auto"
IMPLEMENTATIONS = (AUTO, "triton", "torch", "eager")


def resolve_implementation(name: str, device: torch.device) -> str:
    """Resolve `auto` to `triton` or `torch`; return other names unchanged.

    Raises:
        LMTPError: The name is unknown, or `triton` is requested without CUDA or Triton.
    """
    if name not in IMPLEMENTATIONS:
        raise LMTPError(f"lmtp_loss is {name!r}, but it has to be one of {', '.join(IMPLEMENTATIONS)}.")
    triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if name == "triton" and not triton:
        raise LMTPError(
            f"lmtp_loss: triton needs a CUDA device and Triton, and this is {device.type}: write lmtp_loss: auto."
        )
    return ("triton" if triton else "torch") if name == AUTO else name


def as_plain_linear(unembedding: nn.Module) -> nn.Linear | None:
    """Return the plain linear layer behind `unembedding`, or None if its weights are quantised or have LoRA adapters.

    For None the chunked loss falls back to autograd in each chunk.
    """
    if getattr(unembedding, "modules_to_save", None):  # PEFT trains a full copy of the layer
        if unembedding.disable_adapters or len(unembedding.active_adapters) != 1:
            return None
        unembedding = unembedding.modules_to_save[unembedding.active_adapters[0]]
    plain = type(unembedding) is nn.Linear and unembedding.weight.is_floating_point()
    return unembedding if plain else None
