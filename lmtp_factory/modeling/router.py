"""The auxiliary load-balancing loss of mixture-of-experts models."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def router_coefficient(base: PreTrainedModel) -> float:
    """Return the weight of the auxiliary loss in the model's training loss, or 0 if the model does not add it.

    transformers adds the loss if `output_router_logits` is set. The coefficient is an attribute of the model or of its
    configuration.
    """
    config = base.config.get_text_config()
    if not (getattr(base.config, "output_router_logits", False) or getattr(config, "output_router_logits", False)):
        return 0.0
    names = ("router_aux_loss_coef", "aux_loss_coef")
    found = [getattr(owner, name) for owner in (base, config) for name in names if hasattr(owner, name)]
    return float(found[0] or 0.0) if found else 0.0


def states_and_router_loss(base: PreTrainedModel, forward: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Compute the final hidden states and the auxiliary loss in one forward.

    The forward is the model's, because every architecture has its own formula for the loss. It also computes logits; to
    save memory it does so at one position only.

    Args:
        base: The model.
        forward: The model's forward without leap heads.
        inputs: Arguments of `forward`, without labels.

    Returns:
        (batch, length, hidden) final hidden states; the unweighted scalar loss, or None if the class computes none.
    """
    states: list[Tensor] = []
    hook = base.base_model.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    try:
        output = forward(**inputs, use_cache=False, output_router_logits=True, logits_to_keep=1, return_dict=True)
    finally:
        hook.remove()
    return states[0], getattr(output, "aux_loss", None)
