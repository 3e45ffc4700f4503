"""What a model with leap heads feeds its backbone, and copies of such a model."""

import copy
import io
import pickle

import pytest
import torch
from helpers.tiny_models import gemma3, gpt2, llama
from peft import LoraConfig, get_peft_model

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.modeling import heads_of
from lmtp_factory.modeling.model import LeapModel


def batch():
    ids = torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_gpt2_reads_what_it_reads_without_heads():
    inputs = batch()
    plain, model = gpt2()(**inputs), attach_heads(gpt2(), stage=2)
    assert model.token_types == ()
    torch.testing.assert_close(model(**inputs).losses[0], plain.loss)
    states = model.final_hidden_states(input_ids=inputs["input_ids"])
    assert torch.equal(model.lm_head(states), plain.logits)


def test_token_types_that_are_given_are_passed_on():
    inputs = batch() | {"token_type_ids": torch.ones(2, 11, dtype=torch.long)}
    torch.testing.assert_close(attach_heads(gpt2(), stage=2)(**inputs).losses[0], gpt2()(**inputs).loss)


def test_gemma3_trains_without_token_types():
    inputs = batch()
    expected = gemma3()(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"])).loss
    model = attach_heads(gemma3(), stage=2).train()
    assert model.token_types == ("token_type_ids",)
    torch.testing.assert_close(model(**inputs).losses[0], expected)


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "torch": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("stage", [None, 1, 2])
@pytest.mark.parametrize("how", COPIES)
def test_copies(how, stage):
    model = attach_heads(llama(), LMTPConfig(offsets=(2, 4)), stage=stage, head_weight=0.3)
    with torch.no_grad():
        for parameter in model.leap_heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model._compiled_backbone = ("options", lambda: None)  # which pickle cannot write
    other = COPIES[how](model)
    assert isinstance(other, LeapModel) and type(other) is type(model)
    assert (other.leap_stage, other.head_weight, other.training) == (stage, 0.3, model.training)
    assert other._compiled_backbone is None and model._compiled_backbone is not None
    inputs = batch()
    assert torch.equal(other(**inputs).loss, model(**inputs).loss)
    ids = inputs["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(other.generate(ids, **options), model.generate(ids, **options))
    with torch.no_grad():
        other.leap_heads.heads[0].blocks[0].leap_proj.bias.add_(1.0)
    assert not torch.equal(
        other.leap_heads.heads[0].blocks[0].leap_proj.bias, model.leap_heads.heads[0].blocks[0].leap_proj.bias
    )


def test_copies_behind_peft():
    model = get_peft_model(llama(), LoraConfig(target_modules="all-linear"))
    attach_heads(model, stage=2)
    other, inputs = copy.deepcopy(model), batch()
    assert heads_of(other) is not heads_of(model)
    assert torch.equal(other(**inputs).loss, model(**inputs).loss)


def test_a_subclass_is_copied_as_itself():
    model = attach_heads(llama())
    model.__class__ = type("Changed", (type(model),), {})
    assert type(copy.deepcopy(model)) is type(model)
