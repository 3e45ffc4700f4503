"""Linear layers with weights in layouts that make decoding on a CPU fast.

A forward of a few tokens spends its time reading weights. oneDNN's packed layout, the one that torch.compile's freezing
uses, reads them faster than torch's ordinary fp32 matmul does, and 16 tokens cost 1.4 times one, which makes verifying a
tree cheap (benchmarks/README.md). The packed weights are a second copy, so models that would not leave memory to spare
stay as they are.

Drafts need not be exact: their unembedding, most of a draft's time, is also kept in int8, a quarter of the bytes.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


# Tokens for which the layout is tuned; others work as well.
_TUNED_FOR = 8
# Packed copies may take this share of the memory that is free.
_SHARE = 0.5

try:
    import psutil
except ImportError:  # without transformers' accelerate; then nothing is known of the memory, and nothing is packed
    psutil = None

_copies: WeakKeyDictionary[nn.Linear, tuple[tuple, Tensor]] = WeakKeyDictionary()
_rough_copies: WeakKeyDictionary[nn.Linear, tuple[tuple, object]] = WeakKeyDictionary()
_users: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Linear]]] = WeakKeyDictionary()
_lock = threading.Lock()


@cache
def available() -> bool:
    """Whether this torch has the operators and they agree with the ordinary matmul."""
    try:
        weight, inputs = _sample_matrices()
        return torch.allclose(_linear(inputs, _pack(weight), None), inputs @ weight.T, atol=1e-4)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def can_pack(model: nn.Module) -> bool:
    """Whether ``model`` is an fp32 model on a CPU with memory for a second copy of its matrices."""
    with _lock:
        linears = _users.get(model, (0, []))[1] or _linears(model)
    if not linears or psutil is None or not available():
        return False
    missing = sum(4 * layer.weight.numel() for layer in linears if layer not in _copies)
    return missing <= _SHARE * psutil.virtual_memory().available


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """``model``'s linear layers compute with packed weights inside the context, in whichever thread.

    Copies are kept for the next time and renewed when a weight has changed.
    """
    with _lock:
        count, layers = _users.get(model, (0, []))
        if not count:
            layers = _linears(model)
            for layer in layers:
                layer.forward = partial(_linear, weight=_copy_of(layer, _copies, _pack), bias=layer.bias)
        _users[model] = count + 1, layers
    try:
        yield
    finally:
        with _lock:
            count, layers = _users[model]
            _users[model] = count - 1, layers
            if count == 1:
                for layer in layers:
                    del layer.forward


def _linears(model: nn.Module) -> list[nn.Linear]:
    """Plain fp32 layers on the CPU; not those whose forward somebody else has replaced (accelerate's offloading)."""
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and "forward" not in vars(layer)
    ]


def rough(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """``layer`` with int8 weights where it is one of those computed with packed weights; else the layer itself."""
    if layer not in _copies or not _can_quantise():
        return layer
    weight = _copy_of(layer, _rough_copies, _quantise)
    return lambda inputs: torch.ops.quantized.linear_dynamic(inputs, weight, reduce_range=True)


def _copy_of(layer: nn.Linear, copies: WeakKeyDictionary, make: Callable):
    weight = layer.weight
    state = (weight.data_ptr(), None if weight.is_inference() else weight._version)
    kept = copies.get(layer)
    if kept is None or kept[0] != state:
        kept = copies[layer] = (state, make(weight.detach()))
    return kept[1]


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _TUNED_FOR)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def _quantise(weight: Tensor):
    """Symmetric int8, a scale a row (a vocabulary entry)."""
    scales = weight.abs().amax(1).clamp(min=1e-8) / 127
    zeros = torch.zeros(len(weight), dtype=torch.long)
    return torch.ops.quantized.linear_prepack(torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8), None)


@cache
def _can_quantise() -> bool:
    try:
        weight, inputs = _sample_matrices()
        return torch.allclose(
            torch.ops.quantized.linear_dynamic(inputs, _quantise(weight), True), inputs @ weight.T, atol=0.5
        )
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _sample_matrices() -> tuple[Tensor, Tensor]:
    """Without touching the random numbers that sampling draws."""
    return torch.arange(24 * 16).sin().view(24, 16), torch.arange(3 * 16).cos().view(3, 16)
