"""A run against its definitions: what an epoch reads, NT-ASGD, what is saved, divergence."""

import copy
import math
from argparse import Namespace
from itertools import pairwise

import numpy as np
import pytest
import torch

import bidirectional
import train
from conftest import arguments, make_params, make_trainer
from data import Corpus, Dictionary, InputError, get_batch
from model import RNNModel
from checkpoint import read_state
from train import is_nonmonotone
from checkpoint import read_checkpoint

# ---------------------------------------------------------------- an epoch


def stream(ids):
    """A corpus of 50 words whose three splits are `ids`."""
    return Namespace(
        train=ids, valid=ids, test=ids, name="stream", digest="0",
        dictionary=Dictionary(map(str, range(50))),
    )


def test_an_epoch_trains_on_every_token_once(monkeypatch):
    ids = torch.arange(46) % 50
    source = ids.view(2, 23).t()
    seen, last = [], set()
    monkeypatch.setattr(
        train, "get_batch", lambda *a, **k: seen.append(get_batch(*a, **k)) or seen[-1]
    )
    for seed in range(30):
        np.random.seed(seed)
        seen.clear()
        run = make_trainer(make_params(), stream(ids), arguments(bptt=5, batch_size=2))
        run.train_epoch()
        assert torch.equal(torch.cat([words for words, _ in seen]), source[:-1])
        assert torch.equal(torch.cat([targets for _, targets in seen]), source[1:].flatten())
        assert math.isfinite(run.losses.mean())
        assert all(p.isfinite().all() for p in run.params.parameters())
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
    ids = torch.randint(50, (180,))
    make_trainer(make_params(rnn_type), stream(ids), arguments(batch_size=3)).train_epoch()

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
    fired = [i for i, loss in enumerate(losses) if is_nonmonotone(losses[:i], loss, nonmono)]
    assert (fired[0] if fired else None) == switch


@pytest.fixture
def corpus(corpus_dir):
    return Corpus(corpus_dir)


def spy_on_steps(monkeypatch):
    """Records the weights after each step, and the weights at each evaluation."""
    iterates, evaluated = [], []
    step, score = train.train_step, bidirectional.evaluate

    def recorded_step(params, *rest):
        result = step(params, *rest)
        assert all(module.training for module in params.modules())
        iterates.append([p.detach().double().clone() for p in params.parameters()])
        return result

    def recorded_evaluate(params, *rest):
        evaluated.append(([p.detach().clone() for p in params.parameters()], len(iterates)))
        return score(params, *rest)

    monkeypatch.setattr(train, "train_step", recorded_step)
    monkeypatch.setattr(bidirectional, "evaluate", recorded_evaluate)
    return iterates, evaluated


def plain_mean(iterates):
    return [sum(each) / len(iterates) for each in zip(*iterates)]


def assert_weights(found, expected):
    for f, e in zip(found, expected):
        torch.testing.assert_close(f.double(), e.double(), rtol=1e-4, atol=1e-6)


def test_nt_asgd_evaluates_and_saves_the_mean_since_the_switch(corpus, tmp_path, monkeypatch):
    iterates, evaluated = spy_on_steps(monkeypatch)
    hand_made = HandMade(bidirectional.evaluate, [5, 4, 6, 3, 2])
    monkeypatch.setattr(bidirectional, "evaluate", hand_made)
    args = arguments(epochs=5, nonmono=1, save=str(tmp_path / "m.pt"))
    params = make_params(ntoken=len(corpus.dictionary), rate=0.2, splits=(3,))
    make_trainer(params, corpus, args).fit()
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
    hand_made = HandMade(bidirectional.evaluate, [3, 4, 5, 9, 9])
    monkeypatch.setattr(bidirectional, "evaluate", hand_made)
    args = arguments(epochs=5, nonmono=1, save=str(tmp_path / "m.pt"))
    params = make_params(ntoken=len(corpus.dictionary))
    make_trainer(params, corpus, args, best=3.5, finetuning=True).fit()
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
    hand_made = HandMade(bidirectional.evaluate, [4, 3, 5, 6])
    monkeypatch.setattr(bidirectional, "evaluate", hand_made)
    args = arguments(epochs=4, when=[1, 3], lr=2.0, save=str(tmp_path / "m.pt"))
    make_trainer(make_params(ntoken=len(corpus.dictionary)), corpus, args).fit()
    assert read_checkpoint(args.save)["epoch"] == 2
    assert sorted(set(rates)) == pytest.approx([0.02, 0.2, 2.0])
    assert rates == sorted(rates, reverse=True)
    assert read_checkpoint(f"{args.save}.e1")["epoch"] == 1
    assert read_checkpoint(f"{args.save}.e3")["valid_loss"] == 5


