"""The training loop against its definitions: windows, steps, averages, trigger, evaluation."""

import copy
import math
from argparse import Namespace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import train
from data import Corpus, InputError, get_batch
from model import RNNModel
from splitcross import SplitCrossEntropyLoss
from train import (
    activation_regularization, evaluate, fit, make_optimizer, nonmonotone, perplexity,
    random_seq_len, train_epoch, train_step,
)
from utils import read_checkpoint


def arguments(**changes):
    return Namespace(**{
        "lr": 5.0, "clip": 0.25, "epochs": 3, "batch_size": 4, "bptt": 10, "alpha": 2.0,
        "beta": 1.0, "wdecay": 1.2e-6, "nonmono": 5, "log_interval": 10, "optimizer": "sgd",
        "when": [-1], "device": torch.device("cpu"), "save": None, "resume": "", **changes,
    })


def make_params(rnn_type="LSTM", ntoken=50, rate=0.0, splits=(), dtype=None):
    model = RNNModel(rnn_type, ntoken, 8, 12, 2, rate, rate, rate, rate, rate, tie_weights=True)
    return nn.ModuleList([model, SplitCrossEntropyLoss(8, splits)]).to(dtype)


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


def test_an_epoch_trains_on_every_token_once(monkeypatch):
    source = torch.arange(46).view(23, 2) % 50
    seen, last = [], set()
    monkeypatch.setattr(
        train, "get_batch", lambda *a, **k: seen.append(get_batch(*a, **k)) or seen[-1]
    )
    for seed in range(30):
        np.random.seed(seed)
        seen.clear()
        params = make_params()
        loss, _ = train_epoch(
            params, make_optimizer(params, arguments()), source, arguments(bptt=5), 1
        )
        assert torch.equal(torch.cat([words for words, _ in seen]), source[:-1])
        assert torch.equal(torch.cat([targets for _, targets in seen]), source[1:].flatten())
        assert math.isfinite(loss)
        assert all(p.isfinite().all() for p in params.parameters())
        last.add(len(seen[-1][0]))
    assert 1 in last  # a last window of one step was among them


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU"])
def test_the_hidden_state_is_carried_from_window_to_window_without_its_history(
    rnn_type, monkeypatch
):
    forward, states = RNNModel.forward, []

    def recorded(self, words, hidden, **kwargs):
        result = forward(self, words, hidden, **kwargs)
        states.append((hidden, result[1]))
        return result

    monkeypatch.setattr(RNNModel, "forward", recorded)
    params = make_params(rnn_type)
    source = torch.randint(50, (60, 3))
    train_epoch(params, make_optimizer(params, arguments()), source, arguments(), 1)

    def tensors(hidden):
        return [t for state in hidden for t in ([state] if rnn_type == "GRU" else state)]

    assert len(states) > 3
    assert not any(t.any() for t in tensors(states[0][0]))
    for (_, left), (taken, _) in pairwise(states):
        for a, b in zip(tensors(left), tensors(taken)):
            assert torch.equal(a, b)
            assert b.any()
            assert a.requires_grad
            assert not b.requires_grad


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


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_step_is_the_update_of_the_paper(clip):
    """w <- w - lr * L / bptt * (clipped gradient of NLL + AR + TAR, + wdecay * w), in float64."""
    params = make_params(splits=(20, 30), dtype=torch.float64)
    nn.init.normal_(params[1].tail_vectors)
    args = arguments(clip=clip, wdecay=0.01, bptt=10, lr=3.0)
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
    expected = {
        n: before[n] - 3.0 * 7 / 10 * (g * scale + 0.01 * before[n])
        for n, g in zip(names, gradients)
    }

    optimizer = make_optimizer(params, args)
    loss, _ = train_step(params, optimizer, words, targets, model.init_hidden(4), args)
    assert loss.item() == pytest.approx(nll.item())  # without AR and TAR
    for name, parameter in params.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7)
    assert optimizer.param_groups[0]["lr"] == 3.0
    assert not torch.equal(params[1].tail_vectors, before["1.tail_vectors"])  # criterion's too


