"""Leap heads on a model, with the decoder that uses them: what `from lmtp_factory import attach_heads` gives."""

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
        del base.generate  # what an export's custom_generate/ put on the instance, with trust_remote_code
    return modeling.attach_heads(model, *args, mixins=(LookBackDecoding,), **kwargs)


@functools.wraps(modeling.load_model)
def load_model(path: str, **from_pretrained_kwargs) -> nn.Module:
    return modeling.load_model(path, attach=attach_heads, **from_pretrained_kwargs)
