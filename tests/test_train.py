"""Training against its definitions: steps, evaluation, schedules, and what a run does with them."""

import io
import json
import math
import re
import signal
import sys
from argparse import Namespace
from collections import namedtuple
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import nn

import train
from checkpoint import read_checkpoint, read_state
from conftest import (
    MODELS, ROOT, Interrupting, arguments, make_corpus, make_params, make_trainer, reversed_text,
)
from data import InputError
from kill_loop import lines, same
from model import DROPOUTS
from train import (
    REGULARIZERS, Average, Diverged, EpochMonitor, apply_schedules, evaluate, evaluate_model,
    is_nonmonotone, make_objective, make_optimizer, random_seq_len, regularizers_at,
    scheduled_share, train_step,
)
from utils import Losses, Preempted, loss_columns, perplexity
from weight_drop import WeightDrop

# ------------------------------------------------------------ one step


def test_perplexity_overflow_prints_inf():
    assert perplexity(2) == pytest.approx(math.e**2)
    assert perplexity(1000) == math.inf
    assert "inf" in loss_columns(1000)


def test_windows_are_not_too_long(monkeypatch):
    monkeypatch.setattr(np.random, "normal", lambda mean, deviation: mean + 100 * deviation)
    assert random_seq_len(70) == 95


def test_a_new_model_is_as_the_flags_say():
    corpus = make_corpus(torch.arange(9), torch.arange(9), 10)
    args = arguments(attention="combined", attention_window=3, pad_to=8, emsize=8, nhid=12)
    model, _ = train.new_params(corpus, args)
    assert (model.attention.window, model.attention.current is None) == (3, False)
    assert {rnn.pad_to for rnn in model.rnns} == {8}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("length", "clip", "bias_lr", "share"),
    [(7, 0.0, 1.0, 1.0), (7, 0.05, 0.25, 0.5), (1, 0.05, 1.0, 1.0)],
)
def test_a_step_follows_the_clipped_gradient(length, clip, bias_lr, share, model):
    """w <- w - lr * share * L / bptt * (clipped gradient + wdecay * w), the criterion included.

    The biases below the decoder have a rate of their own. The last window of an epoch can have a
    single word.
    """
    params = make_params(**MODELS[model], splits=(20, 30), dtype=torch.float64)
    args = arguments(clip=clip, wdecay=0.01, bptt=10, lr=3.0, bias_lr=bias_lr, objective="both")
    objective, optimizer = make_objective(params, args), make_optimizer(params, args)
    words, targets = torch.randint(50, (length, 4)), torch.randint(50, (length * 4,))
    hidden, more = params[0].init_hidden(4), reversed_text(params, words, targets)
    before = copy(params.parameters())
    total, *_ = objective(words, targets, hidden, args.alpha, args.beta, **more)
    gradients = torch.autograd.grad(total, list(params.parameters()))
    norm = nn.utils.get_total_norm(gradients).item()
    assert norm > clip
    scale = clip / norm if clip else 1.0

    train_step(objective, optimizer, words, targets, hidden, args, share, **more)
    for (name, weight), old, gradient in zip(params.named_parameters(), before, gradients):
        assert gradient.any() or length == 1, name
        is_slow = ".bias" in name and name != "0.decoder.bias"
        rate = 3.0 * share * length / 10 * (bias_lr if is_slow else 1)
        expected = old - rate * (gradient * scale + 0.01 * old)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "kind", "betas"),
    [("adam", torch.optim.Adam, (0.9, 0.999)), ("adamw", torch.optim.AdamW, (0.8, 0.998))],
)
def test_adam_and_adamw_match_torch(name, kind, betas):
    optimizer = make_optimizer(make_params(), arguments(optimizer=name, lr=0.01, wdecay=0.3))
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, betas, 0.3)


