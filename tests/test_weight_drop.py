"""Weight drop: what the layer computes with, its gradient, and its rate."""

import copy
import math

import pytest
import torch
from torch import nn

from weight_drop import WeightDrop, drop_weight


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_it_is_torchs_layer_with_the_dropped_weights(kind, bidirectional):
    """Outputs and gradients; a weight that was dropped has none."""
    names = ["weight_hh_l0", "weight_hh_l0_reverse"][: 1 + bidirectional]
    module = kind(5, 7, bidirectional=bidirectional)
    layer, twin = WeightDrop(module, names, dropout=0.4), copy.deepcopy(module)
    x = torch.randn(6, 3, 5)
    torch.testing.assert_close(layer.eval()(x), module(x))
    torch.manual_seed(1)
    found = layer.train()(x)[0]
    torch.manual_seed(1)
    raw = module.state_dict()
    twin.load_state_dict(raw | {name: drop_weight(raw[name], 0.4) for name in names})
    expected = twin(x)[0]
    torch.testing.assert_close(found, expected)
    found.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for name, dropped in twin.named_parameters():
        scale = dropped / raw[name]  # 0, or 1 / (1 - rate) where it was kept
        assert scale.all() == (name not in names)
        torch.testing.assert_close(module.get_parameter(name).grad, dropped.grad * scale)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("sizes", [(5, 7), (8, 9), (3, 8)])
def test_padding_changes_nothing(kind, sizes, monkeypatch):
    """Outputs, states and gradients, although torch's kernel sees larger sizes."""
    monkeypatch.setattr("weight_drop.has_recurrent_layer", lambda *_: False)
    seen = []
    kernel = getattr(torch, kind.__name__.lower())
    monkeypatch.setattr(
        torch, kind.__name__.lower(),
        lambda x, *rest: (seen.append((x.size(2), rest[1][1].size(1))), kernel(x, *rest))[1],
    )
    module = kind(*sizes).double()
    plain = WeightDrop(module, ["weight_hh_l0"], dropout=0.5)
    padded = WeightDrop(module, ["weight_hh_l0"], dropout=0.5, pad_to=8)
    x = torch.randn(6, 3, sizes[0], dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 3, sizes[1], dtype=torch.float64, requires_grad=True)
    state = (h, h) if kind is nn.LSTM else h
    found = []
    for layer in (plain, padded):
        torch.manual_seed(1)
        output, last = layer(x, state)
        last = torch.cat(last) if kind is nn.LSTM else last
        total = output.sin().sum() + last.cos().sum()
        found.append([output, last, *torch.autograd.grad(total, [x, h, *module.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert seen == [sizes, (-(-sizes[0] // 8) * 8, -(-sizes[1] // 8) * 8)]


@pytest.mark.parametrize("rate", [0.5, 0.2, 0.35])
def test_the_rate_at_each_position_modulo_4(rate):
    """Four draws share one random word: each must have the right rate, and its own."""
    dropped = drop_weight(torch.ones(1000, 1001), rate) == 0
    n = dropped.numel() // 4
    groups = dropped.flatten()[: 4 * n].view(n, 4).double() - rate
    variance = rate * (1 - rate)
    assert groups.mean(dim=0).abs().max() < 5 * math.sqrt(variance / n)
    covariance = (groups[:, :3] * groups[:, 1:]).mean(dim=0)
    assert covariance.abs().max() < 5 * variance / math.sqrt(n)


def test_it_is_finite_at_any_rate():
    assert drop_weight(torch.ones(100, 100), 0.999999).isfinite().all()


def test_variational_drops_whole_rows_and_not_in_evaluation():
    module = nn.Linear(50, 200, bias=False)
    layer = WeightDrop(module, ["weight"], dropout=0.5, variational=True)
    dropped = layer(torch.eye(50)).T  # the weight that the call saw
    rows = (dropped != 0).any(dim=1)
    assert 60 < rows.sum() < 140
    torch.testing.assert_close(dropped[rows], module.weight[rows] * 2)
    torch.testing.assert_close(layer.eval()(torch.eye(50)).T, module.weight)


def test_layers_in_two_directions_are_not_padded():
    layer, x = nn.LSTM(5, 7, bidirectional=True), torch.randn(6, 3, 5)
    torch.testing.assert_close(WeightDrop(layer, [], pad_to=8)(x), layer(x))
