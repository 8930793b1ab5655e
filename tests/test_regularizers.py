"""Each regularizer against a float64 restatement: it acts, it is absent, gradients arrive."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

import weight_drop
from embed_regularize import embedded_dropout
from locked_dropout import LockedDropout
from weight_drop import WeightDrop, drop_weight


def restated(kind, weights, x, reverse=False):
    """One recurrent layer in float64, written from its equations. x [T, B, I] -> [T, B, H]."""
    w_ih, w_hh, b_ih, b_hh = (w.detach().double() for w in weights)
    h = c = torch.zeros(x.size(1), w_hh.size(1), dtype=torch.float64)
    outputs = []
    for step in reversed(x.double()) if reverse else x.double():
        a, b = step @ w_ih.T + b_ih, h @ w_hh.T + b_hh
        if kind is nn.LSTM:
            i, f, g, o = (a + b).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, dim=1), b.chunk(3, dim=1)
            r, z = (a_r + b_r).sigmoid(), (a_z + b_z).sigmoid()
            h = (1 - z) * (a_n + r * b_n).tanh() + z * h
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs)


@pytest.fixture
def recorded(monkeypatch):
    """Records what drop_weight returns: {id of the raw parameter: the dropped copy}."""
    seen = {}

    def record(weight, *args):
        seen[id(weight)] = dropped = drop_weight(weight, *args)
        if dropped.requires_grad:
            dropped.retain_grad()
        return dropped

    monkeypatch.setattr(weight_drop, "drop_weight", record)
    return seen


NAMES = ["weight_hh_l0", "weight_hh_l0_reverse"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_weight_drop_is_what_the_kernel_computes_with(kind, bidirectional, recorded):
    module = kind(5, 7, bidirectional=bidirectional)
    layer = WeightDrop(module, NAMES[: 1 + bidirectional], dropout=0.4)
    x = torch.randn(6, 3, 5)
    for training in (True, False, True):  # it comes back after evaluation, and goes again
        recorded.clear()
        output = layer.train(training)(x)[0]
        expected = []
        for suffix in ["", "_reverse"][: 1 + bidirectional]:
            weights = [
                getattr(module, f"{name}_l0{suffix}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            if training:
                dropped = recorded[id(weights[1])]
                kept = dropped != 0
                assert 0 < kept.double().mean() < 1
                torch.testing.assert_close(dropped[kept], weights[1][kept] / 0.6, rtol=1e-4, atol=0)
                weights[1] = dropped
            expected.append(restated(kind, weights, x, reverse=bool(suffix)))
        assert bool(recorded) == training
        torch.testing.assert_close(
            output.double(), torch.cat(expected, dim=2), rtol=0, atol=1e-6
        )


def test_weight_drop_gradient_reaches_the_raw_weight_and_is_zero_where_dropped(recorded):
    module = nn.LSTM(5, 7)
    layer = WeightDrop(module, NAMES[:1], dropout=0.5)
    layer(torch.randn(6, 3, 5))[0].pow(2).sum().backward()
    raw, dropped = module.weight_hh_l0, recorded[id(module.weight_hh_l0)]
    assert raw.is_leaf and dict(layer.named_parameters())["module.weight_hh_l0"] is raw
    kept = dropped != 0
    assert (raw.grad[~kept] == 0).all() and (~kept).any()
    assert (raw.grad[kept] != 0).all()
    torch.testing.assert_close(raw.grad[kept], dropped.grad[kept] * 2)
    assert all((p.grad != 0).any() for p in module.parameters())


def test_weight_drop_spares_the_first_time_step():
    """The first hidden state is zero, so what multiplies it does not matter; the second's does."""
    layer = WeightDrop(nn.LSTM(5, 7), NAMES[:1], dropout=0.5)
    x = torch.randn(3, 2, 5)
    difference = (layer(x)[0] - layer(x)[0]).abs().amax(dim=(1, 2))
    assert difference[0] == 0
    assert (difference[1:] > 0).all()


@pytest.mark.parametrize("rate", [0.5, 0.2, 0.35])
def test_weight_drop_rate_at_each_position_modulo_4(rate):
    """Four draws share one random word: each must have the right rate, and its own."""
    dropped = drop_weight(torch.ones(1000, 1001), rate) == 0
    n = dropped.numel() // 4
    deviation = 5 * math.sqrt(rate * (1 - rate) / n)
    groups = dropped.flatten()[: 4 * n].view(n, 4).double()
    assert (groups.mean(dim=0) - rate).abs().max() < deviation
    covariance = (groups[:, :3] - rate).mul(groups[:, 1:] - rate).mean(dim=0)
    assert covariance.abs().max() < 5 * rate * (1 - rate) / math.sqrt(n)