def test_the_averages_weights_lie_in_one_piece(monkeypatch):
    """Else cuDNN copies them, and warns, at every call."""
    params, flattened = make_params(), []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda rnn: flattened.append(rnn))
    average = Average(params)
    assert flattened == [rnn.module for rnn in average.mean[0].rnns]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_nothing_is_left_on_the_cpu_by_accident(length, model):
    """On `meta`, a tensor on the CPU is an error, and so is the copy of a result to the host."""
    with torch.device("meta"):
        params = make_params(**MODELS[model], rate=0.1)
        words, targets = torch.randint(50, (length, 3)), torch.randint(50, (length * 3,))
    args, hidden = arguments(objective="both"), params[0].init_hidden(3)
    objective, optimizer = make_objective(params, args), make_optimizer(params, args)
    more = reversed_text(params, words, targets)
    for _ in range(2):
        loss, hidden = train_step(objective, optimizer, words, targets, hidden, args, **more)
    assert loss.is_meta and all(p.grad is not None for p in params.parameters())
    average = Average(params)
    average.update(params)
    assert all(p.grad is None for p in average.mean.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        evaluate_model(params, words.flatten().repeat(20), args)


def test_the_newest_losses_can_be_left_unread():
    losses = Losses()
    losses.add(torch.tensor(1.5), 10)
    losses.add(torch.empty((), device="meta"), 10)  # which cannot be read at all
    assert losses.read(ahead=1) == [1.5]
    losses.pending.pop()
    losses.add(torch.tensor(2.5), 30)
    assert losses.read() == [2.5]
    assert losses.mean() == pytest.approx(2.25)


def test_the_newest_loss_of_a_gpu_is_not_waited_for(begin):
    run = begin()
    run.args.device = torch.device("cuda")
    run.losses.add(torch.empty((), device="meta"), 10)  # which cannot be read at all
    EpochMonitor(run).after_batch(10, 1.0)
    run.args.device = torch.device("cpu")
    with pytest.raises(RuntimeError, match="meta"):
        EpochMonitor(run).after_batch(10, 1.0)


def test_losses_arrive_from_a_gpu_in_the_order_of_its_stream(monkeypatch):
    """Without a GPU: a stand-in for a tensor on one, whose copy has arrived after an event."""
    calls = []
    event = Namespace(synchronize=lambda: calls.append("synchronize"))

    def current_stream(device):
        assert device.type == "cuda"  # torch refuses any other
        return Namespace(record_event=lambda: calls.append("record") or event)

    def copy(device, non_blocking):
        assert (device, non_blocking) == ("cpu", True)
        calls.append("copy")
        return torch.tensor(1.5)

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    losses = Losses()
    losses.add(Namespace(is_cuda=True, device=torch.device("cuda:0"), to=copy), 10)
    assert losses.read() == [1.5]
    assert calls == ["copy", "record", "synchronize"]


# ------------------------------------------------------------ schedules


@pytest.mark.parametrize(("schedule", "points"), [
    ("constant", [(0, 1), (0.7, 1)]),
    ("trapezoid", [(0, 0.1), (0.04, 0.55), (0.08, 1), (0.3, 1), (0.7, 0.55), (0.92, 0.1),
                   (0.96, 0.05), (1, 0), (1.5, 0)]),
])
def test_a_schedule_goes_through_its_points(schedule, points):
    for progress, share in points:
        assert scheduled_share(schedule, progress) == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "QRNN", "biLSTM", "biLM"])
def test_the_ramp_reaches_every_regularizer(kind):
    model = make_params(kind, rate=0.5)[0]
    args = arguments(alpha=2.0, beta=1.0, regularization_ramp=[0.0, 2.0])
    for epochs, strength in ((0.0, 0.0), (0.5, 0.0), (1.0, 0.5), (1.9, 0.5), (3.0, 1.0)):
        now, _ = apply_schedules(epochs, args, model)
        assert (now.alpha, now.beta) == pytest.approx((2 * strength, strength))
        for name in DROPOUTS:
            assert getattr(model, name) == pytest.approx(strength * getattr(args, name))
        for module in model.modules():
            if isinstance(module, WeightDrop):
                assert module.dropout == pytest.approx(strength * args.wdrop)


def test_the_ramp_ends_at_exactly_the_flags():
    """Not at 0.9999: a further change of the regularizers would record all graphs once more."""
    args = arguments(alpha=2.0, beta=1.0, regularization_ramp=[0.3, 12.0])
    assert regularizers_at(11, args)["alpha"] < 2
    for epochs in (12, 13):
        assert regularizers_at(epochs, args) == {name: getattr(args, name) for name in REGULARIZERS}


# ------------------------------------------------------------ a run

