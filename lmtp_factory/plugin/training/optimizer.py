"""A learning rate of the leap heads' own (`head_learning_rate`): parameter groups beside those of the other parameters."""

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import nn
from transformers import TrainerCallback

from ...errors import LMTPError


# Prefixes of `optim` whose optimizers transformers does not build from parameter groups, and what their keyword arguments
# hold instead.
_UNGROUPED = ("galore", "apollo", "lomo", "adalomo")
_UNGROUPED_ARGUMENTS = {"params", "model", "optimizer_dict"}


def check_rate_key(stage: int, training_args, finetuning_args) -> None:
    """Check the learning rates that the heads would get, before anything loads.

    Raises:
        LMTPError: The run cannot honour `head_learning_rate`, or LoRA+ would train a part of the heads with another rate.
    """
    if finetuning_args.loraplus_lr_ratio is not None:
        raise LMTPError(
            "loraplus_lr_ratio would also multiply the learning rate of the heads' biases: leave it out, or tune with it in "
            "stage: sft."
        )
    rate = finetuning_args.head_learning_rate
    if rate is None:
        return
    if stage == 1:
        raise LMTPError(
            f"Stage 1 trains only the heads, so head_learning_rate: {rate:g} stands beside no other: write learning_rate: "
            f"{rate:g} instead."
        )
    for obstacle in _obstacles(training_args, finetuning_args):
        raise LMTPError(
            f"head_learning_rate does not go with {obstacle}, because its optimizer has one learning rate for all: leave "
            "one of them out."
        )


def _obstacles(training_args, finetuning_args) -> Iterator[str]:
    """Yield what keeps the optimizer from a learning rate for some parameters only, in YAML's words."""
    for key in ("use_galore", "use_apollo", "use_adam_mini", "use_muon"):
        if getattr(finetuning_args, key):
            yield key
    optim = getattr(training_args.optim, "value", training_args.optim)
    if optim.startswith(_UNGROUPED):
        yield f"optim: {optim}"
    deepspeed = getattr(training_args, "hf_deepspeed_config", None)
    for section in ("optimizer", "scheduler"):  # DeepSpeed's own know one learning rate
        if deepspeed is not None and section in deepspeed.config:
            yield f'the section "{section}" of the deepspeed configuration'


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    heads: nn.Module,
    head_learning_rate: float,
    weight_decay: float,
    decayed: Collection[str],
) -> list[dict]:
    """Return the optimizer's groups: parameters with and without weight decay, then those of the heads likewise.

    The heads come last, because the Trainer logs the learning rate of the first group.

    Args:
        parameters: Names and parameters of the model. Those without gradients are left out.
        heads: The leap heads, a part of the model.
        head_learning_rate: Learning rate of the heads.
        weight_decay: Weight decay of the `decayed` parameters.
        decayed: Names of parameters with weight decay.
    """
    of_heads, decayed = set(heads.parameters()), set(decayed)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (is_head, decays): [] for is_head in (False, True) for decays in (True, False)
    }
    for name, parameter in parameters:
        if parameter.requires_grad:
            groups[parameter in of_heads, name in decayed].append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if decays else 0.0}
        | ({"lr": head_learning_rate} if is_head else {})
        for (is_head, decays), members in groups.items()
        if members
    ]


def with_groups(optimizer_class: type, arguments: dict, groups: list[dict]) -> tuple[type, dict]:
    """Return a class and keyword arguments, as the Trainer's `optimizer_cls_and_kwargs` holds them, with groups of our own.

    Raises:
        LMTPError: The optimizer is not built from parameter groups.
    """
    is_class = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
    if not is_class or _UNGROUPED_ARGUMENTS & arguments.keys():
        raise LMTPError(
            f"head_learning_rate does not go with {getattr(optimizer_class, '__name__', optimizer_class)}, which takes no "
            "parameter groups: leave it out, or write optim: adamw_torch."
        )
    return optimizer_class, arguments | {"params": groups}


class HeadRate(TrainerCallback):
    """Reads the heads' learning rate after each step, when the Trainer reads the one that it logs.

    Attributes:
        logs: The entry of the log.
    """

    def __init__(self):
        self.logs: dict[str, float] = {}

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs) -> None:
        self.logs = {"head_learning_rate": float(optimizer.param_groups[-1]["lr"])}


def check_rates(optimizer: torch.optim.Optimizer, heads: nn.Module, head_learning_rate: float) -> None:
    """Check that the optimizer that was built trains every parameter of the heads with their rate.

    Raises:
        LMTPError: It does not.
    """
    with_rate = {p for group in optimizer.param_groups if group["lr"] == head_learning_rate for p in group["params"]}
    if not set(heads.parameters()) <= with_rate:
        raise LMTPError(
            f"The optimizer does not train the leap heads with head_learning_rate: {head_learning_rate}: leave the key out, "
            "or run lmtp-cli doctor."
        )
