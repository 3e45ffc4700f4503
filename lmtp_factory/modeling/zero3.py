"""DeepSpeed ZeRO-3: parameters that exist only in shards until they are gathered."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Whole parameters inside the context, on every rank. A collective operation; does nothing without ZeRO-3."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")] if is_deepspeed_zero3_enabled() else []
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, sharded or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def fetch_together(module: nn.Module, external: Iterable[nn.Parameter] = ()) -> None:
    """Let ZeRO-3 fetch ``module``'s whole subtree, and ``external`` parameters it reads, when its forward runs.

    By default each leaf is fetched on its own call; a head's loss calls its layers once a chunk, and the number of
    chunks differs from step to step, which would throw DeepSpeed's prefetch trace away every time.
    """
    if not is_deepspeed_zero3_enabled():
        return
    import deepspeed

    deepspeed.utils.set_z3_leaf_module(module, True)
    for parameter in external:
        deepspeed.zero.register_external_parameter(module, parameter)
