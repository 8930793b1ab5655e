"""The mathematics of training against its definitions: windows, steps, evaluation."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from conftest import arguments, make_params
from data import batchify, get_batch
from model import RNNModel
from splitcross import SplitCrossEntropyLoss
from train import Average, OPTIMIZERS, Objective, evaluate, make_optimizer, random_seq_len, train_step
from model import activation_regularization
from utils import loss_columns, perplexity


# ---------------------------------------------------------------- windows


def test_random_seq_len_distribution():
    lengths = np.array([random_seq_len(70) for _ in range(40_000)])
    short = lengths < 52  # 3.5 deviations from either mean
    assert short.mean() == pytest.approx(0.05, abs=5 * math.sqrt(0.05 * 0.95 / 40_000))
    # int() cuts half a token off on average.
    assert lengths[~short].mean() == pytest.approx(69.5, abs=0.15)
    assert lengths[~short].std() == pytest.approx(5, rel=0.03)
    assert lengths[short].mean() == pytest.approx(34.5, abs=0.6)
    assert lengths[short].std() == pytest.approx(5, rel=0.1)
    assert lengths.max() <= 95


def test_random_seq_len_bounds(monkeypatch):
    assert min(random_seq_len(3) for _ in range(200)) == 5
    monkeypatch.setattr(np.random, "normal", lambda mean, deviation: mean + 100 * deviation)
    assert random_seq_len(70) == 95


# ---------------------------------------------------------------- one step


def test_activation_regularization_values():
    raw, out = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    r, o = raw.double().numpy(), out.double().numpy()
    ar = sum(v * v for v in o.flat) / o.size
    tar = sum((b - a) ** 2 for x, y in pairwise(r) for a, b in zip(x.flat, y.flat)) / (4 * 12)
    assert float(activation_regularization(raw, out, 2, 0)) == pytest.approx(2 * ar, rel=1e-5)
    assert float(activation_regularization(raw, out, 0, 3)) == pytest.approx(3 * tar, rel=1e-5)
    assert float(activation_regularization(raw, out, 2, 1)) == pytest.approx(2 * ar + tar, rel=1e-5)
    assert activation_regularization(raw, out, 0, 0) == 0
    one_step = activation_regularization(raw[:1], out[:1], 0, 1)
    assert float(one_step) == 0


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "biLSTM", "biLM"])
def test_the_biases_below_the_decoder_have_a_rate_of_their_own(kind):
    params = make_params(kind, splits=(20, 30), attention="none" if "bi" in kind else "combined")
    optimizer = make_optimizer(params, arguments(lr=4.0, bias_lr=0.5))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(params.parameters()))
    for name, parameter in params.named_parameters():
        slow = ".bias" in name and name not in ("0.decoder.bias", "1.tail_bias")
        assert rates[id(parameter)] == (2.0 if slow else 4.0), name
    assert set(rates.values()) == {2.0, 4.0}


@pytest.mark.parametrize(("clip", "share"), [(0.0, 1.0), (0.05, 1.0), (0.05, 0.25)])
def test_a_step_is_the_update_of_the_paper(clip, share):
    """w <- w - lr * L / bptt * (clipped gradient of NLL + AR + TAR, + wdecay * w), in float64.

    The rate of the recurrent layers' biases is a share of lr.
    """
    params = make_params(splits=(20, 30), dtype=torch.float64)
    nn.init.normal_(params[1].tail_vectors)
    args = arguments(clip=clip, wdecay=0.01, bptt=10, lr=3.0, bias_lr=share)
    words, targets = torch.randint(50, (7, 4)), torch.randint(50, (28,))
    before = {name: p.detach().clone() for name, p in params.named_parameters()}

    # The same loss from parts that the step does not use: logprob, and plain means.
    model, criterion = params
    output, _, raw, dropped = model(words, model.init_hidden(4), return_h=True)
    nll = -criterion.logprob(model.decoder.weight, model.decoder.bias, output)[
        torch.arange(28), targets
    ].mean()
    ar, tar = (dropped[-1] ** 2).mean(), ((raw[-1][1:] - raw[-1][:-1]) ** 2).mean()
    names = list(before)
    gradients = torch.autograd.grad(nll + 2 * ar + tar, list(params.parameters()))
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    scale = min(1.0, clip / norm) if clip else 1.0
    assert clip == 0 or scale < 1
    rates = [2.1 * share if "rnns" in n and "bias" in n else 2.1 for n in names]
    expected = {
        n: before[n] - rate * (g * scale + 0.01 * before[n])
        for n, g, rate in zip(names, gradients, rates)
    }

    optimizer = make_optimizer(params, args)
    loss, _ = train_step(Objective(params), optimizer, words, targets, model.init_hidden(4), args)
    assert loss.item() == pytest.approx(nll.item())  # without AR and TAR
    for name, parameter in params.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7)
    assert [group["lr"] for group in optimizer.param_groups] == [3.0, 3.0 * share]
    assert not torch.equal(params[1].tail_vectors, before["1.tail_vectors"])  # criterion's too


def test_adam_takes_its_own_kind_of_step():
    params = make_params()
    optimizer = make_optimizer(params, arguments(optimizer="adam", lr=1e-3))
    before = params[0].decoder.bias.detach().clone()
    words, targets = torch.randint(50, (10, 4)), torch.randint(50, (40,))
    hidden = params[0].init_hidden(4)
    train_step(Objective(params), optimizer, words, targets, hidden, arguments(alpha=0, beta=0))
    moved = (params[0].decoder.bias - before).abs()
    torch.testing.assert_close(moved.max(), torch.tensor(1e-3), rtol=1e-2, atol=0)


def test_the_average_is_the_mean_of_the_iterates():
    params = make_params(splits=(20, 30))
    params[0].encoder.weight.grad = torch.ones_like(params[0].encoder.weight)
    average, iterates = Average(params), []
    for _ in range(4):
        for weight in params.parameters():
            torch.nn.init.normal_(weight.data)
        average.update(params)
        iterates.append([weight.detach().double() for weight in params.parameters()])
    for mean, *weights in zip(average.params.parameters(), *iterates):
        torch.testing.assert_close(mean.double(), torch.stack(weights).mean(0), rtol=0, atol=1e-6)
        assert mean.grad is None


def test_the_averages_recurrent_weights_are_flattened(monkeypatch):
    """Each in its own piece of memory cuDNN would copy, and warn of, at every call."""
    params, flattened = make_params(), []
    monkeypatch.setattr(
        torch.nn.RNNBase, "flatten_parameters", lambda layer: flattened.append(layer)
    )
    average = Average(params)
    assert flattened == [rnn.module for rnn in average.params[0].rnns]


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "biLSTM"])
def test_a_step_on_the_meta_device(rnn_type, monkeypatch):
    """Every tensor of a step is where the model is: nothing is left on the CPU by accident."""
    with torch.device("meta"):
        params = make_params(rnn_type, rate=0.3)
    args = arguments(device=torch.device("meta"))
    source = batchify(torch.randint(50, (200,)), 4, args)
    words, targets = get_batch(source, 0, args)
    assert words.device.type == targets.device.type == "meta"
    hidden = params[0].init_hidden(4)
    averaged = Average(params)
    for kind in OPTIMIZERS:
        args.optimizer = kind
        optimizer = make_optimizer(params, args)
        loss, hidden = train_step(Objective(params), optimizer, words, targets, hidden, args)
        averaged.update(params)
        tensors = [loss, *hidden] if rnn_type == "GRU" else [loss, *(t for h in hidden for t in h)]
        tensors += list(params.parameters()) + [p.grad for p in params.parameters()]
        assert {t.device.type for t in tensors} == {"meta"}
    seen = []
    real = RNNModel.forward

    def forward(self, words, hidden, **kwargs):
        seen.append(words.device.type)
        return real(self, words, hidden, **kwargs)

    monkeypatch.setattr(RNNModel, "forward", forward)
    monkeypatch.setattr(SplitCrossEntropyLoss, "forward", lambda self, w, b, output, targets: (
        seen.extend([output.device.type, targets.device.type]) or torch.zeros(())
    ))
    evaluate(params, torch.randint(50, (101,)), 10, 4)
    assert set(seen) == {"meta"}


# ---------------------------------------------------------------- evaluation


class Unigram(nn.Module):
    """A hand-made model whose distribution is fixed: logits are the decoder's bias."""

    def __init__(self, probabilities):
        super().__init__()
        self.encoder = nn.Embedding(len(probabilities), 1)
        self.decoder = nn.Linear(1, len(probabilities))
        nn.init.zeros_(self.decoder.weight)
        self.decoder.bias.data = torch.tensor(probabilities).log()

    def init_hidden(self, bsz):
        return []

    def forward(self, input, hidden):
        return input.new_zeros(input.numel(), 1, dtype=torch.float32), hidden


