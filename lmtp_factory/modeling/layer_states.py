"""Weighted hidden states: heads of `head_inputs: layers` read all layers of the backbone (Mehra et al., arXiv 2502.09419).

Each head reads the final hidden state z and a learnt softmax-weighted sum over the L decoder layers:

    z + sum_l (softmax(sqrt(d) w)_l - 1 / L) x_l        x_l = rms(z) h_l / rms(h_l) for l < L,  x_L = z

`h_l` is the output of decoder layer l, d the hidden size, and z the output of the last layer behind the backbone's final
norm. The weights sum to 1.

- `w` starts at zero, so that a head starts as a head of `head_inputs: state`, to the last bit. The plain mean is
  subtracted for this. A softmax that starts on z alone would leave the other layers next to no gradient.
- Inner states have other scales than z, and a few huge elements. They are brought to z's root mean square. The final norm
  would do so too, but ZeRO-3 gathers its weight only while it runs in the backbone.
- Adam moves each parameter by about the learning rate in a step. The factor sqrt(d) lets the weights of L layers change as
  fast as a block, whose rows add up d such changes.

The output of layer l is recorded as the input of layer l + 1: it is the first argument in every architecture, while outputs
are tensors or tuples. Under gradient checkpointing too it is the tensor of the graph, so that gradients reach the backbone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..errors import LMTPError
from .trial import trial, trial_tokens


_TOKENS = 7
# Bytes of fp32 states of all layers that `mix` computes at once.
_STATE_BYTES = 64 * 2**20
_EPS = 1e-10


@dataclass
class _Recording:
    """Inner states of one forward.

    Attributes:
        states: (batch, length, hidden) inputs of the second and of each further layer.
        last: Number of positions to keep, from the last one on; None for all.
    """

    states: list[Tensor]
    last: int | None


# Of this thread: another thread may run the same model.
_recording: ContextVar[_Recording | None] = ContextVar("layer_states", default=None)


def _record(layer: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a decoder layer. Outside `recorded`, and in a compiled forward, it does nothing."""
    if torch.compiler.is_compiling() or (recording := _recording.get()) is None:
        return
    hidden = args[0] if args else kwargs.get("hidden_states")
    # A copy, because a slice would keep all positions in memory.
    recording.states.append(hidden if recording.last is None else hidden[:, -recording.last :].clone())


@contextmanager
def _recorded(count: int, last: int | None = None) -> Iterator[list[Tensor]]:
    recording = _Recording([], last)
    token = _recording.set(recording)
    try:
        yield recording.states
    finally:
        _recording.reset(token)
    if len(recording.states) != count:
        raise LMTPError(
            f"A forward ran {len(recording.states) + 1} decoder layers instead of {count + 1}, but heads of head_inputs: "
            "layers read them all: train head_inputs: state, or switch off what skips or compiles layers."
        )


@contextmanager
def recorded(model: nn.Module, last: int | None = None) -> Iterator[list[Tensor] | None]:
    """Record the inner states of one forward of the backbone inside the context, if the model's heads read them.

    Args:
        model: A model with leap heads.
        last: Number of positions to keep, from the last one on; None for all.

    Yields:
        A list that then holds the (batch, length, hidden) outputs of all decoder layers but the last; None if the heads
        do not read them.

    Raises:
        LMTPError: On exit, if the forward ran another number of layers.
    """
    config = model.leap_heads.config
    if not config.reads_layers:
        yield None
        return
    with _recorded(config.base_layers - 1, last) as states:
        yield states


def watch_layers(base: PreTrainedModel) -> None:
    """Let `recorded` see the decoder layers of `base`.

    Under ZeRO-3 every rank must call this.

    Raises:
        LMTPError: The model has a single layer, or its layers do not pass each other a hidden state of the final one's size.
    """
    name, count = type(base).__name__, base.config.get_text_config().num_hidden_layers
    if count < 2:
        raise LMTPError(f"{name} has no inner layers that head_inputs: layers could read: write head_inputs: state.")
    decoder = base.get_decoder() or base.base_model
    found = (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    hooks = [layer.register_forward_pre_hook(_record, with_kwargs=True) for layer in list(next(found, ()))[1:]]
    try:
        with trial(base), _recorded(count - 1) as states:
            ids = trial_tokens(base, 1, _TOKENS)
            final = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        fits = all(
            isinstance(state, Tensor) and state.shape == final.shape and state.is_floating_point() for state in states
        )
    except LMTPError:
        fits = False
    if not fits:
        for hook in hooks:
            hook.remove()
        raise LMTPError(
            f"The {count} decoder layers of {name} do not pass each other one state of the final one's size, which heads "
            "of head_inputs: layers read: write head_inputs: state."
        )


def mix(weights: Sequence[Tensor], final: Tensor, inner: Sequence[Tensor]) -> Tensor:
    """Compute what each head reads. Heads do not depend on each other, to the last bit.

    The backward computes the normed states again, so that a forward keeps the inner states and the result only.

    Args:
        weights: (layers,) weights of each head.
        final: (..., hidden) final hidden states.
        inner: (..., hidden) outputs of all decoder layers but the last.

    Returns:
        (heads, ..., hidden) inputs of the heads, in the dtype and on the device of `final`.
    """
    size = final.shape[-1]
    shares = torch.stack([_shares(weight, size) for weight in weights]).to(final.device)  # (heads, layers)
    rows = max(1, _STATE_BYTES // (4 * size * (len(inner) + 1)))
    parts = [state.to(final.device).reshape(-1, size).split(rows) for state in (final, *inner)]
    mixed = []
    for part in zip(*parts):  # (rows, hidden) of each layer, the final one first
        if torch.is_grad_enabled():
            mixed.append(checkpoint(_mix_rows, shares, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            mixed.append(_mix_rows(shares, *part))
    return torch.cat(mixed, dim=1).view(len(weights), *final.shape)


def _shares(weights: Tensor, size: int) -> Tensor:
    """Return the (layers,) fp32 factors of the layers' states, minus their mean: exactly 0 where all weights are equal."""
    logits = weights.float() * size**0.5
    return logits.softmax(0) - torch.zeros_like(logits).softmax(0)


def _mix_rows(shares: Tensor, final: Tensor, *inner: Tensor) -> Tensor:
    """Map (rows, hidden) states of all layers to the heads' (heads, rows, hidden) inputs, in fp32 on the way."""
    with torch.autocast(final.device.type, enabled=False):
        whole = final.float()
        scale = whole.square().mean(-1, keepdim=True).sqrt()  # (rows, 1)
        normed = F.rms_norm(torch.stack(inner).float(), final.shape[-1:], eps=_EPS) * scale
        states = torch.cat([normed, whole[None]]).flatten(1)  # (layers, rows * hidden)
        # One product a head: a joint one would round differently for another number of heads.
        return torch.stack([(whole + (share @ states).view_as(whole)).to(final.dtype) for share in shares])