Step = namedtuple("Step", "data args share weights")


@pytest.fixture
def begin(tmp_path):
    """A function: a Trainer with flags as given, on `ids` as all three splits; saves to m.pt."""
    text = torch.arange(1200) * 7 % 47

    def begin(params=None, ids=text, finetuning=False, **flags):
        corpus, args = make_corpus(ids, ids, 50), arguments(save=str(tmp_path / "m.pt"), **flags)
        params = params or make_params(splits=(20,))
        return make_trainer(params, corpus, args, finetuning=finetuning)

    return begin


def copy(weights):
    return [weight.detach().clone() for weight in weights]


@pytest.fixture
def spy(monkeypatch):
    """Has `steps` and `evaluated`, (number of steps, weights), of what runs; gives other losses.

    `losses` {number of the step: loss}, `valid_losses` [loss].
    """
    spy = Namespace(steps=[], evaluated=[], losses={}, valid_losses=[])
    step, real_loss = train.train_step, train.evaluate_model

    def recorded_step(objective, optimizer, data, targets, hidden, args, share, compute):
        loss, hidden = step(objective, optimizer, data, targets, hidden, args, share, compute)
        spy.steps.append(Step(data, args, share, copy(objective.parameters())))
        return loss * 0 + spy.losses.get(len(spy.steps), loss), hidden

    def recorded_loss(params, *rest):
        spy.evaluated.append((len(spy.steps), copy(params.parameters())))
        found = real_loss(params, *rest)
        return (spy.valid_losses.pop(0), {}) if spy.valid_losses else found

    monkeypatch.setattr(train, "train_step", recorded_step)
    monkeypatch.setattr(train, "evaluate_model", recorded_loss)
    return spy


