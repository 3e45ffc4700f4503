"""DeepSpeed ZeRO-3: parameters that exist only in shards until they are gathered."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Whole parameters inside the context, on every rank. A collective operation; does nothing without ZeRO-3."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")] if is_deepspeed_zero3_enabled() else []
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


@contextmanager
def gathered_as_it_runs(model: nn.Module) -> Iterator[None]:
    """Inside the context ``model``'s forward gathers what it comes to, layer by layer, as DeepSpeed's engine will later.

    A layer of a module list is gathered whole while it runs, of all other modules their own parameters. A collective
    operation: every rank has to run the same forward. Does nothing without ZeRO-3, or once the engine is there.
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
            # Called after an error too, so that a model which refuses its input is sharded again.
            hooks.callback(module.register_forward_hook(release, always_call=True).remove)
        yield


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules with the parameters that their forward needs."""
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
    """``hidden`` such that ZeRO-3's hook after a head's backward runs after it.

    The hook hangs on the gradient of the module's input. Where the input needs none (stage 1: the backbone is frozen)
    it would fire before the weights' gradients are there, reduce zeros and shard the weights away.
    """
    if is_deepspeed_zero3_enabled() and torch.is_grad_enabled() and not hidden.requires_grad:
        return hidden.requires_grad_()
    return hidden


def fetch_together(module: nn.Module, external: Iterable[nn.Parameter] = ()) -> None:
    """Let ZeRO-3 fetch ``module``'s whole subtree, and ``external`` parameters it reads, when its forward runs.

    By default each layer is fetched on its own call. The leap loss uses its layers once a chunk and takes gradients right
    there, and the number of chunks differs from step to step.
    """
    if not is_deepspeed_zero3_enabled():
        return
    import deepspeed

    deepspeed.utils.set_z3_leaf_module(module, True)
    for parameter in external:
        deepspeed.zero.register_external_parameter(module, parameter)
