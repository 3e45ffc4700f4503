"""Which implementation of the leap loss runs: asked for by name, or chosen by what the device and the LM head allow."""

import importlib.util
from collections.abc import Callable
from importlib import import_module

import torch
from torch import nn

from ...errors import LMTPError
from .softmax import softmax_gradient_


AUTO = "auto"
PATHS = (AUTO, "triton", "torch", "eager")


def resolve_path(path: str, device: torch.device) -> str:
    """``triton``, ``torch`` or ``eager``.

    Raises:
        LMTPError: an unknown path; Triton asked for where it cannot run.
    """
    if path not in PATHS:
        raise LMTPError(f"lmtp_loss is {path!r}, but it has to be one of {', '.join(PATHS)}.")
    triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if path == "triton" and not triton:
        raise LMTPError(
            f"lmtp_loss: triton needs a CUDA device and Triton, and this is {device.type}: write lmtp_loss: auto."
        )
    return ("triton" if triton else "torch") if path == AUTO else path


def softmax_of(path: str) -> Callable:
    """The ``softmax_gradient_`` of a resolved path."""
    if path == "triton":
        # Not an import statement: transformers demands those of everyone who loads an export's custom_generate.
        return import_module(f"{__package__}.softmax_triton").softmax_gradient_
    return softmax_gradient_


def dense(unembedding: nn.Module) -> nn.Linear | None:
    """The plain linear layer that ``unembedding`` is; None where its weights are quantised or carry LoRA.

    The gradients of such a one are left to its own backward, which builds them anew for every chunk.
    """
    if getattr(unembedding, "modules_to_save", None):  # PEFT's copy of a layer that is tuned in full
        if unembedding.disable_adapters or len(unembedding.active_adapters) != 1:
            return None
        unembedding = unembedding.modules_to_save[unembedding.active_adapters[0]]
    plain = type(unembedding) is nn.Linear and unembedding.weight.is_floating_point()
    return unembedding if plain else None
