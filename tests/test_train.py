"""Training against its definitions: steps, evaluation, schedules, and what a run does with them."""

import math
from argparse import Namespace
from collections import namedtuple
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from torch import nn

import train
from checkpoint import build_params, read_checkpoint, read_state
from conftest import Interrupting, arguments, make_params, make_trainer
from data import Dictionary, InputError
from kill_loop import lines, same
from model import DROPOUTS
from splitcross import SplitCrossEntropyLoss
from train import (
    OPTIMIZERS, Average, Diverged, Objective, evaluate, is_nonmonotone, make_optimizer,
    random_seq_len, scheduled_share, settings_at, train_step,
)
from utils import Losses, Preempted, loss_columns, map_hidden, perplexity
from weight_drop import WeightDrop

# ------------------------------------------------------------ one step


def test_the_lengths_of_windows(monkeypatch):
    lengths = np.array([random_seq_len(70) for _ in range(40_000)])
    short = lengths < 52  # 3.5 deviations from either mean
    assert short.mean() == pytest.approx(0.05, abs=5 * math.sqrt(0.05 * 0.95 / 40_000))
    # int() cuts half a token off on average.
    assert lengths[~short].mean() == pytest.approx(69.5, abs=0.15)
    assert lengths[~short].std() == pytest.approx(5, rel=0.03)
    assert lengths[short].mean() == pytest.approx(34.5, abs=0.6)
    assert lengths[short].std() == pytest.approx(5, rel=0.1)
    assert min(random_seq_len(3) for _ in range(200)) == 5
    monkeypatch.setattr(np.random, "normal", lambda mean, deviation: mean + 100 * deviation)
    assert random_seq_len(70) == 95


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


