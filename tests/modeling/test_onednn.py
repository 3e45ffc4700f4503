"""fp32 products by oneDNN, against torch's own."""

import pytest
import torch
from torch import nn

from lmtp_factory.modeling import onednn


pytestmark = pytest.mark.skipif(not onednn.available(), reason="torch is built without oneDNN")


@pytest.mark.parametrize("transposed", [False, True])
def test_products(transposed):
    left = torch.randn(9, 33).t() if transposed else torch.randn(33, 9)
    right = torch.randn(17, 9).t() if transposed else torch.randn(9, 17)
    assert onednn.usable(left, right)
    torch.testing.assert_close(onednn.mm(left, right), left @ right)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    layer, inputs = nn.Linear(12, 20), torch.randn(rows, 12, requires_grad=True)
    onednn.trainable_linear(layer)(inputs).sum().backward()
    torch.testing.assert_close(layer.weight.grad, inputs.sum(0).detach().expand(20, 12))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 7)])
def test_a_linear_layer_and_its_gradients(bias, shape):
    layer, inputs = nn.Linear(12, 20, bias=bias), torch.randn(*shape, 12, requires_grad=True)
    upstream = torch.randn(*shape, 20)
    wanted = torch.autograd.grad(layer(inputs), [inputs, *layer.parameters()], upstream)
    outputs = onednn.trainable_linear(layer)(inputs)
    assert type(outputs.grad_fn).__name__ == "_LinearBackward"
    torch.testing.assert_close(outputs, layer(inputs))
    for ours, theirs in zip(torch.autograd.grad(outputs, [inputs, *layer.parameters()], upstream), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_frozen_weights_get_no_gradient():
    layer, inputs = nn.Linear(12, 20).requires_grad_(False), torch.randn(7, 12, requires_grad=True)
    onednn.trainable_linear(layer)(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, layer.weight.sum(0).expand(7, 12))
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_torch(dtype):
    layer, inputs = nn.Linear(12, 20, dtype=dtype), torch.randn(7, 12, dtype=dtype)
    assert not onednn.usable(inputs, layer.weight)
    assert torch.equal(onednn.trainable_linear(layer)(inputs), layer(inputs))
    assert torch.equal(onednn.mm(inputs, layer.weight.t()), inputs @ layer.weight.t())


def test_autocast_is_left_to_torch():
    layer, inputs = nn.Linear(12, 20), torch.randn(7, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.usable(inputs, layer.weight)
        assert onednn.trainable_linear(layer)(inputs).dtype == torch.bfloat16


def test_layers_of_other_classes_are_called():
    class Doubled(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    layer, inputs = Doubled(12, 20), torch.randn(7, 12)
    assert torch.equal(onednn.trainable_linear(layer)(inputs), layer(inputs))


def test_layers_with_hooks_are_called():
    layer, inputs, calls = nn.Linear(12, 20), torch.randn(7, 12), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    onednn.trainable_linear(layer)(inputs)
    assert calls


def test_a_models_linear_layers(monkeypatch):
    model, inputs = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5, bias=False)), torch.randn(3, 7, 12)
    wanted, calls, linear = model(inputs), [], onednn.linear

    def counted(*args):
        calls.append(args[0].shape)
        return linear(*args)

    monkeypatch.setattr(onednn, "linear", counted)
    with onednn.multiplying(model):
        with torch.no_grad():
            torch.testing.assert_close(model(inputs), wanted)
        assert calls == [(3, 7, 12), (3, 7, 20)]
        model(inputs).sum().backward()  # with gradients torch multiplies
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(inputs).dtype == torch.bfloat16
        assert len(calls) == 2 and model[0].weight.grad is not None
    assert not any("forward" in vars(layer) for layer in model)


def test_layers_are_as_before_after_an_error():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ZeroDivisionError), onednn.multiplying(model):
        raise ZeroDivisionError
    assert "forward" not in vars(model[0])
