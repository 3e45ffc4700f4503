"""Prepacked weights: never older than the weights, gone with them, and only where memory allows."""

import ctypes

import pytest
import torch
from helpers import tiny_models
from helpers.decoding import GREEDY, enlarge_weights, prompt
from helpers.prepacked import copies_of, generates_as_stock, packable_model
from helpers.tiny_models import randomise_heads
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from lmtp_factory import attach_heads
from lmtp_factory.decoding import cpu_prepacked
from lmtp_factory.decoding.cpu_prepacked import can_prepack, int8_linear, prepacked


@pytest.fixture
def model(tmp_path):
    return packable_model(tmp_path)


def fused_adamw(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    ids = prompt(2, 12)
    model.requires_grad_(True)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)


def through_data(change):
    def edit(model):
        for parameter in model.model.layers.parameters():
            change(parameter.data)

    return edit


def raw_pointer(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    other = torch.randn(weight.shape)
    ctypes.memmove(weight.data_ptr(), other.data_ptr(), 4 * weight.numel())


def one_number(model):
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] += 40


def replaced_data(model):
    for parameter in model.model.layers.parameters():
        parameter.data = parameter.data.flip(0).clone()


CHANGES = {
    "fused AdamW": fused_adamw,
    "doubled": through_data(lambda data: data.mul_(2)),
    "negated": through_data(lambda data: data.neg_()),
    "added": through_data(lambda data: data.add_(0.3)),
    "copied": through_data(lambda data: data.copy_(data.flip(0))),
    "columns turned round": through_data(lambda data: data.copy_(data.flip(-1))),
    "raw pointer": raw_pointer,
    "one number": one_number,
    "another tensor": replaced_data,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_weights_are_used(model, change):
    before = generates_as_stock(model)
    change(model)
    assert generates_as_stock(model) != before


def test_merged_and_unmerged_adapters_are_used(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_models.save_llama(tmp_path))
    enlarge_weights(model)
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model, config)
    attach_heads(model)
    randomise_heads(model)
    model.eval()
    outputs = [generates_as_stock(model)]
    model.base_model.unmerge_adapter()  # nothing is merged: a warning, no change
    with model.disable_adapter():
        outputs.append(generates_as_stock(model))
    model.merge_adapter()
    outputs.append(generates_as_stock(model))
    model.unmerge_adapter()
    outputs.append(generates_as_stock(model))
    merged = model.merge_and_unload()
    outputs.append(generates_as_stock(merged))
    assert outputs[0] != outputs[1] and outputs[2] == outputs[4]


def test_every_changed_number_changes_the_sums():
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 8), (5, 7)):  # read in pairs, and one by one
        weight = torch.randn(shape, generator=generator)
        before = cpu_prepacked._bits(weight)
        for place in range(weight.numel()):
            changed = weight.clone()
            changed.view(torch.int32).flatten()[place] ^= 1  # its last bit
            assert not any(map(torch.equal, before, cpu_prepacked._bits(changed)))


def test_an_unchanged_model_is_packed_once(model, monkeypatch):
    packed = []
    pack = cpu_prepacked.pack
    monkeypatch.setattr(cpu_prepacked, "pack", lambda weight: packed.append(weight) or pack(weight))
    generates_as_stock(model)
    assert packed
    packed.clear()
    generates_as_stock(model)
    assert not packed
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    generates_as_stock(model)
    assert len(packed) == 1


def test_a_failure_while_packing_leaves_no_layer_packed(model, monkeypatch):
    pack, calls = cpu_prepacked.pack, []

    def fails_at_last(weight):
        calls.append(weight)
        if len(calls) == 5:
            raise MemoryError
        return pack(weight)

    monkeypatch.setattr(cpu_prepacked, "pack", fails_at_last)
    with pytest.raises(MemoryError), prepacked(model):
        pass
    assert not any("forward" in vars(module) for module in model.modules())
    assert not cpu_prepacked._users
    monkeypatch.undo()
    generates_as_stock(model)


def test_a_failure_while_generating_leaves_no_layer_packed(model):
    def fails(*_, **__):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.generate(prompt(), max_new_tokens=4, logits_processor=[fails], **GREEDY)
    assert not any("forward" in vars(module) for module in model.modules())


def test_copies_go_with_the_weights(model):
    generates_as_stock(model)
    assert all(copies_of(model))
    kept = len(cpu_prepacked._copies)
    layers = len(copies_of(model))
    model.to(torch.bfloat16)
    assert len(cpu_prepacked._copies) == kept - layers
    model.generate(prompt(), max_new_tokens=4, **GREEDY)
    assert not any(copies_of(model))


def test_gradients_flow_through_packed_layers(model):
    ids = prompt(2, 8)
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    with prepacked(model):
        model(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, expected)


def test_int8_follows_the_weight(model):
    unembedding, inputs = model.leap_heads.heads[0].unembed, torch.randn(3, 32)
    assert int8_linear(unembedding) is None  # nothing is packed outside the context
    with torch.no_grad():
        for _ in range(2):
            with prepacked(model):
                exact, rough = nn.functional.linear(inputs, unembedding.weight), int8_linear(unembedding)(inputs)
            assert not torch.equal(exact, rough)
            assert (exact - rough).norm() < 0.02 * exact.norm()
            unembedding.weight.data.copy_(unembedding.weight.data.flip(0))


def test_int8_rows_follow_weight_and_choice():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(32, 48), torch.randn(3, 32)
    with torch.no_grad():
        for rows in ([1, 5, 40], [0, 2, 47], [1, 5, 40]):
            rows = torch.tensor(rows)
            for _ in range(2):
                with prepacked(nn.Sequential(layer)):
                    exact, rough = layer(inputs)[:, rows], int8_linear(layer, rows)(inputs)
                # Other rows, or those of the weight before, would be wrong by more than the outputs themselves.
                assert (exact - rough).norm() < 0.1 * exact.norm()
                layer.weight.data.copy_(layer.weight.data.flip(0))


def test_int8_keeps_the_bias():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(32, 48), torch.randn(3, 32)
    with torch.no_grad():
        layer.bias.normal_(std=10.0)
        with prepacked(nn.Sequential(layer)):
            exact, rough = layer(inputs), int8_linear(layer)(inputs)
            assert not torch.equal(exact, rough)
            assert (exact - rough).norm() < 0.02 * (exact - layer.bias).norm()
            layer.bias.neg_()  # the copy of the weight stays
            assert (layer(inputs) - int8_linear(layer)(inputs)).norm() < 0.02 * (exact + layer.bias).norm()


def test_layers_are_not_packed_under_autocast_or_for_a_compiled_forward(model):
    assert not can_prepack(model, compiled=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_prepack(model)
    assert can_prepack(model)


def test_a_model_without_room_is_not_packed(model, monkeypatch):
    weights = sum(4 * layer.weight.numel() for layer in cpu_prepacked._linears(model))
    monkeypatch.setattr(cpu_prepacked, "free_memory", lambda: 2 * weights - 1)
    assert not can_prepack(model)
    monkeypatch.setattr(cpu_prepacked, "free_memory", lambda: 2 * weights)
    assert can_prepack(model)
    monkeypatch.setattr(cpu_prepacked, "free_memory", lambda: None)
    assert not can_prepack(model)