@pytest.mark.parametrize(
    ("clip", "bias_lr", "share", "alpha", "beta"),
    [(0.0, 1.0, 1.0, 2.0, 1.0), (0.05, 1.0, 0.5, 0.0, 3.0), (0.05, 0.25, 1.0, 2.0, 0.0)],
)
def test_a_step_is_the_update_of_the_paper(clip, bias_lr, share, alpha, beta):
    """w <- w - lr * L / bptt * (clipped gradient of NLL + AR + TAR, + wdecay * w), in float64.

    The rate is a schedule's share of lr, and that of the recurrent layers' biases a share of it.
    """
    params = make_params(splits=(20, 30), dtype=torch.float64)
    args = arguments(
        clip=clip, wdecay=0.01, bptt=10, lr=3.0, bias_lr=bias_lr, alpha=alpha, beta=beta
    )
    words, targets = torch.randint(50, (7, 4)), torch.randint(50, (28,))
    before = [weight.detach().clone() for weight in params.parameters()]

    # The same loss from parts that the step does not use: logprob, and plain means.
    model, criterion = params
    hidden = map_hidden(torch.randn_like, model.init_hidden(4))
    output, _, raw, dropped = model(words, hidden, return_h=True)
    logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, output)
    nll = -logprob[torch.arange(28), targets].mean()
    ar, tar = (dropped[-1] ** 2).mean(), (raw[-1].diff(dim=0) ** 2).mean()
    gradients = torch.autograd.grad(nll + alpha * ar + beta * tar, list(params.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert norm > clip
    scale = clip / norm if clip else 1.0

    optimizer = make_optimizer(params, args)
    loss, _ = train_step(Objective(params), optimizer, words, targets, hidden, args, share)
    assert loss.item() == pytest.approx(nll.item())  # without AR and TAR
    for (name, weight), old, gradient in zip(params.named_parameters(), before, gradients):
        assert gradient.any(), name
        rate = 2.1 * share * (bias_lr if "rnns" in name and "bias" in name else 1)
        expected = old - rate * (gradient * scale + 0.01 * old)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-7)
    assert [group["lr"] for group in optimizer.param_groups] == [3.0, 3.0 * bias_lr]


@pytest.mark.parametrize(
    ("optimizer", "mean", "square_mean"), [("adam", 0.9, 0.999), ("adamw", 0.8, 0.99)]
)
def test_adam_is_the_papers(optimizer, mean, square_mean):
    """m, v: means of g and g^2; w <- w - rate * m' / (sqrt(v') + eps).

    Weight decay is part of Adam's g; AdamW takes rate * decay * w away.
    """
    params = make_params(dtype=torch.float64)
    args = arguments(optimizer=optimizer, lr=0.01, wdecay=0.3, clip=0, alpha=0, beta=0)
    steps = make_optimizer(params, args)
    weight = params[0].rnns[0].module.weight_ih_l0
    w, m, v = weight.detach().clone(), 0.0, 0.0
    for step in (1, 2, 3):
        words, targets = torch.randint(50, (10, 4)), torch.randint(50, (40,))
        train_step(Objective(params), steps, words, targets, params[0].init_hidden(4), args)
        decay = 0.3 * w
        g = weight.grad + decay * (optimizer == "adam")
        m, v = mean * m + (1 - mean) * g, square_mean * v + (1 - square_mean) * g * g
        scaled = (m / (1 - mean**step)) / ((v / (1 - square_mean**step)).sqrt() + 1e-8)
        w = w - 0.01 * (scaled + decay * (optimizer == "adamw"))
        torch.testing.assert_close(weight.detach(), w)


def test_the_average_is_the_mean_of_the_iterates(monkeypatch):
    """Its recurrent weights lie in one piece: else cuDNN copies them, and warns, at every call."""
    params, flattened = make_params(splits=(20, 30)), []
    params[0].encoder.weight.grad = torch.ones_like(params[0].encoder.weight)
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda layer: flattened.append(layer))
    average, iterates = Average(params), []
    assert flattened == [rnn.module for rnn in average.params[0].rnns]
    for _ in range(4):
        for weight in params.parameters():
            nn.init.normal_(weight.data)
        average.update(params)
        iterates.append([weight.detach().double() for weight in params.parameters()])
    assert_mean(average.params.parameters(), iterates)
    assert all(weight.grad is None for weight in average.params.parameters())


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "biLSTM"])
def test_nothing_is_left_on_the_cpu_by_accident(rnn_type, monkeypatch):
    with torch.device("meta"):
        params = make_params(rnn_type, rate=0.3)
        words, targets = torch.randint(50, (10, 4)), torch.randint(50, (40,))
    hidden, average, devices = params[0].init_hidden(4), Average(params), set()

    def record(tensor):
        devices.add(tensor.device.type)
        return tensor

    for kind in OPTIMIZERS:
        args = arguments(optimizer=kind)
        optimizer = make_optimizer(params, args)
        loss, hidden = train_step(Objective(params), optimizer, words, targets, hidden, args)
        average.update(params)
        weights = list(params.parameters())
        map_hidden(record, (loss, hidden, *weights, *(weight.grad for weight in weights)))
    monkeypatch.setattr(SplitCrossEntropyLoss, "forward", lambda self, *inputs: (
        map_hidden(record, inputs) and torch.zeros(())
    ))
    evaluate(params, torch.randint(50, (101,)), 10, 4)
    assert devices == {"meta"}


def test_a_gpu_is_not_waited_for_within_a_step():
    """Losses.read(ahead=1) leaves the newest alone: reading it would wait for its step."""
    losses = Losses()
    losses.add(torch.tensor(1.5), 10)
    losses.add(torch.empty((), device="meta"), 10)  # which cannot be read at all
    assert losses.read(ahead=1) == [1.5]
    assert losses.read(ahead=1) == []
    losses.pending.pop()
    losses.add(torch.tensor(2.5), 30)
    assert losses.read() == [2.5]
    assert losses.mean() == pytest.approx(2.25)
    assert losses.mean(last=1) == 2.5


