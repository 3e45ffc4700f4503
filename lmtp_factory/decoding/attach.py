"""`attach_heads` and `load_model` of the public API: leap heads together with look-back decoding."""

import functools

from torch import nn

from .. import modeling
from .compat import check_transformers
from .mixin import LookBackDecoding


@functools.wraps(modeling.attach_heads)
def attach_heads(model: nn.Module, *args, **kwargs) -> nn.Module:
    check_transformers()
    base = modeling.base_of(model)
    if isinstance(vars(base).get("generate"), functools.partial):
        del base.generate  # set by an export's custom_generate/ under trust_remote_code
    return modeling.attach_heads(model, *args, mixins=(LookBackDecoding,), **kwargs)


@functools.wraps(modeling.load_model)
def load_model(path: str, **from_pretrained_kwargs) -> nn.Module:
    return modeling.load_model(path, attach=attach_heads, **from_pretrained_kwargs)