@pytest.mark.parametrize(
    ("losses", "nonmono", "switch"),
    [
        # Worse than the best of all but the last two (5); the last two (4.9) do not count.
        ([5, 6, 7, 4.9, 4.95, 5.1], 2, 5),
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


def test_finetuning_averages_from_its_first_step_and_stops_at_the_trigger(begin, spy):
    spy.valid_losses = [3, 4, 5, 9, 9]
    run = begin(epochs=5, nonmono=1, finetuning=True)
    run.best = 3.5
    run.fit()
    assert len(spy.evaluated) == 3  # 5 is worse than the best of all but the last: 3
    for count, weights in spy.evaluated:
        for weight, *iterates in zip(weights, *(step.weights for step in spy.steps[:count])):
            torch.testing.assert_close(weight, sum(iterates) / count, rtol=1e-4, atol=1e-6)
    checkpoint = read_checkpoint(run.args.save)
    assert (checkpoint["valid_loss"], checkpoint["averaged"]) == (3, True)


def test_only_improvements_are_saved_and_when_divides_the_rate(begin, spy):
    spy.valid_losses = [4, 3, 5, 6]
    run = begin(epochs=4, when=[1, 3], lr=2.0)
    run.fit()
    path = run.args.save
    assert read_checkpoint(path)["epoch"] == 2
    rates = [record["lr"] for record in lines(run.records)]
    assert rates == pytest.approx([2.0, 0.2, 0.2, 0.02])
    assert read_checkpoint(f"{path}.e1")["epoch"] == 1
    assert read_checkpoint(f"{path}.e3")["valid_loss"] == 5


def test_a_new_rate_at_a_resume_is_not_divided(begin):
    begin(epochs=1, when=[1], lr=2.0).fit()
    for lr, rate in ((2.0, 0.2), (1.0, 1.0)):
        run = begin(epochs=2, when=[1], lr=lr)
        run.load_state_dict(read_state(run.args.save))
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_a_log_line_has_the_mean_loss_and_the_rate_of_its_batches(begin, spy, capsys):
    spy.losses = {n: 1.0 + (n > 10) for n in range(1, 99)}
    begin(epochs=1, lr=2.0, schedule="trapezoid").fit()
    found = re.findall(r"\| +(\d+)/ .* lr (\S+) .*\| loss +(\S+)", capsys.readouterr().out)
    expected = [(str(n), f"{2 * spy.steps[n - 1].share:.5f}", f"{n / 10:.2f}") for n in (10, 20)]
    assert found[:2] == expected


def test_a_record_is_strict_json_with_the_perplexities(begin, spy):
    spy.valid_losses = [1000.0]
    run = begin(epochs=1)
    run.fit()
    record = json.loads(run.records, parse_constant=pytest.fail)
    assert record["valid_ppl"] is None
    assert record["train_ppl"] == pytest.approx(math.exp(record["train_loss"]))


def test_the_time_before_an_interruption_counts(begin):
    run = begin()
    run.start_clock(500.0)
    run.save_state()
    run = begin()
    run.load_state_dict(read_state(run.args.save))
    assert run.seconds() > 500


def test_bilm_also_reads_the_reversed_text(begin):
    run = begin(make_params("biLM"))
    text = run.corpus.train.flip(0)
    _, _, more = run.window(0, 10)
    words, targets = more["backward"]
    assert torch.equal(words[:, 0], text[:10])
    assert torch.equal(targets.view(10, -1)[:, 0], text[1:11])
    assert more["is_first_window"] and not run.window(10, 10)[2]["is_first_window"]


def test_bilstm_is_evaluated_in_windows_of_bptt():
    params, ids, args = make_params("biLSTM"), torch.randint(50, (400,)), arguments(bptt=7)
    found, _ = evaluate_model(params, ids, args)
    assert found == evaluate(params, ids, 10, 7) != evaluate(params, ids, 10, 40)


def test_a_perplexity_that_is_not_a_language_models_is_noted(begin, capsys):
    run = begin(make_params("biLSTM"), epochs=1, model="biLSTM")
    run.fit()
    train.report_test(run)
    assert "Note: biLSTM, the report's model, sees the word" in capsys.readouterr().out
    assert "sees the word" in read_checkpoint(run.args.save)["note"]


def test_with_a_partial_shuffle_each_epoch_reads_the_columns_from_other_places(begin, spy):
    run = begin(epochs=2, partial_shuffle=True)
    run.fit()
    epochs = torch.cat([step.data for step in spy.steps]).view(2, run.rows - 1, -1)
    assert not torch.equal(*epochs)
    # In the text each word is 7 above the one before, modulo 47, but where a column begins again.
    begins = epochs.diff(dim=1) % 47 != 7
    assert begins.sum(dim=1).max() == 1
    assert begins.any(dim=2).sum() > 2  # each column elsewhere


def test_a_run_that_no_longer_shuffles_reads_from_the_first_row(begin, spy):
    run = begin(epochs=1, partial_shuffle=True)
    run.fit()
    run = begin(epochs=2)
    run.load_state_dict(read_state(run.args.save))
    assert run.offsets is not None
    run.fit()
    last = spy.steps[-1].data
    assert torch.equal(last, run.texts[0][-1 - len(last) : -1])


@pytest.mark.parametrize(("number", "tests"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_signal_during_the_final_test(number, tests, begin, monkeypatch, capsys):
    checks = []

    def report_test(trainer, check=None):
        checks.append(check)
        if check:
            raise Preempted(number)

    monkeypatch.setattr(train, "report_test", report_test)
    assert train.train_and_test(begin(epochs=1)) == 128 + number
    assert len(checks) == tests
    assert ("tests the model" in capsys.readouterr().out) == (tests == 1)


def test_a_run_follows_its_schedule_interrupted_or_not(begin, spy):
    flags = {
        "epochs": 2, "schedule": "trapezoid", "regularization_ramp": [0.25, 1.0],
        "optimizer": "adamw", "lr": 0.01, "wdrop": 0.4, "on_divergence": "continue",
    }
    run = begin(**flags)
    run.run.check_signals = Interrupting(9)
    with pytest.raises(Preempted):
        run.fit()
    run = begin(**flags)
    run.load_state_dict(read_state(run.args.save))
    run.fit()
    rows = accumulate((len(step.data) for step in spy.steps), initial=0)
    for step, row in zip(spy.steps, rows):
        epochs = row / (run.rows - 1)
        strength = 0.25 if epochs < 1 else 1
        assert step.share == pytest.approx(scheduled_share("trapezoid", epochs / 2))
        assert step.args.wdrop == pytest.approx(strength * 0.4)
    assert epochs > 1.8
    found = [record["lr"] for record in lines(run.records)]
    assert found == pytest.approx([0.01 * scheduled_share("trapezoid", 0.5), 0])


@pytest.mark.parametrize("kind", ["LSTM", "biLM"])
def test_a_record_has_the_documented_fields(kind, begin):
    page = (ROOT / "docs" / "interruptions.md").read_text(encoding="utf-8")
    fields, parts = (s.split(", ") for s in re.findall(r"`([a-z_]+(?:, [a-z_]+)+)`", page))
    run = begin(make_params(kind), epochs=1)
    run.seconds = lambda: 2.0
    run.fit()
    record = json.loads(run.records)
    assert record.keys() == {*fields, *(parts if kind == "biLM" else ())}
    assert record["tokens_per_s"] == 4 * (run.rows - 1) / 2


def test_on_a_terminal_the_bar_shows_the_perplexity_since_the_last_line(begin, spy, monkeypatch):
    shown, terminal = [], io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(train.tqdm, "set_postfix", lambda bar, ppl, refresh: shown.append(ppl))
    spy.losses = {n: 1.0 + (n > 10) for n in range(1, 99)}
    begin(epochs=1).fit()
    assert (shown[9], shown[10]) == ("2.72", "7.39")


@pytest.mark.parametrize("rnn_type", ["LSTM", "biLM"])
def test_the_longest_window_is_tried_and_leaves_no_trace(rnn_type, begin):
    params, lengths = make_params(rnn_type, rate=0.3), []
    run = begin(params)
    before = run.state_dict(), copy(params.parameters())
    run.objective.register_forward_pre_hook(lambda _, given: lengths.append(len(given[0])))
    run.try_longest_window()
    assert lengths == [10 + 25]
    assert same((run.state_dict(), copy(params.parameters())), before)
    assert all(p.grad is None for p in params.parameters())


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


def test_twenty_batches_in_a_row_with_too_high_a_loss_stop_the_run(begin, spy):
    high = math.log(50) + 1.01
    spy.losses = dict(enumerate([high] * 19 + [1.0] + [high] * 99, 1))
    with pytest.raises(InputError, match="in 20 batches in a row, up to batch 40; try a lower"):
        begin(bptt=1).fit()
    assert len(spy.steps) == 40


def test_continue_lets_a_finite_explosion_run_on_but_not_an_infinite_one(begin, spy):
    spy.losses = dict.fromkeys(range(30), 1e9) | {30: math.inf}
    with pytest.raises(InputError, match="the loss is inf at batch 30"):
        begin(bptt=1, on_divergence="continue").fit()


def test_rollback_halves_the_rate_three_times_at_most(begin, spy, capsys):
    run = begin(on_divergence="rollback", checkpoint_minutes=1e-9)
    run.is_due = lambda seconds=0: len(run.losses.on_host) in (0, 3)  # a state after each batch 3
    spy.losses = {6: math.nan, 8: math.nan}
    run.fit()
    out = capsys.readouterr().out
    assert "epoch 1, lr 5: the loss is nan at batch 6\n" in out
    assert "back to epoch 1, batch 3 with learning rate 2.5 (1 of 3 times)" in out
    assert run.optimizer.param_groups[0]["lr"] == 1.25
    assert len(run.records.splitlines()) == 3

    run.args.epochs, count = 4, len(spy.steps)
    spy.losses = {count + 2: math.nan, count + 4: math.nan}
    with pytest.raises(InputError, match=r"epoch 4, lr 0\.625: the loss is nan at batch 2"):
        run.fit()


def test_a_rollback_does_not_forget_the_best_loss(begin, spy):
    spy.valid_losses = [3, math.nan, 4, 4]
    run = begin(epochs=2, on_divergence="rollback")
    run.is_due = lambda seconds=0: False
    run.fit()
    assert run.rollbacks == 1
    assert read_checkpoint(run.args.save)["valid_loss"] == 3


def test_no_state_is_saved_with_a_weight_that_is_not_finite(begin):
    run = begin()
    run.save_state()
    before = read_state(run.args.save)
    with torch.no_grad():
        run.params[0].decoder.bias[0] = math.inf
    with pytest.raises(Diverged, match="weight is no longer finite"):
        run.save_state()
    assert same(read_state(run.args.save), before)
