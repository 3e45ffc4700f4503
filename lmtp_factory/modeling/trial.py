"""Running a model on a few tokens to learn what it does, and leaving it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .zero3 import gathered_as_it_runs


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode and without gradients, able to run before training has set it up.

    Attributes of every module are afterwards what they were: training flags, and what a forward notes on itself (Qwen-VL
    its last positions). Under ZeRO-3 a forward is a collective operation: every rank has to run it.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        model.eval()  # no dropout, hence no random numbers
        with torch.no_grad(), _autocast(model), gathered_as_it_runs(model):
            yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def trial_tokens(base: PreTrainedModel, rows: int, length: int) -> Tensor:
    """(rows, length) token ids, different ones as far as the vocabulary goes, where ``base`` takes its input."""
    count = torch.arange(1, 1 + rows * length) % base.config.get_text_config().vocab_size
    return count.view(rows, length).to("cpu" if base.device.type == "meta" else base.device)


def other_words(base: PreTrainedModel, ids: Tensor) -> Tensor:
    """A different token in place of each of ``ids``. A vocabulary of two words is enough."""
    size = base.config.get_text_config().vocab_size
    return (ids + size // 2) % size


def _autocast(model: nn.Module) -> torch.autocast:
    """On where trainable fp32 layers stand in a half-precision model: their forward needs it, and the Trainer's has it."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    half = dtypes & {torch.bfloat16, torch.float16}
    device = next((p.device.type for p in model.parameters() if p.device.type != "meta"), "cpu")
    dtype = torch.float16 if half == {torch.float16} else torch.bfloat16
    return torch.autocast(device, dtype=dtype, enabled=bool(half) and torch.float32 in dtypes)