def test_adam_takes_its_own_kind_of_step():
    params = make_params()
    optimizer = make_optimizer(params, arguments(optimizer="adam", lr=1e-3))
    before = params[0].decoder.bias.detach().clone()
    words, targets = torch.randint(50, (10, 4)), torch.randint(50, (40,))
    hidden = params[0].init_hidden(4)
    train_step(params, optimizer, words, targets, hidden, arguments(alpha=0, beta=0))
    moved = (params[0].decoder.bias - before).abs()
    torch.testing.assert_close(moved.max(), torch.tensor(1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "biLSTM"])
def test_a_step_on_the_meta_device(rnn_type, monkeypatch):
    """Every tensor of a step is where the model is: nothing is left on the CPU by accident."""
    with torch.device("meta"):
        params = make_params(rnn_type, rate=0.3)
    args = arguments(device=torch.device("meta"))
    source = train.batchify(torch.randint(50, (200,)), 4, args)
    words, targets = get_batch(source, 0, args)
    assert words.device.type == targets.device.type == "meta"
    hidden = params[0].init_hidden(4)
    averaged = train.AveragedModel(params)
    for optimizer in (make_optimizer(params, args), torch.optim.Adam(params.parameters())):
        loss, hidden = train_step(params, optimizer, words, targets, hidden, args)
        averaged.update_parameters(params)
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


# ---------------------------------------------------------------- NT-ASGD


@pytest.mark.parametrize(
    ("losses", "nonmono", "switch"),
    [
        # Better all the time: never.
        ([9, 8, 7, 6, 5, 4, 3], 2, None),
        # Worse than the best of all but the last two (5); the last two (4.9) do not count.
        ([5, 6, 7, 4.9, 4.95, 5.1], 2, 5),
        ([5, 4, 3, 4.5], 2, None),
        ([5, 4, 3, 4, 5], 2, 4),
        ([5, 4, 3, 3.5, 3.2, 3.1], 2, 5),
        # Not before there are more than nonmono losses, however bad.
        ([1, 9, 9, 9, 9, 9], 5, None),
        ([1, 9, 9, 9, 9, 9, 9], 5, 6),
        # Equal is not worse.
        ([3, 3, 3, 3, 3], 1, None),
        # An interval of 0: worse than the best so far.
        ([3, 2, 2.5], 0, 2),
    ],
)
def test_trigger_on_hand_made_losses(losses, nonmono, switch):
    fired = [i for i, loss in enumerate(losses) if nonmonotone(losses[:i], loss, nonmono)]
    assert (fired[0] if fired else None) == switch


@pytest.fixture
def corpus(corpus_dir):
    return Corpus(corpus_dir)


def spy_on_steps(monkeypatch):
    """Records the weights after each step, and the weights at each evaluation."""
    iterates, evaluated = [], []
    step, score = train.train_step, train.evaluate

    def recorded_step(params, *rest):
        result = step(params, *rest)
        assert all(module.training for module in params.modules())
        iterates.append([p.detach().double().clone() for p in params.parameters()])
        return result

    def recorded_evaluate(params, *rest):
        evaluated.append(([p.detach().clone() for p in params.parameters()], len(iterates)))
        return score(params, *rest)

    monkeypatch.setattr(train, "train_step", recorded_step)
    monkeypatch.setattr(train, "evaluate", recorded_evaluate)
    return iterates, evaluated


def plain_mean(iterates):
    return [sum(each) / len(iterates) for each in zip(*iterates)]


def assert_weights(found, expected):
    for f, e in zip(found, expected):
        torch.testing.assert_close(f.double(), e.double(), rtol=1e-4, atol=1e-6)


def test_nt_asgd_evaluates_and_saves_the_mean_since_the_switch(corpus, tmp_path, monkeypatch):
    iterates, evaluated = spy_on_steps(monkeypatch)
    monkeypatch.setattr(train, "evaluate", hand_made := HandMade(train.evaluate, [5, 4, 6, 3, 2]))
    args = arguments(epochs=5, nonmono=1, save=str(tmp_path / "m.pt"))
    params = make_params(ntoken=len(corpus.dictionary), rate=0.2, splits=(3,))
    assert fit(params, corpus, args) == (False, True)
    assert not hand_made.losses
    per_epoch = len(iterates) // 5
    for epoch, (weights, steps) in enumerate(evaluated, 1):
        if epoch <= 3:  # SGD: the last iterate; epoch 3, at 6, is worse than 5 and switches
            assert_weights(weights, iterates[steps - 1])
        else:  # the mean of all iterates since the switch, the criterion's parameters included
            since = evaluated[2][1]
            assert_weights(weights, plain_mean(iterates[since:steps]))
            assert any((w - i).abs().max() > 1e-4 for w, i in zip(weights, iterates[steps - 1]))
    assert per_epoch > 5
    checkpoint = read_checkpoint(args.save)
    assert (checkpoint["epoch"], checkpoint["valid_loss"], checkpoint["averaged"]) == (5, 2, True)
    names = [name for name, _ in params.named_parameters()]
    assert "1.tail_vectors" in names
    for name, weights in zip(names, evaluated[-1][0]):
        part, key = ("model", name[2:]) if name.startswith("0.") else ("criterion", name[2:])
        torch.testing.assert_close(checkpoint[part][key], weights)


