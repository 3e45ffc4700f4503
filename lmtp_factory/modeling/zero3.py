"""Helpers for DeepSpeed ZeRO-3, which shards parameters over ranks and gathers them when a module runs."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Gather parameters on every rank inside the context. A collective operation; does nothing without ZeRO-3."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")] if is_deepspeed_zero3_enabled() else []
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


@contextmanager
def gathered_as_it_runs(model: nn.Module) -> Iterator[None]:
    """Let `model`'s forward gather parameters layer by layer, as DeepSpeed's engine does once it exists.

    Each element of a module list is gathered as a whole while it runs; other modules gather their direct parameters. A
    collective operation: every rank must run the same forward. Does nothing without ZeRO-3 or if the engine exists.
    """
    if not is_deepspeed_zero3_enabled() or _has_engine(model):
        yield
        return
    running: dict[nn.Module, AbstractContextManager] = {}

    with ExitStack() as hooks:
        for module, parameters in _units(model):

            def gather(module, args, parameters=parameters):
                running[module] = gathered(parameters)
                running[module].__enter__()

            def release(module, args, output):
                running.pop(module, nullcontext()).__exit__(None, None, None)

            hooks.callback(module.register_forward_pre_hook(gather).remove)
            # always_call: a forward that raises must release its parameters too.
            hooks.callback(module.register_forward_hook(release, always_call=True).remove)
        yield


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Yield modules with the parameters that must be gathered while their forward runs."""
    yield module, list(module.parameters(recurse=False))
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child, list(child.parameters())
        else:
            yield from _units(child)


def _has_engine(model: nn.Module) -> bool:
    from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict

    return isinstance(model._parameters, ZeROOrderedDict)


def ensure_backward_hook(hidden: Tensor) -> Tensor:
    """Make `hidden` require a gradient under ZeRO-3, so that ZeRO-3's post-backward hook fires at the right time.

    The hook is attached to the gradient of the module's input. If the input requires no gradient (stage 1, where the
    backbone is frozen), the hook fires before the weights' gradients exist, reduces zeros and releases the weights.
    """
    if is_deepspeed_zero3_enabled() and torch.is_grad_enabled() and not hidden.requires_grad:
        return hidden.requires_grad_()
    return hidden


def fetch_together(module: nn.Module, external: Iterable[nn.Parameter] = ()) -> None:
    """Let ZeRO-3 gather all parameters of `module` and its `external` parameters when its forward runs.

    By default ZeRO-3 gathers each layer when it is called. The leap loss uses its layers once per chunk, computes gradients
    in the forward, and the number of chunks changes from step to step.
    """
    if not is_deepspeed_zero3_enabled():
        return
    import deepspeed

    deepspeed.utils.set_z3_leaf_module(module, True)
    for parameter in external:
        deepspeed.zero.register_external_parameter(module, parameter)