def test_weight_drop_keeps_the_expectation_and_differs_from_call_to_call():
    weight = torch.randn(400, 500)
    first, second = drop_weight(weight, 0.3), drop_weight(weight, 0.3)
    assert ((first == 0) != (second == 0)).any()
    assert drop_weight(torch.ones(1000, 1000), 0.3).mean() == pytest.approx(1, abs=5e-3)
    assert torch.isfinite(drop_weight(weight, 0.999999)).all()


def test_variational_weight_drop_drops_whole_rows_and_not_in_evaluation():
    module = nn.Linear(50, 200, bias=False)
    layer = WeightDrop(module, ["weight"], dropout=0.5, variational=True)
    dropped = layer(torch.eye(50)).T  # the weight that the call saw
    rows = (dropped != 0).any(dim=1)
    assert 60 < rows.sum() < 140
    torch.testing.assert_close(dropped[rows], module.weight[rows] * 2)
    torch.testing.assert_close(layer.eval()(torch.eye(50)).T, module.weight)


def test_weight_drop_leaves_nothing_behind():
    """No dropped weight outlives its graph, and the layer can be copied (as averaging does)."""
    module = nn.LSTM(5, 7)
    layer = WeightDrop(module, NAMES[:1], dropout=0.5)
    alive = []
    original = weight_drop.drop_weight
    try:
        weight_drop.drop_weight = lambda *a: alive.append(weakref.ref(d := original(*a))) or d
        output = layer(torch.randn(2, 2, 5))[0]
    finally:
        weight_drop.drop_weight = original
    output.sum().backward()
    del output
    gc.collect()
    assert [ref() for ref in alive] == [None]
    twin = copy.deepcopy(layer).eval()
    x = torch.randn(2, 2, 5)
    torch.testing.assert_close(twin(x)[0], layer.eval()(x)[0])


@pytest.mark.parametrize("scaled", [False, True])
def test_embedded_dropout_is_a_masked_embedding_matrix(scaled):
    embed = nn.Embedding(40, 6)
    words = torch.randint(40, (30, 8))
    scale = torch.rand(40, 1) + 0.5 if scaled else None
    looked_up = embedded_dropout(embed, words, dropout=0.3, scale=scale)
    # What remains of each word's row, one factor a word: the mask.
    factor = looked_up / embed(words)
    if scaled:
        factor = factor / scale[words]
    mask = torch.full((40,), math.nan)
    mask[words] = factor[..., 0]
    present = ~mask.isnan()
    assert ((mask[present] == 0) | torch.isclose(mask[present], torch.tensor(1 / 0.7))).all()
    assert 0 < (mask[present] == 0).sum() < present.sum()
    masked = embed.weight.double() * torch.nan_to_num(mask).double()[:, None]
    expected = (masked * scale.double() if scaled else masked)[words]
    torch.testing.assert_close(looked_up.double(), expected, rtol=1e-5, atol=1e-7)
    # The gradient reaches the embedding, and is zero for the words that were dropped.
    looked_up.sum().backward()
    assert ((embed.weight.grad != 0).any(dim=1) == (torch.nan_to_num(mask) != 0)).all()


def test_embedded_dropout_rate_and_absence():
    embed = nn.Embedding(20000, 2)
    words = torch.arange(20000)
    dropped = (embedded_dropout(embed, words, dropout=0.1) == 0).all(dim=1).double()
    assert dropped.mean() == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 20000))
    assert torch.equal(embedded_dropout(embed, words, dropout=0), embed(words))


def test_locked_dropout_is_one_mask_for_all_time_steps():
    x = torch.randn(9, 300, 200, requires_grad=True)
    dropout = LockedDropout()
    y = dropout(x, 0.4)
    mask = (y / x).detach()
    assert (mask == mask[0]).logical_or((mask - mask[0]).abs() < 1e-5).all()  # along time
    dropped = mask[0] == 0
    assert dropped.double().mean() == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / 60000))
    assert dropped.any(dim=0).all() and not dropped.all(dim=0).any()  # each column has its own
    expected = x.double() * (~dropped).double() / 0.6
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=0)
    y.sum().backward()
    assert ((x.grad == 0) == dropped).all()
    assert dropout(x, 0) is x
    assert dropout.eval()(x, 0.4) is x
    assert (dropout.train()(x, 0.4) == 0).any()
