"""Whether a model keeps documents apart that share a row and differ by their positions alone."""

import sys

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from .lmtp import LeapModel


# Lengths of the two documents that are tried.
_FIRST, _SECOND = 17, 23


@torch.no_grad()
def keeps_documents_apart(base: LeapModel) -> bool:
    """Tried on the model itself: does the second document of a row change with the tokens of the first?

    transformers' own models take borders from positions; code that comes with a checkpoint, and layers with a running
    state, may not.

    Args:
        base: a causal LM with leap heads. Under ZeRO-3, where it cannot run by itself, its code is looked at instead.
    """
    if is_deepspeed_zero3_enabled():
        config = base.config.get_text_config()
        stateful = any(
            "attention" not in kind or "linear" in kind for kind in getattr(config, "layer_types", None) or ()
        )
        return not stateful and hasattr(sys.modules[type(base.base_model).__module__], "create_causal_mask")
    ids = torch.arange(1, 1 + _FIRST + _SECOND, device=base.device).unsqueeze(0)
    other_ids = ids.clone()
    other_ids[:, :_FIRST] += _FIRST + _SECOND
    positions = torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)]).to(base.device).unsqueeze(0)
    second = [base.final_hidden_states(input_ids=part, position_ids=positions)[:, _FIRST:] for part in (ids, other_ids)]
    return torch.equal(*second)