# ------------------------------------------------------------ evaluation


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU"])
@pytest.mark.parametrize("columns", [1, 10])
@pytest.mark.parametrize("n", [2, 11, 64])
def test_evaluation_is_the_token_by_token_definition(n, columns, rnn_type):
    params, ids = make_params(rnn_type, rate=0.5, splits=(20, 30)), torch.randint(50, (n,))
    for parameter in params.parameters():
        nn.init.normal_(parameter, std=0.5)
    found = evaluate(params, ids, columns, 10)
    (model, criterion), total = params.double(), 0.0
    for places in torch.arange(n - 1).tensor_split(columns):
        hidden = model.init_hidden(1)
        for i in places:
            output, hidden = model(ids[i].view(1, 1), hidden)
            logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, output)
            total -= logprob[0, ids[i + 1]].item()
    assert found == pytest.approx(total / (n - 1), rel=1e-5)


def test_perplexity_overflow_prints_inf():
    assert perplexity(2) == pytest.approx(math.e**2)
    assert perplexity(1000) == math.inf
    assert "inf" in loss_columns(1000)


# ------------------------------------------------------------ schedules


def test_a_partial_shuffle_rolls_each_column_by_its_own_offset():
    text = torch.tensor([[0, 10], [1, 11], [2, 12]])
    rolled = train.roll_columns(text, torch.tensor([1, 2]))
    assert rolled.tolist() == [[1, 12], [2, 10], [0, 11]]


def test_one_cycle_is_torchs():
    steps = 5000
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3.0, total_steps=steps + 1, pct_start=train.WARMUP, cycle_momentum=False,
        div_factor=25, final_div_factor=1e4,
    )
    for step in range(steps + 1):
        ours = 3.0 * scheduled_share("onecycle", step / steps)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-6, abs=0.01)  # a step off
        optimizer.step()
        if step < steps:
            theirs.step()
    corners = [scheduled_share("onecycle", p) for p in (0, train.WARMUP / 2, train.WARMUP, 1, 1.5)]
    assert corners == pytest.approx([0.04, 0.52, 1, 4e-6, 4e-6])
    assert scheduled_share("constant", 0.7) == 1
    corners = [scheduled_share("trapezoid", p) for p in (0, 0.04, 0.08, 0.3, 0.7, 0.92, 0.96, 1)]
    assert corners == pytest.approx([0.1, 0.55, 1, 1, 0.55, 0.1, 0.05, 0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "biLSTM", "biLM"])
def test_the_ramp_reaches_every_regularizer(kind):
    model = make_params(kind, rate=0.5)[0]
    rates = dict(zip(DROPOUTS, (0.4, 0.3, 0.2, 0.1, 0.5)))
    args = arguments(alpha=2.0, beta=1.0, **rates)
    assert settings_at(0.5, args, model)[0] is args
    assert model.dropout == model.rnns[0].dropout == 0.5  # without a ramp the model is left alone
    args.regularization_ramp = [0.0, 2.0]
    words, hidden = torch.randint(50, (6, 3)), model.init_hidden(3)
    for epochs, strength in ((0.0, 0.0), (0.5, 0.25), (3.0, 1.0)):
        now, share = settings_at(epochs, args, model)
        assert share == 1
        assert (now.alpha, now.beta) == pytest.approx((2 * strength, strength))
        for name, rate in rates.items():
            assert getattr(model, name) == getattr(now, name) == pytest.approx(strength * rate)
        drops = [m.dropout for m in model.modules() if isinstance(m, WeightDrop)]
        assert drops == pytest.approx([strength * 0.5] * (4 if kind == "biLM" else 2))
        trained, evaluated = (model.train(mode)(words, hidden)[0] for mode in (True, False))
        assert torch.equal(trained, evaluated) == (strength == 0)
    assert (args.alpha, args.wdrop) == (2, 0.5)  # the flags stay what they are


# ------------------------------------------------------------ a run

CYCLE = {
    "optimizer": "adamw", "schedule": "onecycle", "regularization_ramp": [0.25, 1.0], "lr": 0.01,
    "dropouth": 0.1, "dropouti": 0.1, "dropoute": 0.1, "wdrop": 0.4,
}
Step = namedtuple("Step", "data targets hidden args share lr left weights")