class HandMade:
    """An `evaluate` that looks at the weights as the real one does, and returns given losses."""

    def __init__(self, real, losses):
        self.real, self.losses = real, list(losses)

    def __call__(self, *args):
        self.real(*args)
        return self.losses.pop(0)


def test_finetuning_averages_from_its_first_step_and_stops_at_the_trigger(
    corpus, tmp_path, monkeypatch
):
    iterates, evaluated = spy_on_steps(monkeypatch)
    monkeypatch.setattr(train, "evaluate", HandMade(train.evaluate, [3, 4, 5, 9, 9]))
    args = arguments(epochs=5, nonmono=1, save=str(tmp_path / "m.pt"))
    fit(make_params(ntoken=len(corpus.dictionary)), corpus, args, best=3.5, finetuning=True)
    assert len(evaluated) == 3  # 5 is worse than the best of all but the last: 3
    for weights, steps in evaluated:
        assert_weights(weights, plain_mean(iterates[:steps]))
    assert read_checkpoint(args.save)["valid_loss"] == 3


def test_only_improvements_are_saved_and_when_divides_the_rate(corpus, tmp_path, monkeypatch):
    rates = []
    step = train.train_step
    monkeypatch.setattr(
        train, "train_step",
        lambda p, o, *a: rates.append(o.param_groups[0]["lr"]) or step(p, o, *a),
    )
    monkeypatch.setattr(train, "evaluate", HandMade(train.evaluate, [4, 3, 5, 6]))
    args = arguments(epochs=4, when=[1, 3], lr=2.0, save=str(tmp_path / "m.pt"))
    fit(make_params(ntoken=len(corpus.dictionary)), corpus, args)
    assert read_checkpoint(args.save)["epoch"] == 2
    assert sorted(set(rates)) == pytest.approx([0.02, 0.2, 2.0])
    assert rates == sorted(rates, reverse=True)
    assert read_checkpoint(f"{args.save}.e1")["epoch"] == 1
    assert read_checkpoint(f"{args.save}.e3")["valid_loss"] == 5


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(corpus, tmp_path, monkeypatch):
    step = train.train_step
    calls = []

    def fail_in_epoch_2(params, *rest):
        loss, hidden = step(params, *rest)
        calls.append(1)
        return loss * (math.nan if len(calls) == boom else 1), hidden

    args = arguments(epochs=3, save=str(tmp_path / "m.pt"), log_interval=1000, clip=0.0)
    params = make_params(ntoken=len(corpus.dictionary))
    boom = 0
    monkeypatch.setattr(train, "train_step", fail_in_epoch_2)
    np.random.seed(3)
    fit(copy.deepcopy(params), corpus, arguments(epochs=1, save=args.save))
    first_epoch = len(calls)
    calls.clear()
    boom = first_epoch + 4
    np.random.seed(3)
    with pytest.raises(InputError, match="epoch 2, lr 5: the loss is nan at batch 4; try") as e:
        fit(params, corpus, args)
    assert "--clip 0.25" in str(e.value)
    assert "m.pt keeps the best model so far" in str(e.value)
    assert read_checkpoint(args.save)["epoch"] == 1


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
    assert "inf" in train.loss_columns(1000)


def test_functional_swap_is_seen_by_this_torch():
    """What weight drop relies on: nn.LSTM computes with the weights that functional_call gives."""
    lstm = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    zeroed = functional_call(lstm, {"weight_hh_l0": torch.zeros(16, 4)}, (x,))[0]
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    torch.testing.assert_close(zeroed, lstm(x)[0])
