"""Linear layers with prepacked weights, which make decoding on a CPU fast.

A forward of a few tokens spends its time reading weights. oneDNN's packed layout, the one that torch.compile's freezing
uses, reads them faster than torch's ordinary fp32 matmul does and lets several tokens share one reading, which makes
verifying a tree cheap (benchmarks/README.md). The packed weights are a second copy, so a model that would not leave memory
to spare keeps its ordinary layers.

Drafts need not be exact: their unembedding, most of a draft's time, is also kept in int8, a quarter of the bytes.

A copy belongs to the memory of the weight that it was made of. It dies with that memory (`model.to(dtype)`, a replaced
`.data`), and every call of `generate` compares the weight's bits with those that were packed, because an optimizer
step, a merged adapter or a write through `.data` changes them in place and tells nobody. The comparison reads the weights
once: it costs about as much as one forward.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .free_memory import free_memory


# Tokens for which the layout is tuned; others work as well.
_TUNED_FOR = 8
# Packed copies may take this share of the memory that is free.
_SHARE = 0.5


@dataclass
class _Copy:
    """What was made of one weight.

    Attributes:
        bits: sums over the weight's bits that tell whether it is still the weight that was packed.
        packed: in oneDNN's layout.
        int8: quantised and packed; made when a draft first asks for it.
    """

    bits: tuple[Tensor, Tensor]
    packed: Tensor
    int8: object | None = None


# Of each storage, by (offset, shape) of the weight: flattened parameters share one storage.
_copies: WeakKeyDictionary[torch.UntypedStorage, dict[tuple, _Copy]] = WeakKeyDictionary()
_users: WeakKeyDictionary[nn.Linear, int] = WeakKeyDictionary()  # how many contexts use a layer's copy now
_lock = threading.Lock()


@cache
def available() -> bool:
    """Whether this torch has the operators and they agree with the ordinary matmul."""
    try:
        weight, inputs = _sample_matrices()
        return torch.allclose(_linear(inputs, _pack(weight), None), inputs @ weight.T, atol=1e-4)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def can_prepack(model: nn.Module) -> bool:
    """Whether `model` is an fp32 model on a CPU with memory for a second copy of its matrices."""
    linears = _linears(model)
    if not linears or not available():
        return False
    with _lock:
        missing = sum(4 * layer.weight.numel() for layer in linears if _kept(layer) is None)
    free = free_memory()
    return free is not None and missing <= _SHARE * free


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """`model`'s linear layers compute with packed weights inside the context, in whichever thread.

    Copies are kept for the next time, and checked against the weights each time a context is entered.
    """
    with _lock:
        layers = _linears(model)
        copies = [_current(layer) for layer in layers]  # all of them before any layer changes: packing may fail
        for layer, copy in zip(layers, copies):
            layer.forward = _PrepackedForward(layer, copy.packed)
            _users[layer] = _users.get(layer, 0) + 1
    try:
        yield
    finally:
        with _lock:
            for layer in layers:
                _users[layer] -= 1
                if not _users[layer]:
                    del _users[layer]
                    if _is_prepacked(layer):
                        del layer.forward


def int8_linear(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """`layer` with int8 weights where it computes with packed weights now; else the layer itself.

    Args:
        layer: maps (..., in) fp32 to (..., out).
    """
    if not _is_prepacked(layer) or not _can_quantise():
        return layer
    with _lock:
        copy = _kept(layer)
        if copy is None:
            return layer
        if copy.int8 is None:
            copy.int8 = _quantise(layer.weight.detach())
    return lambda inputs: torch.ops.quantized.linear_dynamic(inputs, copy.int8, reduce_range=True)


class _PrepackedForward:
    """A linear layer's forward on packed weights; gradients, autocast and other dtypes go to the layer's own."""

    def __init__(self, layer: nn.Linear, packed: Tensor):
        self.layer, self.packed = layer, packed

    def __call__(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or inputs.dtype != torch.float32
        if plain or inputs.device.type != "cpu":
            return nn.Linear.forward(self.layer, inputs)
        return _linear(inputs, self.packed, self.layer.bias)


def _linears(model: nn.Module) -> list[nn.Linear]:
    """Plain fp32 layers on the CPU; not those whose forward somebody else has replaced (accelerate's offloading)."""
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and ("forward" not in vars(layer) or _is_prepacked(layer))
    ]


def _is_prepacked(layer: nn.Module) -> bool:
    return isinstance(vars(layer).get("forward"), _PrepackedForward)


def _place(weight: Tensor) -> tuple:
    return weight.storage_offset(), tuple(weight.shape), weight.stride()


def _kept(layer: nn.Linear) -> _Copy | None:
    """The copy of this layer's memory, whatever has been written there since."""
    return _copies.get(layer.weight.untyped_storage(), {}).get(_place(layer.weight))


def _current(layer: nn.Linear) -> _Copy:
    """A copy of the weight as it is now: the one that is kept if the bits are the same, else a new one."""
    weight, copy = layer.weight.detach(), _kept(layer)
    bits = _bits(weight)
    if copy is None or not all(map(torch.equal, copy.bits, bits)):
        copy = _Copy(bits, _pack(weight))
        _copies.setdefault(weight.untyped_storage(), {})[_place(weight)] = copy
    return copy


def _bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of a weight's bits over its rows and over its columns, modulo 2^64.

    One changed number changes both. Rows or columns that trade places change one of them. Pairs of numbers are read as one
    int64, and not numbers as int32, because that is faster and because a change by the same bits everywhere (twice the
    weight, minus the weight) would cancel modulo 2^32 where the dimensions are powers of two.

    Args:
        weight: (out, in) fp32.

    Returns:
        (in / 2,) and (out,) int64, or (in,) and (out,) where the numbers cannot be read in pairs.
    """
    even = weight.stride(1) == 1 and not any(
        n % 2 for n in (weight.shape[1], weight.stride(0), weight.storage_offset())
    )
    numbers = weight.view(torch.int64 if even else torch.int32)
    return numbers.sum(0, dtype=torch.int64), numbers.sum(1, dtype=torch.int64)


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