@pytest.fixture
def begin(tmp_path):
    """A function: a Trainer with flags as given, on `ids` as all three splits; saves to m.pt."""
    text = torch.arange(1200) * 7 % 47

    def begin(params=None, ids=text, finetuning=False, **flags):
        corpus = Namespace(
            train=ids, valid=ids, test=ids, name="text", digest="0",
            dictionary=Dictionary(map(str, range(50))),
        )
        args = arguments(save=str(tmp_path / "m.pt"), **flags)
        params = params or make_params(splits=(20,))
        return make_trainer(params, corpus, args, finetuning=finetuning)

    return begin


@pytest.fixture
def spy(monkeypatch):
    """Has `steps` and `evaluated`, (number of steps, weights), of what runs; gives other losses.

    `losses` {number of the step: loss}, `valid_losses` [loss].
    """
    spy = Namespace(steps=[], evaluated=[], losses={}, valid_losses=[])
    step, score = train.train_step, train.score

    def recorded_step(objective, optimizer, *inputs):
        lr = optimizer.param_groups[0]["lr"]
        loss, hidden = step(objective, optimizer, *inputs)
        assert all(module.training for module in objective.modules())
        weights = [p.detach().double().clone() for p in objective.parameters()]
        spy.steps.append(Step(*inputs, lr, hidden, weights))
        return loss * 0 + spy.losses.get(len(spy.steps), loss), hidden

    def recorded_score(params, *rest):
        spy.evaluated.append((len(spy.steps), [p.detach().clone() for p in params.parameters()]))
        found = score(params, *rest)
        return (spy.valid_losses.pop(0), {}) if spy.valid_losses else found

    monkeypatch.setattr(train, "train_step", recorded_step)
    monkeypatch.setattr(train, "score", recorded_score)
    return spy