# ---------------------------------------------------------------- divergence


@pytest.fixture
def sabotage(monkeypatch):
    """A function: from the step of the given number on (1 is the next), losses are as given."""
    step, planned, calls = train.train_step, {}, []

    def sabotaged(params, *rest):
        loss, hidden = step(params, *rest)
        calls.append(1)
        return loss * 0 + planned.get(len(calls), loss), hidden

    def plan(losses, first):
        calls.clear()
        planned.clear()
        planned.update(enumerate(losses, first))

    monkeypatch.setattr(train, "train_step", sabotaged)
    plan.calls = calls
    return plan


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(
    corpus, tmp_path, sabotage, monkeypatch
):
    monkeypatch.setattr(trainer, "COST", math.inf)  # save at every chance
    args = arguments(epochs=1, save=str(tmp_path / "m.pt"), log_interval=1000, clip=0.0)
    params = make_params(ntoken=len(corpus.dictionary))
    np.random.seed(3)
    make_trainer(copy.deepcopy(params), corpus, args).fit()
    first_epoch = len(sabotage.calls)
    sabotage([math.nan], first_epoch + 4)
    np.random.seed(3)
    args.epochs = 3
    with pytest.raises(InputError, match="epoch 2, lr 5: the loss is nan at batch 4; try") as e:
        make_trainer(params, corpus, args).fit()
    assert "--clip 0.25" in str(e.value)
    assert "m.pt keeps the best model so far" in str(e.value)
    assert "main.py --resume" in str(e.value)
    assert "--lr 2.5 goes on from the last good state (epoch 2, batch 0)" in str(e.value)
    assert read_checkpoint(args.save)["epoch"] == 1
    state = read_state(args.save)
    assert (state["epoch"], state["losses"]) == (2, [])
    assert all(torch.isfinite(weights).all() for weights in state["model"].values())


def too_high(corpus):
    return math.log(len(corpus.dictionary)) + 1.01


def test_twenty_batches_in_a_row_with_too_high_a_loss_stop_the_run(corpus, tmp_path, sabotage):
    args = arguments(save=str(tmp_path / "m.pt"), bptt=5)
    params = make_params(ntoken=len(corpus.dictionary))
    sabotage([too_high(corpus)] * 20, 7)
    with pytest.raises(InputError, match=r"ln\(vocabulary\) \+ 1 = .* in 20 batches in a row, "
                                         "up to batch 26; try a lower --lr"):
        make_trainer(params, corpus, args).fit()
    assert len(sabotage.calls) == 26


def test_nineteen_do_not(corpus, tmp_path, sabotage):
    args = arguments(save=str(tmp_path / "m.pt"), bptt=5, epochs=1)
    sabotage([too_high(corpus)] * 19 + [1.0] + [too_high(corpus)] * 19, 1)
    make_trainer(make_params(ntoken=len(corpus.dictionary)), corpus, args).fit()
    assert len(sabotage.calls) > 39


