"""The fast GRU against torch's own, in float64 by definition and in float32 as it runs."""

import pytest
import torch
from torch import nn

import products
from gru import product, product_of_transposed
from weight_drop import WeightDrop, call_recurrent, drop_weight


def twins(dtype, sizes=(5, 7)):
    """A layer as the model calls it, and one with the same weights as torch does."""
    a, b = WeightDrop(nn.GRU(*sizes), []).to(dtype), nn.GRU(*sizes).to(dtype)
    b.load_state_dict(a.module.state_dict())
    return a, b


def everything(layer, steps, rows, dtype, with_state=True):
    """Outputs and all gradients of a random function of all outputs."""
    torch.manual_seed(1)
    inner = getattr(layer, "module", layer)
    x = torch.randn(steps, rows, inner.input_size, dtype=dtype, requires_grad=True)
    h = torch.randn(1, rows, inner.hidden_size, dtype=dtype, requires_grad=True)
    out, last = layer(x, h) if with_state else layer(x)
    loss = (out * torch.randn_like(out)).sum() + (last * torch.randn_like(last)).sum()
    loss.backward()
    leaves = [x, *([h] if with_state else []), *layer.parameters()]
    return [out.detach(), last.detach()] + [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (4, 3), (30, 2)])
@pytest.mark.parametrize("with_state", [True, False])
def test_outputs_and_gradients_are_torchs(dtype, rtol, steps, rows, with_state):
    a, b = twins(dtype)
    found = everything(a, steps, rows, dtype, with_state)
    expected = everything(b, steps, rows, dtype, with_state)
    assert len(found) == len(expected)
    for f, e in zip(found, expected):
        assert f.shape == e.shape
        torch.testing.assert_close(f, e, rtol=rtol, atol=rtol * float(e.abs().max()))


def test_at_a_size_where_kernels_block_and_thread():
    a, b = twins(torch.float32, (130, 270))
    for f, e in zip(everything(a, 9, 20, torch.float32), everything(b, 9, 20, torch.float32)):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))


def test_gradients_are_the_derivatives():
    layer = nn.GRU(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *weights):
        return call_recurrent(layer, dict(zip(names, weights)), x)

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_without_gradients_it_computes_the_same():
    a, b = twins(torch.float32)
    x = torch.randn(6, 3, 5)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            torch.testing.assert_close(a(x)[0], b(x)[0])


def test_the_dropped_weights_are_what_is_computed_with():
    """Weight drop swaps the parameter for a call; the raw one gets the gradient."""
    layer = WeightDrop(nn.GRU(5, 7), ["weight_hh_l0"], dropout=0.5)
    twin = nn.GRU(5, 7)
    twin.load_state_dict(layer.module.state_dict())
    x = torch.randn(4, 3, 5)
    torch.manual_seed(3)
    out = layer(x)[0]
    torch.manual_seed(3)
    dropped = drop_weight(layer.module.weight_hh_l0, 0.5).detach()
    with torch.no_grad():
        twin.weight_hh_l0.copy_(dropped)
    torch.testing.assert_close(out, twin(x)[0])
    out.sum().backward()
    gradient = layer.module.weight_hh_l0.grad
    assert torch.equal(gradient == 0, dropped == 0)


def test_a_second_backward_gives_the_same_gradients():
    a, b = twins(torch.float32)
    for layer in (a, b):
        out = layer(torch.ones(4, 3, 5))[0].sum()
        out.backward(retain_graph=True)
        out.backward()
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_products_are_plain_products():
    x, w, bias = torch.randn(11, 30), torch.randn(13, 30), torch.randn(13)
    torch.testing.assert_close(product(x, w), x @ w.t())
    torch.testing.assert_close(product(x, w, bias), x @ w.t() + bias)
    torch.testing.assert_close(product_of_transposed(x, x), x.t() @ x)


def test_without_onednn_it_is_the_same(monkeypatch):
    a, b = twins(torch.float32)
    monkeypatch.setattr(products, "has_onednn", lambda tensor: False)
    for f, e in zip(everything(a, 5, 3, torch.float32), everything(b, 5, 3, torch.float32)):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("options", [
    {"num_layers": 2}, {"bidirectional": True}, {"batch_first": True}, {"bias": False}
])
def test_other_layers_are_torchs_own(options):
    layer = nn.GRU(5, 7, **options)
    x = torch.randn(4, 3, 5)
    for found, expected in zip(WeightDrop(layer, [])(x), layer(x)):
        torch.testing.assert_close(found, expected)


def test_elsewhere_it_is_torchs_own(monkeypatch):
    called = []
    gru = torch.gru
    monkeypatch.setattr(torch, "gru", lambda *args: called.append(args) or gru(*args))
    with torch.device("meta"):
        assert WeightDrop(nn.GRU(5, 7), [])(torch.empty(4, 3, 5))[0].shape == (4, 3, 7)
    assert len(called) == 1
