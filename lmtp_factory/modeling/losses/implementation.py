"""Which implementation of the leap loss runs: asked for by name, or chosen by what the device allows."""

import importlib.util

import torch
from torch import nn

from ...errors import LMTPError


AUTO = "auto"
IMPLEMENTATIONS = (AUTO, "triton", "torch", "eager")


def resolve_implementation(name: str, device: torch.device) -> str:
    """``triton``, ``torch`` or ``eager``.

    Raises:
        LMTPError: an unknown name; Triton asked for where it cannot run.
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
    """The plain linear layer that ``unembedding`` is; None where its weights are quantised or carry LoRA.

    Without one the loss falls back to autograd, which recomputes the gradient per chunk.
    """
    if getattr(unembedding, "modules_to_save", None):  # PEFT's copy of a layer that is tuned in full
        if unembedding.disable_adapters or len(unembedding.active_adapters) != 1:
            return None
        unembedding = unembedding.modules_to_save[unembedding.active_adapters[0]]
    plain = type(unembedding) is nn.Linear and unembedding.weight.is_floating_point()
    return unembedding if plain else None