def test_continue_lets_a_finite_explosion_run_on_but_not_a_nan(corpus, tmp_path, sabotage):
    args = arguments(save=str(tmp_path / "m.pt"), bptt=5, epochs=1, on_divergence="continue")
    sabotage([1e9] * 10_000, 1)
    make_trainer(make_params(ntoken=len(corpus.dictionary)), corpus, args).fit()
    sabotage([math.inf], 30)
    with pytest.raises(InputError, match="the loss is inf at batch 30"):
        make_trainer(make_params(ntoken=len(corpus.dictionary)), corpus, args).fit()


def test_rollback_halves_the_rate_three_times_at_most(corpus, tmp_path, sabotage, capsys):
    args = arguments(
        save=str(tmp_path / "m.pt"), epochs=3, on_divergence="rollback", checkpoint_minutes=1e-9
    )
    params = make_params(ntoken=len(corpus.dictionary))
    run = make_trainer(params, corpus, args)
    run.is_due = lambda seconds=0: len(run.losses.on_host) in (0, 3)  # a state after each batch 3
    sabotage([math.nan, 2.0, math.nan], 6)
    run.fit()
    out = capsys.readouterr().out
    assert "Divergence: epoch 1, lr 5: the loss is nan at batch 6" in out
    assert "Going back to epoch 1, batch 3 with learning rate 2.5 (1 of 3 times)" in out
    assert "Divergence: epoch 1, lr 2.5: the loss is nan at batch 5" in out
    assert "Going back to epoch 1, batch 3 with learning rate 1.25 (2 of 3 times)" in out
    assert run.optimizer.param_groups[0]["lr"] == 1.25
    assert run.rollbacks == 2
    assert len(run.records.splitlines()) == 3

    sabotage([math.nan] * 10, 6)
    with pytest.raises(InputError, match=r"lr 0\.625: the loss is nan at batch"):
        make_trainer(make_params(ntoken=len(corpus.dictionary)), corpus, args).fit()
    assert len(sabotage.calls) == 9  # the first, and one for each of three rollbacks


def test_no_state_is_saved_with_a_weight_that_is_not_finite(corpus, tmp_path):
    args = arguments(save=str(tmp_path / "m.pt"), epochs=1)
    run = make_trainer(make_params(ntoken=len(corpus.dictionary)), corpus, args)
    run.save_state()
    before = (tmp_path / "m.pt.state").read_bytes()
    with torch.no_grad():
        run.params[0].decoder.bias[0] = math.inf
    with pytest.raises(trainer.Diverged, match="weight is no longer finite"):
        run.save_state()
    assert (tmp_path / "m.pt.state").read_bytes() == before


def test_a_gpu_is_not_waited_for_within_a_step():
    """Losses.read(ahead=1) leaves the newest alone: reading it would wait for its step."""
    losses = trainer.Losses()
    unread = torch.empty((), device="meta")  # a tensor that cannot be read at all
    losses.add(torch.tensor(1.5), 10)
    losses.add(unread, 10)
    assert losses.read(ahead=1) == [1.5]
    assert losses.read(ahead=1) == []
    losses.on_the_way.pop()
    losses.add(torch.tensor(2.5), 30)
    assert losses.read() == [2.5]
    assert losses.mean() == pytest.approx(2.25)
    assert losses.mean(last=1) == 2.5


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("rnn_type", ["LSTM", "biLM"])
def test_the_longest_window_is_tried_and_leaves_no_trace(rnn_type, monkeypatch):
    losses, lengths = [], []
    monkeypatch.setattr(
        train, "get_batch", lambda *a, **k: lengths.append(k["seq_len"]) or get_batch(*a, **k)
    )
    for tried in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        params = make_params(rnn_type, rate=0.3)
        run = make_trainer(params, stream(torch.arange(500) % 50), arguments(epochs=1))
        lengths.clear()
        if tried:
            run.try_longest_window()
            assert set(lengths) == {10 + 25}
            assert all(p.grad is None for p in params.parameters())
        run.train_epoch()
        losses.append(run.losses.on_host)
    assert losses[0] == losses[1]
