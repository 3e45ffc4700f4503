"""Linear layers with prepacked weights, for a backbone that only runs forwards on a CPU: decoding and scoring.

A forward of a few tokens is bound by reading weights. oneDNN's packed layout, which torch.compile's freezing also uses,
lets several tokens share one read. This makes verifying a tree cheap (benchmarks/README.md). For one token it is faster
than torch's ordinary fp32 layout on some CPUs and slower on others: each process measures for each shape of a weight from
how many tokens on it pays. Packed weights are a second copy of the model. If memory is short, the ordinary layers are used.

Drafts need not be exact. The unembedding takes most of a draft's time, so it is also stored in int8, a quarter of the
bytes.

Copies are keyed by the storage of their weight and freed with it (`model.to(dtype)`, a replaced `.data`). An optimizer
step, a merged adapter or a write through `.data` changes a weight in place without notice. Entering the context, which
every `generate` call does, therefore compares a checksum of each weight with that of its copy. This reads all weights once.
Inside the context weights must not change.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..modeling import onednn
from .free_memory import free_memory
from .packed_speed import fewest_tokens, pack


# Largest share of the free memory that packed copies may use.
_SHARE = 0.5


@dataclass
class _Copy:
    """Packed copies of one weight.

    Attributes:
        bits: Checksum of the weight when it was packed, see `_bits`.
        packed: The weight in oneDNN's layout; None if this is slower, see `fewest_tokens`.
        int8: The weight quantised and packed, created by the first draft.
        int8_rows: Indices of some rows, and these rows quantised and packed.
        quantising: Held while int8 weights are made, so that threads make them once.
    """

    bits: tuple[Tensor, Tensor]
    packed: Tensor | None
    int8: object | None = None
    int8_rows: tuple[Tensor, object] | None = None
    quantising: threading.Lock = field(default_factory=threading.Lock)


# Storage -> (offset, shape, stride) of a weight -> its copy. Several weights may share one storage (flattened
# parameters).
_copies: WeakKeyDictionary[torch.UntypedStorage, dict[tuple, _Copy]] = WeakKeyDictionary()
_users: WeakKeyDictionary[nn.Linear, int] = WeakKeyDictionary()  # number of contexts that use a layer's copy
# Guards the two above and the layers' forwards. Running generations take it several times a step, so it is never held for
# a pass over weights.
_lock = threading.Lock()
# Held while a thread checks and packs the weights: of threads that enter at once the first packs.
_entering = threading.Lock()


@cache
def available() -> bool:
    """Return whether torch has the packed operators and they agree with an ordinary matmul."""
    return onednn.agrees(lambda inputs, weight: onednn.linear(inputs, pack(weight)))


def can_prepack(model: nn.Module, compiled: bool = False) -> bool:
    """Return whether `model` has linear layers that packed weights make faster on this CPU, and may use them.

    Args:
        model: The model.
        compiled: See `may_prepack`.
    """
    return may_prepack(model, compiled) and any(fewest_tokens(layer.weight.shape) for layer in _linears(model))


def may_prepack(model: nn.Module, compiled: bool = False) -> bool:
    """Return whether `model` has fp32 linear layers on a CPU, and memory for packed copies of those that are faster packed.

    This holds even if none is faster: that is timed, and another process may find otherwise.

    Args:
        model: The model.
        compiled: Whether its forward is compiled. torch.compile chooses its own layouts. Autocast casts the weights.
    """
    linears = _linears(model)
    if not linears or compiled or torch.is_autocast_enabled("cpu") or not available():
        return False
    faster = [layer for layer in linears if fewest_tokens(layer.weight.shape)]
    with _lock:
        missing = sum(4 * layer.weight.numel() for layer in faster if _kept(layer) is None)
    free = free_memory()
    return free is not None and missing <= _SHARE * free


def mostly_prepacked(model: nn.Module, compiled: bool = False) -> bool:
    """Return whether most of the weights are packed for every number of tokens.

    Args:
        model: The model.
        compiled: See `may_prepack`.
    """
    if not can_prepack(model, compiled):
        return False
    weights = [layer.weight for layer in _linears(model)]
    packed = sum(weight.numel() for weight in weights if fewest_tokens(weight.shape) == 1)
    return 2 * packed > sum(weight.numel() for weight in weights)


def prepacked_if_possible(model: nn.Module, compiled: bool = False) -> AbstractContextManager[None]:
    """Return `prepacked(model)` if `can_prepack` allows it, else a context that changes nothing."""
    return prepacked(model) if can_prepack(model, compiled) else nullcontext()


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Let `model`'s linear layers compute with packed weights inside the context, in all threads, where they are faster.

    Copies are kept for the next context. Entering a context checks them against the weights.
    """
    with _entering:
        layers = _linears(model)
        copies = [_current(layer) for layer in layers]  # before any layer is changed, because packing may fail
        forwards = [_PrepackedForward(layer, copy.packed) for layer, copy in zip(layers, copies)]
        with _lock:
            for layer, forward in zip(layers, forwards):
                layer.forward = forward
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


