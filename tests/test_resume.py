"""--resume: bit for bit where nothing changed, refused or announced where something did."""

import copy
import math
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bidirectional
import main
import train
from conftest import Interrupting, arguments, invoke, make_params, make_trainer
from data import Corpus, InputError
from kill_loop import lines, same
from utils import Preempted
from properties import TRIES, repeated
from utils import get_generators, set_generators
from checkpoint import read_state
from checkpoint import read_checkpoint

# ---------------------------------------------------------------- bit for bit


def train_in_parts(
    folder, corpus_dir, points, finetuning, optimizer, rnn_type="LSTM", attention="none", **changes
):
    """Trains 4 epochs, ended at each of `points` and resumed by objects made anew.

    `changes` are flags that are another way. Returns (last state, checkpoint, log of losses, calls
    of `check`, number of parts).
    """
    folder.mkdir()
    corpus = Corpus(corpus_dir)
    args = arguments(**{
        "epochs": 4, "nonmono": 1, "save": str(folder / "m.pt"), "optimizer": optimizer,
        "when": [2], "lr": 5.0 if optimizer == "sgd" else 1e-3, **changes,
    })
    check, parts = Interrupting(*points), 0
    while True:
        seed = 1 if parts == 0 else 1000 + parts  # what a new process draws has no influence
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        params = make_params(
            rnn_type, len(corpus.dictionary), rate=0.3, splits=(4,), attention=attention
        )
        run = make_trainer(params, corpus, args, check, finetuning=finetuning)
        if parts:
            run.resume(read_state(args.save), args.save)
        parts += 1
        try:
            run.fit()
        except Preempted:
            continue
        ended = read_state(args.save), read_checkpoint(args.save), lines(run.records)
        return *ended, check.calls, parts


@pytest.mark.parametrize(
    ("tries", "finetuning", "optimizer", "rnn_type", "attention"),
    [
        (12, False, "sgd", "LSTM", "none"), (12, True, "sgd", "GRU", "none"),
        (12, False, "adam", "biLSTM", "none"), (6, False, "sgd", "biLM", "none"),
        (6, False, "sgd", "LSTM", "combined"),
    ],
)
def test_interrupted_anywhere_and_resumed_it_is_the_same_run(
    tries, finetuning, optimizer, rnn_type, attention, corpus_dir, tmp_path_factory, monkeypatch
):
    """At random batches and evaluation windows, up to five times, averaging switched on between."""
    how = (finetuning, optimizer, rnn_type, attention)
    if not finetuning:  # SGD is averaged from epoch 3 on
        monkeypatch.setattr(trainer, "nonmonotone", lambda logs, loss, nonmono: len(logs) == 1)
    folders = tmp_path_factory.mktemp("resumed")
    whole = train_in_parts(folders / "whole", corpus_dir, (), *how)
    assert whole[-1] == 1
    assert (whole[0]["average"] is not None) == (finetuning or optimizer == "sgd")

    @settings(parent=repeated, max_examples=TRIES or tries)
    @given(st.sets(st.integers(1, whole[-2]), min_size=1, max_size=5))
    def check(points):
        folder = tmp_path_factory.mktemp("parts") / "parts"
        state, checkpoint, records, _, parts = train_in_parts(folder, corpus_dir, points, *how)
        assert parts > 1
        for found, expected in ((state, whole[0]), (checkpoint, whole[1])):
            found["flags"]["save"] = expected["flags"]["save"]
            assert same(found, expected)
        assert records == whole[2]

    check()


def test_what_is_compared_would_differ_if_anything_did(corpus_dir, tmp_path):
    """The comparison above is no tautology: lose any one part of the state and it fails."""
    corpus = Corpus(corpus_dir)
    args = arguments(epochs=2, nonmono=0, save=str(tmp_path / "m.pt"))

    def run_on(change):
        run = make_trainer(
            make_params(ntoken=len(corpus.dictionary), rate=0.3), corpus, args, finetuning=True,
        )
        state = copy.deepcopy(half)
        change(state)
        run.load_state_dict(state)
        run.saved = True
        run.fit()
        return run.state_dict()

    args.save = str(tmp_path / "m.pt")
    run = make_trainer(
        make_params(ntoken=len(corpus.dictionary), rate=0.3), corpus, args, Interrupting(8),
        finetuning=True,
    )
    with pytest.raises(Preempted):
        run.fit()
    half = read_state(args.save)
    reference = run_on(lambda state: None)
    assert same(run_on(lambda state: None), reference)

    def forget_averages(state):
        state["average"]["count"] += 1

    def forget_generators(state):
        state["generators"] = get_generators(torch.device("cpu"))

    def forget_hidden(state):
        state["hidden"] = [[torch.zeros_like(h) for h in pair] for pair in state["hidden"]]

    def forget_losses(state):
        state["losses"] = state["losses"][1:]

    def forget_position(state):
        state["row"] += 1

    for forget in (
        forget_averages, forget_generators, forget_hidden, forget_losses, forget_position,
    ):
        changed = run_on(forget)
        assert not same(changed, reference) or changed["records"] != reference["records"], forget


def test_generators_go_on_from_where_they_were():
    device = torch.device("cpu")

    def draw():
        return random.random(), np.random.normal(), np.random.random(), torch.randn(3).tolist()

    np.random.normal()  # numpy's keeps the second of a pair for the next call
    state = get_generators(device)
    first = draw()
    assert draw() != first
    set_generators(state, device)
    assert draw() == first


