"""Prepacked weights in several threads: none waits for a pass over weights, none reads another's half-made ones."""

import threading

import pytest
import torch
from helpers.decoding import CHAIN, GREEDY, prompt
from helpers.prepacked import copies_of, generates_as_stock, packable_model
from torch import nn

from lmtp_factory.decoding import cpu_prepacked
from lmtp_factory.decoding.cpu_prepacked import can_prepack, int8_linear, prepacked


@pytest.fixture
def model(tmp_path):
    return packable_model(tmp_path)


def test_a_change_while_another_thread_generates_is_seen_by_the_next_call(model):
    with prepacked(model):  # as inside the other thread's generate
        model.model.layers[0].mlp.up_proj.weight.data.mul_(1.7)
        ours = model.generate(prompt(), max_new_tokens=16, lmtp_tree=CHAIN, **GREEDY)
    assert not any("forward" in vars(module) for module in model.modules())
    assert ours.tolist() == generates_as_stock(model)


def test_contexts_in_threads_and_inside_each_other(model):
    inner_done = threading.Event()

    def work():
        with prepacked(model.model):
            pass
        inner_done.set()

    with prepacked(model):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert inner_done.is_set()
        assert all(cpu_prepacked._is_prepacked(layer) for layer in cpu_prepacked._linears(model))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.fixture
def entering(model, monkeypatch):
    """A thread that stands still in the middle of its pass over the weights; `go_on` lets it finish."""
    bits, is_in, go_on = cpu_prepacked._bits, threading.Event(), threading.Event()

    def slow(weight):
        if threading.current_thread() is thread:
            is_in.set()
            assert go_on.wait(60)
        return bits(weight)

    def enter():
        with prepacked(model):
            pass

    thread = threading.Thread(target=enter)
    thread.go_on = go_on

    def start():
        monkeypatch.setattr(cpu_prepacked, "_bits", slow)
        thread.start()
        assert is_in.wait(60)
        return thread

    yield start
    go_on.set()
    if thread.ident is not None:
        thread.join(60)


def test_running_generations_do_not_wait_for_one_that_begins(model, entering):
    unembedding, inputs, done = model.leap_heads.heads[0].unembed, torch.randn(3, 32), threading.Event()

    def run():
        with torch.no_grad():
            int8_linear(unembedding)(inputs)
            int8_linear(unembedding, torch.tensor([1, 5]))(inputs)
        context.__exit__(None, None, None)
        assert can_prepack(model)
        done.set()

    context = prepacked(model)
    context.__enter__()
    other = entering()
    runner = threading.Thread(target=run)
    runner.start()
    assert done.wait(60)
    other.go_on.set()
    runner.join(60)
    other.join(60)
    assert not other.is_alive() and not any("forward" in vars(module) for module in model.modules())


def test_threads_that_enter_at_once_pack_once(model, entering, monkeypatch):
    packed, pack = [], cpu_prepacked.pack
    monkeypatch.setattr(cpu_prepacked, "pack", lambda weight: packed.append(weight) or pack(weight))
    first = entering()

    def enter():
        with prepacked(model):
            ready.set()

    ready, second = threading.Event(), threading.Thread(target=enter)
    second.start()
    assert not ready.wait(0.2)  # the first packs for both
    first.go_on.set()
    second.join(60)
    first.join(60)
    assert len(packed) == len(cpu_prepacked._linears(model)) and all(copies_of(model))
    assert not cpu_prepacked._users and not any("forward" in vars(module) for module in model.modules())


def test_a_weight_that_changes_while_it_is_packed_is_packed_again(model, monkeypatch):
    weight, pack = model.model.layers[0].mlp.up_proj.weight, cpu_prepacked.pack

    def late(packed):
        if packed.data_ptr() == weight.data_ptr():
            weight.data.mul_(1.5)  # by another thread
            monkeypatch.undo()
        return pack(packed)

    monkeypatch.setattr(cpu_prepacked, "pack", late)
    with prepacked(model):
        pass
    old = cpu_prepacked._kept(model.model.layers[0].mlp.up_proj)
    generates_as_stock(model)
    assert cpu_prepacked._kept(model.model.layers[0].mlp.up_proj) is not old


def test_a_thread_that_leaves_takes_no_layer_from_one_that_enters(monkeypatch):
    """Whether a forward is there and whether it is ours is one question, or it may be gone between the two."""

    class ReadOnce(dict):
        """Attributes of a layer whose forward another thread removes after the first look at it."""

        def get(self, name, default=None):
            return self.pop(name, default) if name == "forward" else super().get(name, default)

        def __contains__(self, name):
            found = super().__contains__(name)
            if name == "forward":
                self.pop(name, None)
            return found

    layer = nn.Linear(4, 4)
    with prepacked(nn.Sequential(layer)):
        monkeypatch.setattr(cpu_prepacked, "vars", lambda one: ReadOnce(one.__dict__), raising=False)
        assert cpu_prepacked._linears(nn.Sequential(layer)) == [layer]
        monkeypatch.undo()
    layer.forward = lambda inputs: inputs  # as accelerate does
    assert not cpu_prepacked._linears(nn.Sequential(layer))