def int8_linear(layer: nn.Module, rows: Tensor | None = None) -> Callable[[Tensor], Tensor] | None:
    """Return an int8 version of `layer`, or None if the layer is not prepacked at the moment.

    Args:
        layer: Maps (..., in) fp32 to (..., out).
        rows: (rows,) indices of the outputs to compute; None for all.
    """
    if not _is_prepacked(layer) or not _can_quantise():
        return None
    with _lock:
        copy = _kept(layer)
    if copy is None:
        return None
    with copy.quantising:
        weight = layer.weight.detach()
        if rows is None:
            copy.int8 = _quantise(weight) if copy.int8 is None else copy.int8
        elif copy.int8_rows is None or not torch.equal(copy.int8_rows[0], rows):
            copy.int8_rows = rows, _quantise(weight.index_select(0, rows))
        packed = copy.int8 if rows is None else copy.int8_rows[1]

    def forward(inputs: Tensor) -> Tensor:
        outputs = torch.ops.quantized.linear_dynamic(inputs, packed, reduce_range=True)
        if layer.bias is None:
            return outputs
        # The copy holds no bias, because layers with the same weight share it.
        return outputs + (layer.bias if rows is None else layer.bias.index_select(0, rows))

    return forward


class _PrepackedForward:
    """Forward of a linear layer with packed weights. Gradients, autocast and other dtypes use the ordinary forward.

    So do inputs of few tokens, if that is faster.

    Args:
        layer: The layer.
        packed: Its packed weight, or None.
    """

    def __init__(self, layer: nn.Linear, packed: Tensor | None):
        self.layer, self.packed = layer, packed
        fewest = None if packed is None else fewest_tokens(layer.weight.shape)
        self.fewest_numbers = None if fewest is None else fewest * layer.in_features

    def __call__(self, inputs: Tensor) -> Tensor:
        """Map (..., in) inputs to (..., out) outputs."""
        plain = self.fewest_numbers is None or inputs.numel() < self.fewest_numbers
        plain = plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or inputs.dtype != torch.float32
        if plain or inputs.device.type != "cpu":
            return nn.Linear.forward(self.layer, inputs)
        return onednn.linear(inputs, self.packed, self.layer.bias)


def _linears(model: nn.Module) -> list[nn.Linear]:
    """Return the fp32 linear layers on the CPU, except layers whose forward other code has replaced (accelerate)."""
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and not _is_hooked(layer)
    ]


def _is_hooked(layer: nn.Module) -> bool:
    """Return whether other code has replaced the layer's forward."""
    forward = vars(layer).get("forward")  # read once, because a thread that leaves its context removes it
    return forward is not None and not isinstance(forward, _PrepackedForward)


def _is_prepacked(layer: nn.Module) -> bool:
    return isinstance(vars(layer).get("forward"), _PrepackedForward)


def _place(weight: Tensor) -> tuple:
    return weight.storage_offset(), tuple(weight.shape), weight.stride()


def _kept(layer: nn.Linear) -> _Copy | None:
    """Return the copy of this layer's weight, possibly outdated, or None."""
    return _copies.get(layer.weight.untyped_storage(), {}).get(_place(layer.weight))


def _current(layer: nn.Linear) -> _Copy:
    """Return an up-to-date copy of the layer's weight: the existing one if its checksum matches, else a new one.

    If a weight changes meanwhile, the checksum is that of the numbers before, so the next context packs it again.
    """
    weight = layer.weight.detach()
    with _lock:
        copy = _kept(layer)
    bits = _bits(weight)
    is_faster = fewest_tokens(weight.shape) is not None
    if copy is None or not all(map(torch.equal, copy.bits, bits)) or (is_faster and copy.packed is None):
        copy = _Copy(bits, pack(weight) if is_faster else None)
        with _lock:
            _copies.setdefault(weight.untyped_storage(), {})[_place(weight)] = copy
    return copy


def _bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a checksum: sums of a weight's bits over its rows and over its columns, modulo 2^64.

    A change of one number changes both sums. Swapped rows or columns change one of them. Pairs of fp32 numbers are read
    as one int64. This is faster than int32, and a change of the same bits everywhere (doubling or negating the weight)
    cannot cancel as it would modulo 2^32 if the dimensions are powers of two.

    Args:
        weight: (out, in) fp32.

    Returns:
        (in / 2,) and (out,) int64, or (in,) and (out,) if the numbers cannot be read in pairs.
    """
    even = weight.stride(1) == 1 and not any(
        n % 2 for n in (weight.shape[1], weight.stride(0), weight.storage_offset())
    )
    numbers = weight.view(torch.int64 if even else torch.int32)
    return numbers.sum(0, dtype=torch.int64), numbers.sum(1, dtype=torch.int64)


def _quantise(weight: Tensor):
    """Quantise to symmetric int8 with one scale per row (one vocabulary entry)."""
    scales = weight.abs().amax(1).clamp(min=1e-8) / 127
    zeros = torch.zeros(len(weight), dtype=torch.long)
    return torch.ops.quantized.linear_prepack(torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8), None)


@cache
def _can_quantise() -> bool:
    return onednn.agrees(
        lambda inputs, weight: torch.ops.quantized.linear_dynamic(inputs, _quantise(weight), True), atol=0.5
    )