@pytest.mark.parametrize("n", [2, 11, 83, 100])
@pytest.mark.parametrize("bsz", [1, 10])
def test_perplexity_of_a_hand_made_unigram_model(n, bsz):
    probabilities = [0.5, 0.25, 0.125, 0.125]
    ids = torch.randint(4, (n,))
    loss = evaluate(nn.ModuleList([Unigram(probabilities), SplitCrossEntropyLoss(1)]), ids, bsz, 7)
    expected = math.fsum(-math.log(probabilities[i]) for i in ids[1:]) / (n - 1)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert perplexity(loss) == pytest.approx(math.exp(expected), rel=1e-6)


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU"])
def test_evaluation_is_the_token_by_token_definition(rnn_type):
    params = make_params(rnn_type, rate=0.5, splits=(20, 30))
    for parameter in params.parameters():
        nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(50, (64,))
    found = evaluate(params, ids, 1, 10)
    assert found == pytest.approx(evaluate(params, ids, 1, 63), rel=1e-5)
    model, criterion = copy.deepcopy(params).double()
    hidden, total = model.init_hidden(1), 0.0
    for word, target in pairwise(ids):
        output, hidden = model(word.view(1, 1), hidden)
        logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, output)
        total -= logprob[0, target].item()
    assert found == pytest.approx(total / 63, rel=1e-5)
    # Ten columns start with no context, so the result differs, but every token is still counted.
    tokens = []
    real = SplitCrossEntropyLoss.forward
    counting = nn.ModuleList([params[0], criterion.float()])
    criterion.forward = lambda *a: tokens.append(len(a[3])) or real(criterion, *a)
    evaluate(counting, ids, 10, 4)
    assert sum(tokens) == 63


def test_perplexity_overflow_prints_inf():
    assert perplexity(1000) == math.inf
    assert "inf" in loss_columns(1000)


def test_functional_swap_is_seen_by_this_torch():
    """What weight drop relies on: nn.LSTM computes with the weights that functional_call gives."""
    lstm = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    zeroed = functional_call(lstm, {"weight_hh_l0": torch.zeros(16, 4)}, (x,))[0]
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    torch.testing.assert_close(zeroed, lstm(x)[0])
