"""fp32 matrix products on a CPU by oneDNN.

torch multiplies fp32 matrices with MKL, which chooses slower kernels on CPUs that are not Intel's. oneDNN, which is part of
torch too, uses AVX-512 there as well (benchmarks/README.md).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def agrees(product: Callable[[Tensor, Tensor], Tensor], atol: float = 1e-4) -> bool:
    """Return whether torch can compute a product of inputs and weight, and it agrees with an ordinary matmul.

    Operators of oneDNN are private to torch and missing in some builds. No random numbers are drawn.
    """
    weight, inputs = torch.arange(24 * 16).sin().view(24, 16), torch.arange(3 * 16).cos().view(3, 16)
    try:
        return torch.allclose(product(inputs, weight), inputs @ weight.T, atol=atol)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


@cache
def available() -> bool:
    """Return whether torch has oneDNN's linear layer."""
    return agrees(linear)


def usable(inputs: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN should multiply these matrices: both are fp32 on a CPU, and autocast would not cast them.

    Neither is empty, and neither is a tensor of another class, such as a sharded one.
    """
    for tensor in (inputs, weight):
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not tensor.numel():
            return False
        if type(tensor) not in (Tensor, nn.Parameter):
            return False
    return not torch.is_autocast_enabled("cpu") and available()


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `inputs @ weight.T + bias`, without gradients.

    Args:
        inputs: (..., in) fp32.
        weight: (out, in) fp32, of any strides or packed by oneDNN.
        bias: (out,) fp32, or None.
    """
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def mm(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (n, k) by (k, m), by oneDNN if it is `usable`; without gradients."""
    return linear(left, right.t()) if usable(left, right) else left @ right


class _Linear(torch.autograd.Function):
    """A linear layer whose forward and backward use oneDNN."""

    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.save_for_backward(inputs, weight)
        return linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])  # (rows, out)
        of_inputs = mm(rows, weight).view_as(inputs) if needs_inputs else None
        of_weight = mm(rows.t(), inputs.reshape(-1, inputs.shape[-1])) if needs_weight else None
        return of_inputs, of_weight, rows.sum(0) if needs_bias else None


def trainable_linear(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return a function that computes `layer` with gradients, by oneDNN where it is `usable`."""

    def forward(inputs: Tensor) -> Tensor:
        if _is_plain(layer) and usable(inputs, layer.weight):
            return _Linear.apply(inputs, layer.weight, layer.bias)
        return layer(inputs)

    return forward


@contextmanager
def multiplying(model: nn.Module) -> Iterator[None]:
    """Let oneDNN multiply in the linear layers of `model` inside the context, where they need no gradient.

    For a frozen backbone that reads many tokens at once. For few, see `decoding.cpu_prepacked`.
    """
    layers = [layer for layer in model.modules() if _is_plain(layer)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Map (..., in) inputs to (..., out) outputs."""
    if torch.is_grad_enabled() or not usable(inputs, layer.weight):
        return nn.Linear.forward(layer, inputs)
    return linear(inputs, layer.weight, layer.bias)


def _is_plain(layer: nn.Module) -> bool:
    """Return whether calling the layer does nothing beyond `nn.Linear.forward`."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is nn.Linear and "forward" not in vars(layer) and not hooks
