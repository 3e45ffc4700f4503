"""Trial forwards: running a model on a few tokens to test a property, without changing its state."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .zero3 import gathered_as_it_runs


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode without gradients, and make it runnable before the Trainer has prepared it.

    On exit the attributes of every module are restored: training flags, and values that a forward stores on the module
    (Qwen-VL stores positions). Under ZeRO-3 a forward is a collective operation: every rank must run it.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        model.eval()  # without dropout no random numbers are drawn
        with torch.no_grad(), _autocast(model), gathered_as_it_runs(model):
            yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def trial_tokens(base: PreTrainedModel, rows: int, length: int) -> Tensor:
    """Return (rows, length) consecutive token ids, modulo the vocabulary size, on the model's device."""
    count = torch.arange(1, 1 + rows * length) % base.config.get_text_config().vocab_size
    return count.view(rows, length).to("cpu" if base.device.type == "meta" else base.device)


def other_tokens(base: PreTrainedModel, ids: Tensor) -> Tensor:
    """Replace each token id by a different one. A vocabulary of two tokens is enough."""
    size = base.config.get_text_config().vocab_size
    return (ids + size // 2) % size


def _autocast(model: nn.Module) -> torch.autocast:
    """Return an autocast context, enabled if a half-precision model has fp32 layers, as under the Trainer."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    half = dtypes & {torch.bfloat16, torch.float16}
    device = next((p.device.type for p in model.parameters() if p.device.type != "meta"), "cpu")
    dtype = torch.float16 if half == {torch.float16} else torch.bfloat16
    return torch.autocast(device, dtype=dtype, enabled=bool(half) and torch.float32 in dtypes)
