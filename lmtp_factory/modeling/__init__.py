"""Leap heads for a causal LM: modules, loss, attaching, saving and loading. Depends on torch and transformers only."""

from transformers import AutoConfig, AutoModel

from ..config import LMTPConfig
from .attach import attach_heads
from .checkpoint import load_heads, save_heads
from .heads import LeapHeads
from .load import load_model
from .model import LeapOutput, base_of, heads_of


AutoConfig.register(LMTPConfig.model_type, LMTPConfig, exist_ok=True)
AutoModel.register(LMTPConfig, LeapHeads, exist_ok=True)

__all__ = [
    "LMTPConfig",
    "LeapHeads",
    "LeapOutput",
    "attach_heads",
    "base_of",
    "heads_of",
    "load_heads",
    "load_model",
    "save_heads",
]
