"""Models whose weights are packed, and what they have to generate."""

from torch import nn
from transformers import AutoModelForCausalLM

from helpers import tiny_models
from helpers.decoding import CHAIN, GREEDY, assert_as_stock, enlarge_weights, prompt
from helpers.tiny_models import randomise_heads
from lmtp_factory import attach_heads
from lmtp_factory.decoding import cpu_prepacked
from lmtp_factory.decoding.cpu_prepacked import can_prepack


def packable_model(path):
    """A tiny model with leap heads, in fp32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models.save_llama(path)).eval()
    enlarge_weights(model)
    attach_heads(model)
    randomise_heads(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    assert can_prepack(model)
    return model


def generates_as_stock(model):
    return assert_as_stock(model, prompt(), max_new_tokens=16, lmtp_tree=CHAIN, **GREEDY)[0].tolist()


def copies_of(model):
    return [cpu_prepacked._kept(layer) for layer in model.modules() if type(layer) is nn.Linear]