def assert_mean(found, iterates):
    for weight, *each in zip(found, *iterates):
        mean = sum(each) / len(each)
        torch.testing.assert_close(weight.double(), mean.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU"])
def test_an_epoch_reads_every_token_once_and_carries_the_hidden_state(rnn_type, begin, spy):
    source, last = torch.arange(46).view(2, 23).t(), set()
    for seed in range(30):
        np.random.seed(seed)
        spy.steps.clear()
        run = begin(make_params(rnn_type), torch.arange(46), bptt=5, batch_size=2)
        run.train_epoch()
        assert torch.equal(torch.cat([step.data for step in spy.steps]), source[:-1])
        assert torch.equal(torch.cat([step.targets for step in spy.steps]), source[1:].flatten())
        assert same(spy.steps[0].hidden, run.params[0].init_hidden(2))
        for before, after in pairwise(spy.steps):
            assert same(before.left, after.hidden) and not same(before.hidden, after.hidden)
        assert math.isfinite(run.losses.mean())
        assert all(weight.isfinite().all() for weight in spy.steps[-1].weights)
        last.add(len(spy.steps[-1].data))
    assert 1 in last  # a last window of one step was among them


@pytest.mark.parametrize(
    ("losses", "nonmono", "switch"),
    [
        # Better all the time: never.
        ([9, 8, 7, 6, 5, 4, 3], 2, None),
        # Worse than the best of all but the last two (5); the last two (4.9) do not count.
        ([5, 6, 7, 4.9, 4.95, 5.1], 2, 5),
        ([5, 4, 3, 4, 5], 2, 4),
        ([5, 4, 3, 3.5, 3.2, 3.1], 2, 5),
        # Not before there are more than nonmono losses, however bad.
        ([1, 9, 9, 9, 9, 9, 9], 5, 6),
        # Equal is not worse.
        ([3, 3, 3, 3, 3], 1, None),
        # An interval of 0: worse than the best so far.
        ([3, 2, 2.5], 0, 2),
    ],
)
def test_trigger_on_hand_made_losses(losses, nonmono, switch):
    fired = [i for i, loss in enumerate(losses) if is_nonmonotone(losses[:i], loss, nonmono)]
    assert (fired[0] if fired else None) == switch


def test_nt_asgd_evaluates_and_saves_the_mean_since_the_switch(begin, spy):
    spy.valid_losses = [5, 4, 6, 3, 2]
    run = begin(make_params(rate=0.2, splits=(20,)), epochs=5, nonmono=1)
    run.fit()
    assert not spy.valid_losses
    iterates = [step.weights for step in spy.steps]
    since = spy.evaluated[2][0]
    for epoch, (steps, weights) in enumerate(spy.evaluated, 1):
        # SGD: the last iterate; epoch 3, at 6, is worse than 5 and switches. From then on the mean
        # of all iterates since, the criterion's parameters included.
        averaged = epoch > 3
        assert_mean(weights, iterates[since if averaged else steps - 1 : steps])
        far = any((w - i).abs().max() > 1e-4 for w, i in zip(weights, iterates[steps - 1]))
        assert far == averaged
    checkpoint = read_checkpoint(run.args.save)
    assert (checkpoint["epoch"], checkpoint["valid_loss"], checkpoint["averaged"]) == (5, 2, True)
    assert_mean(build_params(checkpoint).parameters(), [spy.evaluated[-1][1]])


def test_finetuning_averages_from_its_first_step_and_stops_at_the_trigger(begin, spy):
    spy.valid_losses = [3, 4, 5, 9, 9]
    run = begin(epochs=5, nonmono=1, finetuning=True)
    run.best = 3.5
    run.fit()
    assert len(spy.evaluated) == 3  # 5 is worse than the best of all but the last: 3
    for steps, weights in spy.evaluated:
        assert_mean(weights, [step.weights for step in spy.steps[:steps]])
    assert read_checkpoint(run.args.save)["valid_loss"] == 3


def test_only_improvements_are_saved_and_when_divides_the_rate(begin, spy):
    spy.valid_losses = [4, 3, 5, 6]
    run = begin(epochs=4, when=[1, 3], lr=2.0)
    run.fit()
    path = run.args.save
    assert read_checkpoint(path)["epoch"] == 2
    rates = [step.lr for step in spy.steps]
    assert sorted(set(rates)) == pytest.approx([0.02, 0.2, 2.0])
    assert rates == sorted(rates, reverse=True)
    assert read_checkpoint(f"{path}.e1")["epoch"] == 1
    assert read_checkpoint(f"{path}.e3")["valid_loss"] == 5


def test_with_a_partial_shuffle_each_epoch_reads_the_columns_from_other_places(begin, spy):
    run = begin(epochs=2, partial_shuffle=True)
    run.fit()
    read = torch.cat([step.data for step in spy.steps])
    epochs = read.view(2, run.rows - 1, -1)
    text = run.texts[0]
    for column in range(text.size(1)):
        places = [(text[:, column] == words[0, column]).nonzero().squeeze(1) for words in epochs]
        assert any(
            torch.equal(text[:, column].roll(-int(place))[:-1], epochs[0][:, column])
            for place in places[0]
        )
    assert not torch.equal(*epochs)


def test_a_run_follows_its_schedule_interrupted_or_not(begin, spy):
    run = begin(make_params(rate=0.3), epochs=2, **CYCLE)
    run.run.check = Interrupting(9)
    with pytest.raises(Preempted):
        run.fit()
    run = begin(make_params(rate=0.3), epochs=2, **CYCLE)
    run.load_state_dict(read_state(run.args.save))
    run.fit()
    rows = accumulate((len(step.data) for step in spy.steps), initial=0)
    for step, row in zip(spy.steps, rows):
        epochs = row / (run.rows - 1)
        strength = min(1, 0.25 + 0.75 * epochs)
        assert step.share == pytest.approx(scheduled_share("onecycle", epochs / 2))
        assert step.args.wdrop == pytest.approx(strength * 0.4)
        assert (step.args.alpha, step.args.beta) == pytest.approx((2 * strength, strength))
    assert epochs > 1.8
    found = [record["lr"] for record in lines(run.records)]
    shares = [scheduled_share("onecycle", 0.5), train.FINAL_SHARE]
    assert found == pytest.approx([0.01 * share for share in shares])


@pytest.mark.parametrize("rnn_type", ["LSTM", "biLM"])
def test_the_longest_window_is_tried_and_leaves_no_trace(rnn_type, begin):
    losses, lengths = [], []
    for tried in (False, True):
        torch.manual_seed(0), np.random.seed(0)
        params = make_params(rnn_type, rate=0.3)
        run = begin(params)
        if tried:
            run.objective.register_forward_pre_hook(lambda _, given: lengths.append(len(given[0])))
            run.try_longest_window()
            assert lengths == [10 + 25]
            assert all(p.grad is None for p in params.parameters())
        run.train_epoch()
        losses.append(run.losses.on_host)
    assert losses[0] == losses[1]


# ------------------------------------------------------------ divergence


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(begin, spy):
    run = begin(epochs=1, clip=0.0)
    run.fit()
    run.args.epochs = 3
    spy.losses = {len(spy.steps) + 4: math.nan}
    with pytest.raises(InputError, match=(
        "epoch 2, lr 5: the loss is nan at batch 4; try a lower --lr or --clip 0.25; .*m.pt keeps "
        r"the best model so far; .*--lr 2.5 resumes from the last good state \(epoch 2, batch 0\)"
    )):
        run.fit()
    assert read_checkpoint(run.args.save)["epoch"] == 1
    state = read_state(run.args.save)
    assert (state["epoch"], state["losses"]) == (2, [])
    assert all(torch.isfinite(weights).all() for weights in state["model"].values())


def test_twenty_batches_in_a_row_with_too_high_a_loss_stop_the_run(begin, spy):
    high = math.log(50) + 1.01
    spy.losses = dict(enumerate([high] * 19 + [1.0] + [high] * 19 + [1.0] * 300, 1))
    begin(bptt=1, epochs=1).fit()
    assert len(spy.steps) > 39
    spy.steps.clear()
    spy.losses = dict(enumerate([1.0] * 6 + [high] * 99, 1))
    with pytest.raises(InputError, match="in 20 batches in a row, up to batch 26; try a lower"):
        begin(bptt=1).fit()
    assert len(spy.steps) == 26


def test_continue_lets_a_finite_explosion_run_on_but_not_an_infinite_one(begin, spy):
    spy.losses = dict.fromkeys(range(30), 1e9) | {30: math.inf}
    with pytest.raises(InputError, match="the loss is inf at batch 30"):
        begin(bptt=1, epochs=1, on_divergence="continue").fit()


def test_rollback_halves_the_rate_three_times_at_most(begin, spy, capsys):
    run = begin(on_divergence="rollback", checkpoint_minutes=1e-9)
    run.is_due = lambda seconds=0: len(run.losses.on_host) in (0, 3)  # a state after each batch 3
    spy.losses = {6: math.nan, 8: math.nan}
    run.fit()
    out = capsys.readouterr().out
    assert "epoch 1, lr 5: the loss is nan at batch 6\n" in out
    assert "back to epoch 1, batch 3 with learning rate 2.5 (1 of 3 times)" in out
    assert "epoch 1, lr 2.5: the loss is nan at batch 5\n" in out
    assert "back to epoch 1, batch 3 with learning rate 1.25 (2 of 3 times)" in out
    assert run.optimizer.param_groups[0]["lr"] == 1.25
    assert len(run.records.splitlines()) == 3

    run.args.epochs, count = 4, len(spy.steps)
    spy.losses = {count + 2: math.nan, count + 4: math.nan}
    with pytest.raises(InputError, match=r"epoch 4, lr 0\.625: the loss is nan at batch 2"):
        run.fit()


def test_no_state_is_saved_with_a_weight_that_is_not_finite(begin):
    run = begin()
    run.save_state()
    before = read_state(run.args.save)
    with torch.no_grad():
        run.params[0].decoder.bias[0] = math.inf
    with pytest.raises(Diverged, match="weight is no longer finite"):
        run.save_state()
    assert same(read_state(run.args.save), before)
