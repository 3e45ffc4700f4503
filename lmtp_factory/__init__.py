"""Leap multi-token prediction (L-MTP) for Hugging Face causal LMs and for LLaMA-Factory.

Attributes are loaded on first use. torch's extension autoload imports this package at the end of every `import torch`, so
importing it must be fast and must not import transformers.
"""

from importlib import import_module


__version__ = "0.1.0"

_EXPORTS = {
    "LMTPConfig": "lmtp_factory.config",
    "LMTPError": "lmtp_factory.errors",
    "LeapHeads": "lmtp_factory.modeling",
    "attach_heads": "lmtp_factory.decoding",
    "load_model": "lmtp_factory.decoding",
}

__all__ = ["LMTPConfig", "LMTPError", "LeapHeads", "attach_heads", "geometry", "load_model"]


def __getattr__(name: str):
    if name == "geometry":
        return import_module("lmtp_factory.geometry")
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
