"""The auxiliary loss of mixture-of-experts models, which keeps the router from favouring few experts."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def router_coefficient(base: PreTrainedModel) -> float:
    """The weight of the auxiliary loss in the model's own training loss; 0 where that has none.

    transformers adds the loss where `output_router_logits` is set, and a model that keeps the coefficient itself reads
    its own attribute, else its configuration.
    """
    config = base.config.get_text_config()
    if not (getattr(base.config, "output_router_logits", False) or getattr(config, "output_router_logits", False)):
        return 0.0
    names = ("router_aux_loss_coef", "aux_loss_coef")
    found = [getattr(owner, name) for owner in (base, config) for name in names if hasattr(owner, name)]
    return float(found[0] or 0.0) if found else 0.0


def states_and_router_loss(base: PreTrainedModel, forward: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Final hidden states and the model's own auxiliary loss, from one forward.

    The loss comes from the model's own forward, because every architecture has its own formula; logits are computed at a
    single position, since that forward insists on some.

    Args:
        forward: the model's forward without leap heads.
        inputs: its arguments, no labels among them.

    Returns:
        (batch, length, hidden) states; the unweighted scalar loss, None where this class computes none.
    """
    states: list[Tensor] = []
    hook = base.base_model.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    try:
        output = forward(**inputs, use_cache=False, output_router_logits=True, logits_to_keep=1, return_dict=True)
    finally:
        hook.remove()
    return states[0], getattr(output, "aux_loss", None)
