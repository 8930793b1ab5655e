"""Resumed runs: bit for bit the same, with changed flags, or without their model."""

import math
import re
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import main
import train
from checkpoint import read_checkpoint, read_state
from conftest import (
    CHANGED, IDENTICAL, Interrupting, arguments, edit, files_at, invoke, make_params,
    make_trainer, outcome, refuse, stop, succeed,
)
from data import Corpus, InputError
from flags import differences
from kill_loop import lines, same
from properties import TRIES, repeated
from utils import Preempted, environment


# ---------------------------------------------------------------- bit for bit


def train_in_parts(
    folder, corpus_dir, points, finetuning, optimizer, rnn_type="LSTM", attention="none"
):
    """Trains 4 epochs, ended at each of `points` and resumed by objects made anew.

    Returns (last state, checkpoint, log of losses, calls of `check`, number of parts).
    """
    folder.mkdir()
    corpus = Corpus(corpus_dir)
    path = str(folder / "m.pt")
    args = arguments(**{
        "epochs": 4, "nonmono": 1, "save": path, "resume": path, "optimizer": optimizer,
        "partial_shuffle": True, "when": [2], "lr": 5.0 if optimizer == "sgd" else 1e-3,
    })
    check, parts = Interrupting(*points), 0
    while True:
        seed = 1000 + parts  # what a new process draws has no influence
        np.random.seed(seed), torch.manual_seed(seed)
        params = make_params(
            rnn_type, len(corpus.dictionary), rate=0.3, splits=(4,), attention=attention
        )
        trainer = make_trainer(params, corpus, args, check, finetuning=finetuning)
        if parts:
            trainer.resume(read_state(path), [])
        parts += 1
        try:
            trainer.fit()
        except Preempted:
            continue
        return *outcome(path), check.calls, parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tries", "how"),
    [
        (12, (False, "sgd")), (12, (True, "sgd", "GRU")), (12, (False, "adam", "biLSTM")),
        (6, (False, "sgd", "biLM")), (6, (False, "sgd", "QRNN")),
        (6, (False, "sgd", "LSTM", "combined")),
    ],
)
def test_interrupted_anywhere_and_resumed_it_is_the_same_run(
    tries, how, corpus_dir, tmp_path_factory, monkeypatch
):
    """At random batches and evaluation windows, up to five times, averaging switched on between."""
    finetuning, optimizer, *_ = how
    if not finetuning:  # SGD is averaged from epoch 3 on
        monkeypatch.setattr(train, "is_nonmonotone", lambda losses, *_: len(losses) == 1)
    *whole, calls, parts = train_in_parts(
        tmp_path_factory.mktemp("runs") / "whole", corpus_dir, (), *how
    )
    assert parts == 1
    assert (whole[0]["average"] is not None) == (finetuning or optimizer == "sgd")

    @settings(parent=repeated, max_examples=TRIES or tries)
    @given(st.sets(st.integers(1, calls), min_size=1, max_size=5))
    def check(points):
        folder = tmp_path_factory.mktemp("runs") / "parts"
        *found, _, parts = train_in_parts(folder, corpus_dir, points, *how)
        assert parts > 1
        assert same(found, whole)

    check()


# ---------------------------------------------------------------- flags of a resumed run




def test_resume_needs_no_other_flag_and_the_same_may_be_repeated(unfinished, tmp_path):
    path, flags = unfinished
    twin = tmp_path / "elsewhere" / "run.pt"
    twin.parent.mkdir()
    for file in files_at(path):
        shutil.copy(file, twin.parent)
    link = tmp_path / "link.pt"  # a symbolic link names the run of its target
    link.symlink_to(path)
    out = succeed("--resume", link)
    assert f"Resuming the run of {path} at epoch 2, batch" in out
    assert IDENTICAL in out
    assert out.count("end of epoch") == 2
    assert not list(tmp_path.glob("link.pt.*"))
    assert len(lines((tmp_path / "run.pt.jsonl").read_text())) == 3
    out = succeed(*flags[:-1], twin, "--resume", twin, "--log-interval", 3)
    assert IDENTICAL in out
    assert same(outcome(path), outcome(twin))