def test_a_state_is_plain_data(trained):
    from test_commands import plain_data

    state = torch.load(trained.with_name("trained.pt.state"), weights_only=True)
    state["optimizer"]["state"] = {str(k): v for k, v in state["optimizer"]["state"].items()}
    state["losses"] = [list(pair) for pair in state["losses"]]
    for group in state["optimizer"]["param_groups"]:
        group.pop("betas", None)
    assert plain_data(state)


# ---------------------------------------------------------------- when it is saved


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(train.time, "perf_counter", lambda: self.now)


def test_the_state_is_due_by_the_clock_and_by_what_saving_costs(corpus_dir, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    corpus = Corpus(corpus_dir)
    args = arguments(save=str(tmp_path / "m.pt"), checkpoint_minutes=0.5)
    run = make_trainer(make_params(ntoken=len(corpus.dictionary)), corpus, args)
    write = run.saver.write

    def slow_write(*a):
        clock.now += 0.2  # a save costs 0.2 s: not before 20 s have passed
        return write(*a)

    run.saver.write = slow_write
    assert run.save_state()
    for passed, at_epochs_end, within in [(19.9, False, False), (20.1, True, False),
                                          (29.9, True, False), (30.1, True, True)]:
        clock.now = 1000.2 + passed
        assert (run.is_due(), run.is_due(60 * args.checkpoint_minutes)) == (at_epochs_end, within)
    run.cost = 0.4  # 40 s
    assert not run.is_due(30)
    clock.now = 1000.2 + 40.1
    assert run.is_due(30)
    run.above = 1  # not a good state to come back to
    assert not run.is_due(30)
    args.on_divergence = "continue"
    assert run.is_due(30)


def test_mid_epoch_saves_follow_checkpoint_minutes(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "COST", math.inf)
    corpus = Corpus(corpus_dir)
    rows = {}
    for minutes in (1e-9, 1000.0):
        args = arguments(save=str(tmp_path / f"{minutes}.pt"), checkpoint_minutes=minutes, epochs=1)
        run = make_trainer(make_params(ntoken=len(corpus.dictionary)), corpus, args)
        seen = rows.setdefault(minutes, [])
        save = run.save_state
        run.save_state = lambda run=run, save=save, seen=seen: seen.append(run.row) or save()
        run.fit()
    assert rows[1000.0] == [0, 0]  # at the start, and at the epoch's end
    assert len(rows[1e-9]) > 20
    assert rows[1e-9][1:-1] == sorted(set(rows[1e-9][1:-1]))


def test_a_failed_save_is_reported_and_retried_and_ends_nothing(corpus_dir, tmp_path, capsys,
                                                                 monkeypatch):
    """The folder vanishes in epoch 2 and is back in epoch 4: the best model of then is written."""
    monkeypatch.setattr(trainer, "COST", math.inf)
    corpus = Corpus(corpus_dir)
    folder = tmp_path / "folder"
    folder.mkdir()
    args = arguments(epochs=5, save=str(folder / "m.pt"))
    run = make_trainer(make_params(ntoken=len(corpus.dictionary)), corpus, args)
    monkeypatch.setattr(
        bidirectional, "evaluate", lambda *a: {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.0, 5: 4.0}[run.epoch]
    )
    end_epoch = run.end_epoch

    def vanish():
        if run.epoch == 2:
            shutil.rmtree(folder)
        if run.epoch == 4:
            folder.mkdir()
        end_epoch()

    run.end_epoch = vanish
    run.fit()
    err = capsys.readouterr().err
    assert f"Warning: {args.save}: cannot be written (No such file or directory); the next" in err
    assert "Traceback" not in err
    assert read_checkpoint(args.save)["epoch"] == 2  # made when there was no folder
    assert read_state(args.save)["epoch"] == 6
    assert len((folder / "m.pt.jsonl").read_text().splitlines()) == 5


def test_the_state_is_never_newer_than_the_checkpoint_it_speaks_of(corpus_dir, tmp_path,
                                                                   monkeypatch):
    corpus = Corpus(corpus_dir)
    args = arguments(epochs=1, save=str(tmp_path / "m.pt"))
    run = make_trainer(make_params(ntoken=len(corpus.dictionary)), corpus, args)
    write = trainer.Saver.retry.__globals__["write_atomically"]

    def no_checkpoints(path, content):
        if str(path) == args.save:
            raise InputError("full")
        write(path, content)

    monkeypatch.setitem(trainer.Saver.retry.__globals__, "write_atomically", no_checkpoints)
    run.fit()
    assert read_state(args.save)["best"] == math.inf  # of the start: no later one was written
    assert run.saver.pending.keys() == {args.save}


def test_the_last_model_that_cannot_be_written_is_tested_and_reported(
    corpus_dir, small, tmp_path, monkeypatch
):
    write = trainer.Saver.retry.__globals__["write_atomically"]
    path = tmp_path / "m.pt"

    def no_checkpoints(target, content):
        if str(target) == str(path):
            raise InputError(f"{target}: cannot be written (No space left on device)")
        write(target, content)

    monkeypatch.setitem(trainer.Saver.retry.__globals__, "write_atomically", no_checkpoints)
    status, out, err = invoke(
        main.main, "--data", corpus_dir, *small, "--epochs", 2, "--finetune", 1, "--save", path
    )
    assert status == 2
    assert "| End of training | test loss" in out
    assert err.splitlines()[-1] == (
        f"main.py: error: {path}: could not be written until the end; make room and train again"
    )
    assert not path.exists()
