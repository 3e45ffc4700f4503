"""The auxiliary loss of a mixture of experts: the model's own, from the forward that gives the hidden states."""

import pytest
import torch
from helpers import tiny_models

from lmtp_factory.modeling.router import router_coefficient, states_and_router_loss


IDS = torch.randint(20, 200, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("build", [tiny_models.mixtral, tiny_models.qwen3_moe], ids=lambda build: build.__name__)
def test_states_and_loss_are_the_models_own(build):
    model = build(output_router_logits=True, router_aux_loss_coef=0.25)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    states, loss = states_and_router_loss(model, model.forward, inputs)
    theirs = model(**inputs, labels=IDS)
    torch.testing.assert_close(loss, theirs.aux_loss)
    torch.testing.assert_close(states, model.base_model(**inputs).last_hidden_state)
    assert router_coefficient(model) == 0.25
    plain = model(**inputs).logits
    next_token = torch.nn.functional.cross_entropy(plain[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(theirs.loss, next_token + 0.25 * loss)
    assert not model.base_model._forward_hooks


def test_without_router_logits_or_experts_there_is_no_loss():
    assert router_coefficient(tiny_models.mixtral(router_aux_loss_coef=0.25)) == 0.0
    assert router_coefficient(tiny_models.llama()) == 0.0


def test_an_error_in_the_forward_leaves_no_hook():
    model = tiny_models.mixtral(output_router_logits=True)
    with pytest.raises(IndexError):
        states_and_router_loss(model, model.forward, {"input_ids": IDS + 10_000})
    assert not model.base_model._forward_hooks