BEFORE = {
    "lr": 5.0, "bias_lr": 1.0, "wdecay": 1.2e-6, "dropout": 0.4, "dropoute": 0.1, "wdrop": 0.5,
    "bptt": 10, "nonmono": 0,
}


@pytest.mark.parametrize(
    ("flag", "value"),
    [("lr", 1.5), ("bias_lr", 0.5), ("wdecay", 0.0), ("dropout", 0.1), ("dropoute", 0.0),
     ("wdrop", 0.25), ("bptt", 12), ("nonmono", 7)],
)
def test_a_changed_flag_takes_effect_and_is_announced(flag, value, unfinished, monkeypatch):
    path, _ = unfinished
    effective = {}

    def spy(trainer):
        (others, biases), model = trainer.optimizer.param_groups, trainer.params[0]
        effective.update(
            lr=others["lr"], bias_lr=biases["lr"] / others["lr"], dropout=model.dropout,
            wdecay=others["weight_decay"], dropoute=model.dropoute,
            wdrop=model.rnns[0].dropout, bptt=trainer.args.bptt, nonmono=trainer.args.nonmono,
        )
        raise OSError  # killed before the next save

    monkeypatch.setattr(train.Trainer, "train_epoch", spy)
    status, out, _ = invoke(
        main.main, "--resume", path, f"--{flag.replace('_', '-')}", value, "--epochs", 9
    )
    assert status == 2
    note = f"Note: {CHANGED}{flag} {BEFORE[flag]} -> {value}\n"
    assert note in out
    assert note in invoke(main.main, "--resume", path)[1]  # the state remembers it
    assert effective == {**BEFORE, flag: value}
    flags = read_state(path)["flags"]
    assert {name: flags[name] for name in BEFORE} == effective
    assert flags["epochs"] == 9


@pytest.mark.parametrize("state", [{}, {"best": math.inf}])
def test_a_run_that_changes_keeps_its_better_model(state, unfinished):
    """The model can be newer than the state, even that of a run whose state has none yet."""
    path, _ = unfinished
    edit(path, valid_loss=0.1)
    edit(path.with_name("run.pt.state"), **state)
    content = path.read_bytes()
    assert "Saving" not in succeed("--resume", path, "--lr", 1.5)
    assert path.read_bytes() == content


