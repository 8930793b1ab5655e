"""Weight drop: what the layer computes with, its gradient, its rate, and that nothing is left."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

import weight_drop
from weight_drop import WeightDrop, drop_weight

NAMES = ["weight_hh_l0", "weight_hh_l0_reverse"]


@pytest.fixture
def recorded(monkeypatch):
    """What drop_weight returns, in a list."""
    seen = []

    def record(*args):
        seen.append(drop_weight(*args))
        seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(weight_drop, "drop_weight", record)
    return seen


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_it_is_torchs_layer_with_the_dropped_weights(kind, bidirectional, recorded):
    names = NAMES[: 1 + bidirectional]
    module, twin = (kind(5, 7, bidirectional=bidirectional) for _ in range(2))
    layer, twin = WeightDrop(module, names, dropout=0.4), twin.double()
    x = torch.randn(6, 3, 5)
    for training in (True, False, True):  # it comes back after evaluation, and goes again
        recorded.clear()
        output = layer.train(training)(x)[0]
        assert len(recorded) == len(names) * training
        weights = module.state_dict()
        for name, dropped in zip(names, recorded):
            kept = dropped != 0
            assert 0 < kept.double().mean() < 1
            torch.testing.assert_close(dropped[kept], weights[name][kept] / 0.6, rtol=1e-4, atol=0)
            weights[name] = dropped
        twin.load_state_dict(weights)
        torch.testing.assert_close(output.double(), twin(x.double())[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_gradient_reaches_the_raw_weight_and_is_zero_where_it_was_dropped(kind, recorded):
    module = kind(5, 7)
    layer = WeightDrop(module, NAMES[:1], dropout=0.5)
    layer(torch.randn(6, 3, 5))[0].pow(2).sum().backward()
    raw, [dropped] = module.weight_hh_l0, recorded
    assert raw.is_leaf and dict(layer.named_parameters())["module.weight_hh_l0"] is raw
    kept = dropped != 0
    assert not kept.all()
    assert torch.equal(raw.grad != 0, kept)
    torch.testing.assert_close(raw.grad[kept], dropped.grad[kept] * 2)
    assert all(p.grad.any() for p in module.parameters())


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


def test_it_leaves_nothing_behind(recorded):
    """No dropped weight outlives its graph, and the layer can be copied (as averaging does)."""
    layer = WeightDrop(nn.LSTM(5, 7), NAMES[:1], dropout=0.5)
    x = torch.randn(2, 2, 5)
    layer(x)[0].sum().backward()
    dropped = weakref.ref(recorded.pop())
    gc.collect()
    assert dropped() is None
    torch.testing.assert_close(copy.deepcopy(layer).eval()(x)[0], layer.eval()(x)[0])
