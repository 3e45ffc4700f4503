"""Only models whose logits are their LM head on their final hidden states get leap heads; the proof leaves no trace."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers.tiny_models import MULTIPLIED, PLAIN, bert, gemma3, granite, llama, llama4, llama4_image_text, opt, qwen_vl
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from lmtp_factory import LMTPConfig, LMTPError, attach_heads
from lmtp_factory.modeling.attach import fresh_heads
from lmtp_factory.modeling.logits_proof import prove_logits


def batch(rows=2, length=11):
    ids = torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_models_pass(name, dtype):
    prove_logits(PLAIN[name]().to(dtype).train())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MULTIPLIED)
def test_multiplied_logits_are_refused(name, dtype):
    model = MULTIPLIED[name]().to(dtype)
    with pytest.raises(LMTPError, match=f"{type(model).__name__} changes its LM head's logits"):
        attach_heads(model, stage=2)
    assert not hasattr(model, "leap_heads")


@pytest.mark.parametrize("scale", [1e-6, 0.0])
def test_a_model_that_says_nothing_yet_is_still_told_apart(scale):
    for model, refused in ((granite(8.0), True), (granite(1.0), False)):
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        if refused:
            with pytest.raises(LMTPError, match="changes its LM head's logits"):
                prove_logits(model)
        else:
            prove_logits(model)


def test_a_soft_cap_that_the_configuration_does_not_name_is_refused():
    class Capped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 30 * torch.tanh(output.logits / 30)  # of an untrained model's logits it leaves all digits
            return output

    with pytest.raises(LMTPError, match="Capped changes its LM head's logits"):
        prove_logits(Capped(llama().config))


def test_logits_scaled_in_place_are_refused():
    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits *= 0.5
            return output

    with pytest.raises(LMTPError, match="Scaled changes its LM head's logits"):
        prove_logits(Scaled(llama().config))


def test_states_changed_before_the_lm_head_are_refused():
    class Scaled(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 4,))

    with pytest.raises(LMTPError, match="What the LM head of Scaled reads is not its backbone's last_hidden_state"):
        prove_logits(Scaled(llama().config))
    with pytest.raises(LMTPError, match="What the LM head of BertLMHeadModel reads"):
        prove_logits(bert())


@pytest.mark.parametrize("make", [llama4, llama4_image_text])
def test_models_without_a_backbone_are_refused(make):
    model = make()
    with pytest.raises(LMTPError, match=rf"{type(model).__name__} has no backbone .* use another base model"):
        attach_heads(model, stage=2)


def test_models_that_cannot_run_are_refused():
    class Broken(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            raise RuntimeError("no kernel for this device\nand more")

    with pytest.raises(LMTPError, match=r"Broken cannot run on 7 tokens of text.*\(no kernel for this device\)"):
        prove_logits(Broken(llama().config))
    with pytest.raises(LMTPError, match="LlamaForCausalLM has no weights yet"):
        prove_logits(llama().to("meta"))
    headless = llama()
    headless.lm_head = None
    with pytest.raises(LMTPError, match="has no LM head"):
        prove_logits(headless)


def test_a_vocabulary_of_two_words_is_enough():
    prove_logits(llama(vocab_size=2))


@pytest.mark.parametrize(
    "make", [gemma3, qwen_vl, lambda: llama(attention_dropout=0.5)], ids=["gemma3", "qwen-vl", "llama"]
)
def test_the_proof_leaves_the_model_as_it_was(make):
    model = make()
    model.train()
    model.base_model.eval()  # a mixture
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    next(model.parameters()).requires_grad_(False)
    states = [
        lambda: {name: module.training for name, module in model.named_modules()},
        lambda: {name: (p.requires_grad, p.grad, p.dtype) for name, p in model.named_parameters()},
        lambda: {name: sorted(vars(module)) for name, module in model.named_modules()},
        lambda: {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        },
        lambda: {name: value for name, value in vars(model.base_model).items() if name == "rope_deltas"},
        lambda: torch.get_rng_state().tolist(),
    ]
    before, weights = [state() for state in states], copy.deepcopy(model.state_dict())
    prove_logits(model)
    assert [state() for state in states] == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_refusal_leaves_the_model_as_it_was():
    model = granite(8.0).train()
    with pytest.raises(LMTPError):
        prove_logits(model)
    assert all(module.training and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("target", ["all-linear", "lm_head"])
def test_adapters_are_looked_through(target):
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=["lm_head"] if target == "lm_head" else None
    )
    attach_heads(get_peft_model(llama(), config), stage=2)
    with pytest.raises(LMTPError, match="GraniteForCausalLM changes"):
        attach_heads(get_peft_model(granite(8.0), config), stage=2)


def test_fp32_layers_that_are_trained_in_a_half_precision_model():
    model = get_peft_model(llama().bfloat16(), LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    attach_heads(model, stage=2)


def test_an_lm_head_in_8_bits_is_proved():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for model, refused in ((llama(), False), (granite(8.0), True)):
        dense = model.lm_head
        model.lm_head = bitsandbytes.nn.Linear8bitLt(32, model.vocab_size, bias=False, has_fp16_weights=False)
        model.lm_head.load_state_dict(dense.state_dict())
        model.lm_head.to("cpu")  # quantises
        if refused:
            with pytest.raises(LMTPError, match="GraniteForCausalLM changes"):
                prove_logits(model)
        else:
            attach_heads(model, LMTPConfig(head_kind="shared"))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_weights_that_accelerate_keeps_elsewhere(where, tmp_path):
    def offloaded(model):
        return cpu_offload(model) if where == "memory" else disk_offload(model, str(tmp_path / "offload"))

    model = llama()
    lm_head = model.lm_head.weight.detach().clone()
    attach_heads(offloaded(model))
    assert model.lm_head.weight.device.type == "meta"
    assert all(torch.equal(head.unembed.weight, lm_head) for head in model.leap_heads.heads)
    hidden = model.final_hidden_states(**{"input_ids": batch()["input_ids"]})
    assert torch.equal(model.leap_heads.logits(hidden, model.lm_head)[0], nn.functional.linear(hidden, lm_head))
    with pytest.raises(LMTPError, match="GraniteForCausalLM changes"):
        attach_heads(offloaded(granite(8.0)))


def test_an_lm_head_that_cannot_be_brought_is_refused():
    model = llama()
    model.lm_head.to("meta")
    with pytest.raises(LMTPError, match="The weights of Linear, the LM head, are not loaded .* head_kind: shared"):
        fresh_heads(model, LMTPConfig())


def test_opt_projects_its_states_to_the_width_of_its_embeddings():
    model = attach_heads(opt(), LMTPConfig(num_heads=1), stage=2)
    assert model.leap_heads.config.hidden_size == 16
    outputs = model(**batch())
    outputs.loss.backward()
    torch.testing.assert_close(outputs.losses[0], opt()(**batch()).loss)
    ids = batch(1)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    stock = model.eval().generate(ids, lmtp_decode="off", **options)
    assert torch.equal(model.generate(ids, lmtp_decode="backward", **options), stock)
    with pytest.raises(LMTPError, match="hidden size 16"):
        attach_heads(llama(), heads=model.leap_heads)
