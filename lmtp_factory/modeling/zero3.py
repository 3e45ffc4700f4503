"""DeepSpeed ZeRO-3: parameters that exist only in shards until they are gathered."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

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


def hookable(hidden: Tensor) -> Tensor:
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