def test_a_run_of_a_gpu_continues_without_one(trained, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = read_state(trained)["flags"]
    flags |= {"device": "cuda:1", "precision": "tf32", "cuda_graphs": True}
    edit(trained.with_name("trained.pt.state"), flags=flags)
    args, _ = main.parse_args(["--resume", str(trained)])
    assert (str(args.device), args.precision, args.cuda_graphs) == ("cpu", "fp32", False)


def test_cuda_overrides_the_device_of_a_resumed_run(unfinished, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args, _ = main.parse_args(["--resume", str(unfinished[0]), "--cuda"])
    assert args.device == torch.device("cuda")


@pytest.mark.parametrize(
    ("change", "epochs"),
    [(["--epochs", 5], 4), (["--finetune", 1], 3), (["--log-interval", 3], 2),
     (["--checkpoint-minutes", 0.5], 2), (["--on-divergence", "rollback"], 2)],
)
def test_flags_that_may_change_keep_the_run_bit_identical(change, epochs, unfinished):
    out = succeed("--resume", unfinished[0], *change)
    assert IDENTICAL in out
    assert out.count("end of epoch") == epochs


def test_other_threads_or_another_card_are_announced(unfinished, monkeypatch):
    state, device = read_state(unfinished[0]), torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A")
    state["environment"] = {**environment(device), "threads": 99}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B")
    found = differences(state, state["flags"], device)
    assert "hardware cuda (NVIDIA A, cuDNN 91300) -> cuda (NVIDIA B, cuDNN 91300)" in found
    assert f"threads 99 -> {torch.get_num_threads()}" in found


@pytest.mark.parametrize("ranks", [2, 3])
def test_more_than_two_processes_are_not_called_bit_identical(ranks, unfinished, monkeypatch):
    monkeypatch.setattr("distributed.size", lambda: ranks)
    state, cpu = read_state(unfinished[0]), torch.device("cpu")
    state["environment"] = environment(cpu)
    assert len(differences(state, state["flags"], cpu)) == ranks - 2


def test_what_cannot_change_is_refused_by_name(unfinished):
    path, _ = unfinished
    before = files_at(path)
    for change in (
        "--nhid 14", "--model GRU", "--nlayers 1", "--emsize 10", "--batch_size 5", "--seed 5",
        "--optimizer adam", "--objective cloze", "--decoder-bias unigram", "--recipe fast",
        "--embeddings vectors.txt", "--attention single", "--attention-window 5",
    ):
        err = refuse("--resume", path, *change.split())
        assert f"{change}: " in err and "leave the flag out" in err
    assert files_at(path) == before


@pytest.mark.parametrize("sentence", ["the bob", "a zebra"])
def test_other_data_is_refused_by_name(sentence, unfinished, corpus_dir, tmp_path):
    path, _ = unfinished
    other = tmp_path / "other"
    shutil.copytree(corpus_dir, other)
    with open(other / "train.txt", "a") as file:
        file.write(f"ann sees {sentence}\n")
    err = refuse("--resume", path, "--data", other)
    assert f"--data {other}: its text is not that of the run of {path}" in err
    shutil.copy(corpus_dir / "train.txt", other)  # the same text by another name is the same data
    assert IDENTICAL in succeed("--resume", path, "--data", other)


def test_a_warm_start_takes_the_weights_and_the_flags_given(trained, corpus_dir, tmp_path):
    trained.with_name("trained.pt.state").unlink()
    save, flags = tmp_path / "new.pt", ["--resume", trained, "--data", corpus_dir, "--epochs", 1]
    flags += ["--batch_size", 4]
    out = succeed(*flags, "--save", save, "--recipe", "slow-biases", "--lr", 1e-9, "--wdecay", 0)
    assert "Recipe slow-biases: --bias-lr 0.01\n" in out
    assert f"Warm start from the weights of {trained}: no run of" in out
    before, after = read_checkpoint(trained), read_checkpoint(save)
    assert after["architecture"] == before["architecture"]
    assert after["valid_loss"] == pytest.approx(before["valid_loss"], abs=1e-4)
    assert (after["flags"]["lr"], after["flags"]["bptt"]) == (1e-9, 70)
    assert "leave the flag out" in refuse(*flags, "--decoder-bias", "unigram")
    content = trained.read_bytes()  # a warm start onto itself renames the model
    assert f"{trained}.old" in succeed(*flags, "--save", trained)
    assert trained.with_name("trained.pt.old").read_bytes() == content


def test_a_warm_start_keeps_the_objective_and_no_other_flag_of_training(trained):
    trained.with_name("trained.pt.state").unlink()
    held = read_checkpoint(trained)
    edit(trained, flags={**held["flags"], "objective": "both", "clip": 9.0},
         architecture={**held["architecture"], "rnn_type": "biLM"})
    args, state = main.parse_args(["--resume", str(trained), "--epochs", "1"])
    assert (state, args.objective, args.data) == (None, "both", held["flags"]["data"])
    assert args.clip == 0.25


def test_a_finished_run_says_so_and_more_epochs_extend_it(trained, corpus_dir, small, tmp_path):
    content = trained.read_bytes()
    out = succeed("--resume", trained)
    assert "The run is finished; a higher --epochs extends it" in out
    assert "| End of training | test loss" in out
    assert trained.read_bytes() == content
    succeed("--resume", trained, "--epochs", 2)  # as if two had been asked for at once
    whole = tmp_path / "whole.pt"
    succeed("--data", corpus_dir, *small, "--epochs", 2, "--save", whole)
    assert same(outcome(trained), outcome(whole))


def test_the_new_flags_of_a_finished_run_survive_an_interruption(trained):
    stop([1], "--resume", trained, "--finetune", 1)  # in the test
    assert "Fine-tuning" in succeed("--resume", trained)


def test_a_run_that_cannot_begin_leaves_the_older_one_in_place(unfinished, monkeypatch):
    path, flags = unfinished
    before = files_at(path)
    monkeypatch.setattr(train, "make_compute", Mock(side_effect=InputError("--cuda-graphs: not")))
    assert "--cuda-graphs: not" in refuse(*flags)
    assert files_at(path) == before


def test_a_state_in_place_of_its_checkpoint_is_named(unfinished):
    err = refuse("--resume", f"{unfinished[0]}.state")
    assert "run.pt.state: is a training state; name its checkpoint, without .state" in err


def test_a_fork_leaves_the_first_run_alone_and_replaces_no_model(unfinished, trained, tmp_path):
    path, _ = unfinished
    before = files_at(path), files_at(trained)
    assert f"--save {trained}: already exists" in refuse("--resume", path, "--save", trained)
    fork = tmp_path / "fork.pt"
    assert IDENTICAL in succeed("--resume", path, "--save", fork)
    assert (files_at(path), files_at(trained)) == before
    succeed("--resume", path)
    assert same(outcome(path), outcome(fork))
    assert lines((tmp_path / "fork.pt.jsonl").read_text()) == outcome(path)[-1]
    of_finished = tmp_path / "again.pt"
    succeed("--resume", path, "--save", of_finished)
    assert "at epoch 4, batch 0" in succeed("--resume", of_finished, "--epochs", 4)


# ---------------------------------------------------------------- the checkpoint on disk


def test_a_run_of_which_only_the_state_exists(corpus_dir, small, tmp_path):
    """Ended in its first epoch, there is no best model yet; if it has been lost, that is said."""
    path = tmp_path / "m.pt"
    stop([5], "--data", corpus_dir, *small, "--epochs", 1, "--save", path)
    assert [file.name for file in files_at(path)] == ["m.pt.state"]
    succeed("--resume", path)
    assert read_checkpoint(path)["epoch"] == 1
    path.unlink()
    assert f"{path}: the model of this finished run is missing" in refuse("--resume", path)
    status, out, err = invoke(main.main, "--resume", path, "--epochs", 2)
    assert status == 0
    assert f"Warning: {path} (valid loss " in err
    assert f"{CHANGED}{path} (valid loss" in out
    assert read_checkpoint(path)["epoch"] == 2


def test_a_checkpoint_of_another_run_or_damaged_is_refused(unfinished, tmp_path):
    path, flags = unfinished
    other = tmp_path / "other.pt"
    succeed(*flags[:-1], other, "--nhid", 14)
    shutil.copy(path, other)
    err = refuse("--resume", other, "--epochs", 9)
    assert f"{other}: its architecture does not match the training state beside it" in err
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    for more in ([], ["--save", tmp_path / "fork.pt"]):
        err = refuse("--resume", path, *more)
        assert re.search(f"{path}:? is damaged", err)
        assert path.read_bytes() == content[:-1]
        assert not list(tmp_path.glob("fork*"))


def test_out_of_memory_in_the_middle_of_a_run_names_what_resumes_it(
    corpus_dir, small, tmp_path, monkeypatch
):
    path, step, left = tmp_path / "m.pt", train.train_step, [0]

    def fail(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", fail)
    argv = ["--data", corpus_dir, *small, "--epochs", 2, "--save", path]
    left[0] = 1  # nothing to go on from
    assert "out of memory; lower --batch_size" in refuse(*argv)
    left[0] = 50
    status, _, err = invoke(main.main, *argv)
    assert (status, err.count("\n")) == (2, 1)
    assert "out of memory at epoch 2, batch " in err
    command = re.search(r"python main.py (--resume .*? --bptt 7) resumes", err)[1]
    out = succeed(*command.split())
    assert "bptt 10 -> 7" in out and "| End of training |" in out
