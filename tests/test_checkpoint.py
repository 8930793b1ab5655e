"""Files that are whole, sealed and plain data; one run to a path; runs that go on bit for bit."""

import contextlib
import hashlib
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import finetune
import main
import train
from checkpoint import (
    DIGEST, VERSION, Run, build_params, copy_base, how_to_resume, is_sealed, keep_older_run, load,
    pack, read_checkpoint, read_state, run_lock, unpack, write_atomically,
)
from conftest import (
    ROOT, Interrupting, arguments, invoke, make_params, make_trainer, succeed,
)
from data import SPLITS, Corpus, InputError
from flags import differences
from kill_loop import lines, same
from properties import TRIES, repeated
from utils import Preempted, environment

IDENTICAL = "The resumed run is bit-identical to an uninterrupted run"
CHANGED = "no longer bit-identical to an uninterrupted run: "


def refuse(*argv, command=main.main):
    """Runs a command that must be refused before it trains; returns the line that says why."""
    status, out, err = invoke(command, *argv)
    assert (status, err.count("\n"), "end of epoch" in out) == (2, 1, False), err
    return err


def stop(points, *argv, command=main.main):
    """Runs a command that is ended by a signal at these calls of `check`; returns its output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.Preemption.check_signals", Interrupting(*points))
        status, out, err = invoke(command, *argv)
    assert (status, err) == (143, "")
    return out


def files_at(path):
    """{path: bytes} of a run's files."""
    return {file: file.read_bytes() for file in path.parent.glob(f"{path.name}*")}


def outcome(path):
    """What a run has left."""
    state = read_state(path)
    return state, read_checkpoint(path), lines(state["records"])


@pytest.fixture
def new_trainer(corpus_dir, tmp_path):
    """A function that makes a Trainer, which saves to m.pt, from flags."""
    corpus = Corpus(corpus_dir)

    def make(*check, rate=0.0, finetuning=False, **flags):
        params = make_params(ntoken=len(corpus.dictionary), rate=rate)
        args = arguments(save=str(tmp_path / "m.pt"), **flags)
        return make_trainer(params, corpus, args, *check, finetuning=finetuning)

    return make


def edit(path, **new):
    """Changes and seals what a checkpoint or a training state holds."""
    contents = {**torch.load(path, weights_only=True), **new}
    path.write_bytes(pack(contents["format"].removeprefix("awd-lstm "), contents))


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---------------------------------------------------------------- whole or absent


def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(path)
    write_atomically(path, b"old and longer")
    write_atomically(link, b"new")
    assert (path.read_bytes(), link.is_symlink()) == (b"new", True)
    monkeypatch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"newer")
    assert path.read_bytes() == b"new"
    assert sorted(tmp_path.iterdir()) == [path, link]


def test_file_and_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc here to name descriptors by")
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda n: events.append(os.readlink(f"/proc/self/fd/{n}")))
    monkeypatch.setattr(os, "replace", lambda *a: events.append("rename") or replace(*a))
    write_atomically(tmp_path / "file", b"x")
    assert events == [f"{tmp_path}/file.tmp", "rename", str(tmp_path)]


def test_backups_are_numbered(tmp_path):
    path = str(tmp_path / "m")
    for number, state in (("", b"1"), ("2", b"2")):
        write_atomically(path, b"model")
        write_atomically(f"{path}.state", state)
        assert copy_base(path) == f"{path}.base{number}"
        assert Path(f"{path}.base{number}.state").read_bytes() == state
    assert (tmp_path / "m.base").read_bytes() == b"model"


# ---------------------------------------------------------------- sealed data


def test_what_is_sealed_is_read_back(trained):
    """By torch, with or without mmap, and by zip, as any other file of torch's."""
    for mmap in (False, True):
        assert same(torch.load(trained, weights_only=True, mmap=mmap), read_checkpoint(trained))
    with zipfile.ZipFile(trained) as archive:
        assert archive.testzip() is None
        digest = hashlib.sha256(trained.read_bytes()[:-DIGEST]).hexdigest()
        assert archive.comment.decode() == f"sha256:{digest}"
    model, vocabulary = load(trained)
    assert (model.training, model.dropout, "ann" in vocabulary.word2idx) == (False, 0.4, True)
    assert read_checkpoint(trained).keys() - {"format", "version"} == {
        "model", "criterion", "splits", "architecture", "flags", "vocabulary", "corpus", "note",
        "epoch", "valid_loss", "averaged", "finetuned",
    }


SEALED = bytes(pack("checkpoint", {"model": torch.arange(50.0)}))


def flip(bit):
    damaged = bytearray(SEALED)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@settings(parent=repeated, max_examples=TRIES or 180)
@given(
    st.integers(0, 8 * len(SEALED) - 1).map(flip)
    | st.integers(0, len(SEALED) - 1).map(lambda size: SEALED[:size])
    | st.binary(max_size=300)
)
def test_a_flipped_bit_a_lost_end_or_foreign_bytes_are_refused(content):
    with pytest.raises(InputError, match=r"^name\.pt: is damaged, or not a checkpoint"):
        unpack("name.pt", "checkpoint", content=content)


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["pickle", "archive", "sealed archive", "old torch format"])
def test_a_crafted_pickle_is_refused_unexecuted(form, tmp_path, corpus_dir):
    path, proof = tmp_path / "crafted.pt", tmp_path / "executed"
    contents = {"format": "awd-lstm checkpoint", "version": VERSION, "model": Exploit(proof)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(contents))
    elif form == "sealed archive":
        path.write_bytes(pack("checkpoint", contents))
        assert is_sealed(path.read_bytes())
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=form == "archive")
    shutil.copy(path, f"{path}.state")
    for flag in ("--save", "--resume"):
        assert "crafted.pt" in refuse(flag, path, command=finetune.main)
        assert "crafted.pt" in refuse(flag, path, "--data", corpus_dir)
    with pytest.raises(InputError, match="crafted"):
        load(path)
    assert not proof.exists()
    with contextlib.suppress(RuntimeError):  # it would have worked
        torch.load(path, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize("suffix", ["", ".state"])
@pytest.mark.parametrize(
    ("edits", "message"),
    [(None, "is damaged"), ({"version": 999}, "of this version")],
)
def test_unusable_files_are_refused_by_name_and_left_alone(edits, message, suffix, trained):
    path = trained.with_name(trained.name + suffix)
    if edits:
        edit(path, **edits)
    else:  # without its seal
        torch.save(torch.load(path, weights_only=True), path)
    before = files_at(trained)
    if suffix:
        err = refuse("--resume", trained, "--epochs", 2)
    else:
        err = refuse("--save", trained, command=finetune.main)
        with pytest.raises(InputError, match=message):
            load(trained)
    assert f"{path}: " in err and message in err
    assert files_at(trained) == before


@pytest.mark.parametrize(
    ("kind", "message", "told"),
    [
        (MemoryError, "", "out of memory"),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory", "out of memory"),
        (RuntimeError, "CUDA error: no kernel image\nFor debugging", "no kernel image; the files"),
        (getattr(torch, "AcceleratorError", RuntimeError), "CUDA error: out of memory\nCompile",
         "cuda is out of memory;"),
    ],
)
def test_an_error_of_the_device_is_not_called_damage(kind, message, told, unfinished, monkeypatch):
    def fail(*args, **kwargs):
        raise kind(message)

    monkeypatch.setattr(torch, "load", fail)
    err = refuse("--resume", unfinished[0])
    assert "device" in err and told in err and "damaged" not in err


def test_a_mistyped_device_is_not_called_damage(trained):
    with pytest.raises(RuntimeError, match=r"device type .*: gpu"):
        load(trained, "gpu")


# ---------------------------------------------------------------- one run to a path


HOLD = """
import sys, time
from checkpoint import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_path_is_refused_while_another_run_holds_it(unfinished, tmp_path):
    path, flags = unfinished
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    for argv in (flags, ["--resume", path], [*flags, "--save", f"{tmp_path}/./run.pt"],
                 [*flags, "--save", link]):
        assert "in use by another process" in refuse(*argv)
    with run_lock(tmp_path / "other.pt"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    succeed("--resume", path)


def test_a_lock_whose_file_has_just_been_removed_is_not_held(tmp_path, monkeypatch):
    path, flock = tmp_path / "m.pt", checkpoint.fcntl.flock

    def after_its_removal(file, how):  # by a run that ended after this one had opened the file
        os.unlink(f"{path}.lock")
        flock(file, how)

    monkeypatch.setattr(checkpoint.fcntl, "flock", after_its_removal)
    with pytest.raises(InputError, match="in use"), run_lock(path):
        pass


def test_a_new_run_keeps_the_files_of_an_older_one(unfinished):
    path, flags = unfinished

    def contents(path):
        return [Path(f"{path}{end}").read_bytes() for end in ("", ".state", ".jsonl")]

    older, before = path.with_name("run.pt.old"), contents(path)
    out = succeed(*flags)
    assert f"is now {older}; python main.py --resume {older} continues it\n" in out
    assert contents(older) == before
    succeed("--resume", older)
    assert same(outcome(path), outcome(older))  # the same flags and seed: the same run

    finished, before = path.with_name("run.pt.old2"), contents(path)
    out = stop([1], *flags)
    assert f"is now {finished}\n" in out
    assert contents(finished) == before
    # What follows is compared with nothing older.
    assert "Saving model" in succeed("--resume", path, "--lr", 4)


@pytest.mark.parametrize(
    ("seconds", "losses", "is_kept"), [(59.0, [], False), (61.0, [], True), (0.1, [3.0], True)]
)
def test_a_run_without_a_model_is_kept_if_it_has_begun(seconds, losses, is_kept, unfinished):
    path, _ = unfinished
    path.unlink()
    edit(path.with_name("run.pt.state"), seconds=seconds, valid_losses=losses)
    for end in (".base", ".e2"):
        path.with_name(f"run.pt{end}").write_bytes(b"")
    keep_older_run(path, [2])
    renamed = {file.suffix for file in files_at(path.with_name("run.pt.old"))}
    assert renamed == ({".state", ".jsonl", ".base", ".e2"} if is_kept else set())


def test_the_shown_command_works_for_names_with_spaces():
    assert how_to_resume("main.py", "my model.pt") == "python main.py --resume 'my model.pt'"


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


# ---------------------------------------------------------------- when a state is saved


def test_the_state_is_due_by_the_clock_and_by_what_saving_costs(new_trainer, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    trainer = new_trainer()

    def save_state(*args):
        now[0] += 0.2  # so not before 20 s have passed
        return True

    trainer.run.save_state = save_state
    assert trainer.save_state()
    for passed, at_epochs_end, within in [
        (19.9, False, False), (20.1, True, False), (29.9, True, False), (30.1, True, True)
    ]:
        now[0] = 1000.2 + passed
        assert (trainer.is_due(), trainer.is_due(30)) == (at_epochs_end, within)
    trainer.high_loss_streak = 1  # not a good state to come back to
    assert not trainer.is_due(30)
    trainer.args.on_divergence = "continue"
    assert trainer.is_due(30)


def test_a_signal_while_the_loss_explodes_leaves_the_last_good_state(new_trainer, capsys):
    trainer = new_trainer()
    assert trainer.save_state()
    state = Path(f"{trainer.args.save}.state")
    before = state.read_bytes()
    trainer.high_loss_streak = 2
    trainer.save_at_exit(Preempted(signal.SIGTERM))
    assert state.read_bytes() == before
    assert "resumes from the last saved state" in capsys.readouterr().err


def test_a_diverged_run_can_be_resumed_to_stop_at_the_next_divergence(new_trainer):
    trainer = new_trainer(on_divergence="continue")
    trainer.high_loss_streak = 57
    assert trainer.save_state()
    resumed = new_trainer(on_divergence="stop")
    resumed.high_loss_streak = 99  # as before a rollback
    resumed.load_state_dict(read_state(trainer.args.save))
    assert resumed.save_state()


def test_checkpoint_minutes_are_minutes(new_trainer):
    trainer, seen = new_trainer(checkpoint_minutes=2.0, epochs=1), set()
    trainer.is_due = lambda seconds=0.0: seen.add(seconds)
    trainer.fit()
    assert seen == {0.0, 120.0}


def test_a_disk_that_is_full_for_a_while_loses_nothing(new_trainer, tmp_path, capsys, monkeypatch):
    """From epoch 2 to 4: old files stay, then the best model of then is written."""
    monkeypatch.setattr(train, "SAVING_SHARE", math.inf)
    trainer = new_trainer(epochs=5)
    path = trainer.args.save
    monkeypatch.setattr(
        train, "evaluate", lambda *a: {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.0, 5: 4.0}[trainer.epoch]
    )
    end_epoch, held = trainer.end_epoch, contextlib.ExitStack()

    def fill_the_disk():
        if trainer.epoch == 2:
            held.enter_context(full_disk(4000))
        if trainer.epoch == 4:
            assert read_checkpoint(path)["epoch"] == 1
            assert read_state(path)["epoch"] == 2
            assert not list(tmp_path.glob("*.tmp"))
            held.close()
        end_epoch()

    trainer.end_epoch = fill_the_disk
    with held:
        trainer.fit()
    err = capsys.readouterr().err
    assert f"Warning: {path}: cannot be written (File too large); will try again" in err
    assert read_checkpoint(path)["epoch"] == 2
    assert read_state(path)["epoch"] == 6
    assert len(lines(Path(f"{path}.jsonl").read_text())) == 5


def test_a_model_that_is_never_written_is_tested_and_reported(
    corpus_dir, small, tmp_path, monkeypatch
):
    path = tmp_path / "m.pt"

    def write(target, content):
        if target == str(path):
            raise InputError(f"{target}: cannot be written (No space left on device)")
        write_atomically(target, content)

    monkeypatch.setattr(checkpoint, "write_atomically", write)
    status, out, err = invoke(
        main.main, "--data", corpus_dir, *small, "--epochs", 2, "--finetune", 1, "--save", path
    )
    assert status == 2
    assert "| End of training | test loss" in out
    assert err.splitlines()[-1] == (
        f"main.py: error: {path}: could not be written; free disk space, then "
        f"run python main.py --resume {path}"
    )
    assert not path.exists()
    # Never newer than the checkpoint of which it speaks.
    assert read_state(path)["best"] == math.inf


@pytest.mark.parametrize("failures", [1, 100])
def test_the_last_state_is_tried_again_or_reported(
    failures, corpus_dir, small, tmp_path, monkeypatch
):
    path, outcomes = tmp_path / "m.pt", iter([False] * failures + [True])

    def write(target, content):
        is_state = target == f"{path}.state"
        is_last = is_state and unpack(target, "training state", content=content)["epoch"] == 2
        if is_last and not next(outcomes):
            raise InputError(f"{target}: cannot be written (No space left on device)")
        write_atomically(target, content)

    monkeypatch.setattr(checkpoint, "write_atomically", write)
    status, out, err = invoke(
        main.main, "--data", corpus_dir, *small, "--epochs", 1, "--save", path
    )
    assert "| End of training | test loss" in out
    assert f"{path}.state: cannot be written" in err
    assert (status, read_state(path)["epoch"]) == ((0, 2) if failures == 1 else (2, 1))
    assert (f"{path}.state: could not be written; free disk space" in err) == (failures > 1)


# ---------------------------------------------------------------- the JSON lines


def test_the_lines_of_a_run_are_appended_to_the_file(new_trainer, tmp_path):
    """Whoever has opened it, such as tail -f, reads each line once."""
    path = tmp_path / "m.pt.jsonl"
    path.write_text('{"epoch": 1}\n' * 9)  # of an earlier run
    trainer = new_trainer(epochs=4)
    end_epoch, read = trainer.end_epoch, []

    def follow():
        end_epoch()
        if trainer.epoch == 2:
            follow.file = open(path)  # noqa: SIM115 - stays open
        read.append(follow.file.read())

    trainer.end_epoch = follow
    trainer.fit()
    follow.file.close()
    assert [line["epoch"] for part in read for line in lines(part)] == [1, 2, 3, 4]
    assert [part.count("\n") for part in read] == [1] * 4
    assert "".join(read) == path.read_text()


@pytest.mark.parametrize("tail", ['{"epoch": 3, "sec', '{"epoch": 3, "seconds": 1}\n', None])
def test_a_resumed_run_repairs_the_lines(tail, unfinished, tmp_path):
    """A file that ends in a part of a line, is ahead of the state, or has lost its end."""
    path = tmp_path / "run.pt.jsonl"
    before = path.read_text()
    path.write_text(before + tail if tail else before[:-9])
    records = read_state(tmp_path / "run.pt")["records"]
    stop([1], "--resume", tmp_path / "run.pt")
    assert path.read_text() == records
    succeed("--resume", tmp_path / "run.pt")
    assert path.read_text() == read_state(tmp_path / "run.pt")["records"]
    assert [line["epoch"] for line in lines(path.read_text())] == [1, 2, 3]


def test_a_disk_that_fills_up_within_a_line(tmp_path, capsys):
    run, path = Run(arguments(save=str(tmp_path / "m.pt")), "main.py"), tmp_path / "m.pt.jsonl"
    first, second, third = (f'{{"epoch": {n}, "lr": {"1" * 50}}}\n' for n in (1, 2, 3))
    run.save_records(first, False)
    inode = path.stat().st_ino
    with full_disk(100):
        run.save_records(first + second, False)
        assert "m.pt.jsonl: cannot be written (File too large); will" in capsys.readouterr().err
        assert path.read_text() == (first + second)[:100]
    run.save_records(first + second + third, False)
    assert (path.read_text(), run.pending) == (first + second + third, {})
    assert path.stat().st_ino == inode


# ---------------------------------------------------------------- flags of a resumed run


@pytest.fixture
def unfinished(corpus_dir, small, tmp_path):
    """A run of three epochs that was ended in its second: (path, its command's flags)."""
    path = tmp_path / "run.pt"
    flags = ["--data", corpus_dir, *small, "--epochs", 3, "--nonmono", 0, "--save", path]
    out = stop([45], *flags)
    assert f"The state is saved; python main.py --resume {path} resumes from here" in out
    return path, flags


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


# ---------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize(
    ("flags", "resumes", "decay", "rates"),
    [
        ("--optimizer adam --model biLM", [""], 1.2e-6, (30, 0.3)),
        ("--optimizer adam --model biLM", ["--lr 15"], 1.2e-6, (15, 0.15)),
        ("--optimizer adam --model biLM", ["--bias-lr 0.5"], 1.2e-6, (30, 15)),
        ("--optimizer adam --model biLM", ["--lr 15 --bias-lr 0.5"], 1.2e-6, (15, 7.5)),
        ("--optimizer adamw", ["--wdecay 0.01", ""], 0.01, (30, 30)),
        ("--optimizer adamw", ["--bias-lr 0.5", "--lr 10"], 1.2e-6, (10, 5)),
    ],
)
def test_what_one_resume_of_fine_tuning_changes_stays_changed(
    flags, resumes, decay, rates, corpus_dir, small, tmp_path
):
    """After adam and adamw, whose own rates and decay are not SGD's."""
    path = tmp_path / "m.pt"
    small = [flag for flag in small if flag not in ("--lr", "5")]
    succeed("--data", corpus_dir, *small, *flags.split(), "--epochs", 1, "--finetune", 1,
            "--nonmono", 50, "--save", path)
    for epochs, more in enumerate(resumes, 2):
        succeed("--resume", path, "--finetune", epochs, *more.split())
    groups = read_state(path)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [decay] * 2
    assert [group["lr"] for group in groups] == pytest.approx(rates)


def test_main_resumes_in_its_fine_tuning(corpus_dir, small, tmp_path):
    whole, parts = (tmp_path / f"{name}.pt" for name in ("whole", "parts"))
    flags = ["--data", corpus_dir, *small, "--epochs", 3, "--finetune", 3, "--save"]
    succeed(*flags, whole)
    stop([115], *flags, parts)
    assert "at epoch 1 of fine-tuning" in stop([40], "--resume", parts)
    assert "--epochs 9: " in refuse("--resume", parts, "--epochs", 9)
    for change in ("--when 2", "--schedule trapezoid"):
        assert f"{change}: " in refuse("--resume", parts, *change.split())
    assert f"{parts} has none; leave" in refuse("--resume", parts, "--regularization-ramp", 0, 3)
    succeed("--resume", parts)
    assert same(outcome(whole), outcome(parts))
    bases = [read_checkpoint(f"{path}.base")["model"] for path in (whole, parts)]
    assert same(*bases)
    err = refuse("--resume", parts, command=finetune.main)
    assert "its fine-tuning by main.py is finished" in err and "--finetune N" in err
    out = succeed("--resume", parts)
    assert "The run is finished; a higher --finetune extends it" in out
    assert "end of epoch" not in out and "| End of training | test loss" in out


def test_finetune_resumes_itself_and_names_the_command_for_the_others(unfinished, tmp_path):
    path, _ = unfinished
    err = refuse("--resume", path, command=finetune.main)
    assert "belongs to an unfinished run of main.py; " in err
    assert f"python main.py --resume {path} continues" in err
    # Fine-tuning what was cut short keeps the run, so that it can still go on.
    more = ["--epochs", 3, "--nonmono", 9]
    out = stop([40], "--save", path, *more, command=finetune.main)
    assert f"python finetune.py --resume {path} resumes from here" in out
    assert f"python finetune.py --resume {path} continues it" in refuse("--resume", path)
    base, whole = path.with_name("run.pt.base"), tmp_path / "whole.pt"
    shutil.copy(base, whole)
    out = succeed("--resume", path, command=finetune.main)
    assert "of fine-tuning, batch" in out and IDENTICAL in out
    succeed("--save", whole, *more, command=finetune.main)
    assert same(outcome(path), outcome(whole))
    out = succeed("--resume", path, command=finetune.main)
    assert "The run is finished; a higher --epochs extends it" in out and "end of epoch" not in out
    err = refuse("--resume", path)
    assert f"its fine-tuning by finetune.py is finished; python finetune.py --resume {path} " in err
    assert "--epochs N, with a higher N, extends it" in err
    edit(path.with_name("run.pt.state"), done=True)  # by the trigger
    assert f"is finished; finetune.py --save {path} fine-tunes" in refuse("--resume", path)
    assert f"Resuming the run of {base} at epoch 2" in succeed("--resume", base)


def test_an_interrupted_evaluation_of_the_base_model_leaves_no_copy(trained, monkeypatch):
    monkeypatch.setattr(finetune, "evaluate_model", Mock(side_effect=Preempted(signal.SIGTERM)))
    with pytest.raises(Preempted):
        finetune.main(["--save", str(trained), "--epochs", "1"])
    assert not trained.with_name("trained.pt.base").exists()


def test_fine_tuning_that_does_not_improve_leaves_the_model(trained, monkeypatch):
    content = trained.read_bytes()
    monkeypatch.setattr(finetune, "evaluate_model", lambda *args: (0.0, {}))  # cannot be improved
    out = succeed("--save", trained, "--epochs", 1, command=finetune.main)
    assert "end of epoch   1" in out
    assert trained.read_bytes() == content


def test_an_empty_resume_is_none(trained):
    flags = ["--save", trained, "--resume", "", "--epochs"]
    for epochs in (1, 2):
        assert "Fine-tuning" in succeed(*flags, epochs, command=finetune.main)


def test_finetune_from_another_name(trained, tmp_path):
    """Without a state of its own, finetune.py --resume begins from the weights, in a copy."""
    content, save = trained.read_bytes(), tmp_path / "tuned.pt"
    out = succeed("--resume", trained, "--save", save, "--epochs", 1, command=finetune.main)
    assert f"Warm start from the weights of {trained}" in out
    assert trained.read_bytes() == save.with_name("tuned.pt.base").read_bytes() == content


# ---------------------------------------------------------------- other text

COMMANDS = pytest.mark.parametrize(
    ("command", "records"), [(main, ".jsonl"), (finetune, ".finetune.jsonl")]
)


@pytest.fixture
def weights(trained_with_unk):
    """A checkpoint without a state; its vocabulary lacks "dog" and "likes" of `corpus_dir`."""
    trained_with_unk.with_name("unk.pt.state").unlink()
    return trained_with_unk


def encoded(folder, words):
    """{split: its ids [N], words outside of `words` as <unk>}."""
    return {
        split: torch.tensor([
            words.index(word if word in words else "<unk>")
            for word in (folder / f"{split}.txt").read_text().replace("\n", " <eos> ").split()
        ])
        for split in SPLITS
    }


def test_fine_tuning_keeps_the_precision_of_training(trained, monkeypatch):
    flags = {"precision": "bf16", "pad_to": 8, "cuda_graphs": True}
    edit(trained, flags=read_checkpoint(trained)["flags"] | flags)
    monkeypatch.setattr("flags.has_precision", lambda *given: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args, _ = finetune.parse_args(["--save", str(trained)])
    assert (args.precision, args.pad_to, args.cuda_graphs) == ("bf16", 8, True)


@COMMANDS
def test_other_text_is_trained_on_with_the_models_words(
    command, records, weights, corpus_dir, tmp_path
):
    before, path = read_checkpoint(weights), tmp_path / "new.pt"
    ids = encoded(corpus_dir, before["vocabulary"])
    out = succeed("--resume", weights, "--save", path, "--data", corpus_dir, "--epochs", 1,
                  "--batch_size", 4, "--lr", 1e-9, "--wdecay", 0, command=command.main)
    text = "".join((corpus_dir / f"{split}.txt").read_text() for split in SPLITS)
    unknown = len(re.findall("dog|likes", text))
    assert f", 8 words: {unknown} of 1,600 tokens ({unknown / 16:.1f}%) are unknown, read" in out
    assert re.search("as <unk>: ('dog', 'likes'|'likes', 'dog')\n", out)
    params = build_params(before)
    [record] = lines(path.with_name(f"new.pt{records}").read_text())
    assert record["valid_loss"] == pytest.approx(train.evaluate(params, ids["valid"], 10, 70))
    ppl = float(re.search(r"test ppl +([\d.]+)", out)[1])
    assert ppl == pytest.approx(math.exp(train.evaluate(params, ids["test"], 1, 70)), abs=0.006)
    assert read_checkpoint(path)["vocabulary"] == before["vocabulary"]


@COMMANDS
def test_a_run_on_other_text_resumes(command, records, weights, corpus_dir, tmp_path):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    flags = ["--resume", weights, "--data", corpus_dir, "--epochs", 3, "--batch_size", 4,
             "--bptt", 10, "--save"]
    succeed(*flags, whole, command=command.main)
    stop([60], *flags, parts, command=command.main)
    out = succeed("--resume", parts, command=command.main)
    assert IDENTICAL in out and "Text read with the vocabulary of" in out
    assert same(outcome(parts), outcome(whole))
    assert lines(Path(f"{parts}{records}").read_text()) == outcome(whole)[-1]
    (corpus_dir / "valid.txt").write_text("ann sees the cat\n" * 9)  # with words it knows
    assert f"--data {corpus_dir}: its text is not that" in refuse(
        "--resume", parts, "--epochs", 9, command=command.main
    )


def test_the_base_models_loss_is_not_compared_with_that_on_other_text(weights, corpus_dir):
    edit(weights, valid_loss=0.1)
    flags = ["--save", weights, "--data", corpus_dir, "--batch_size", 4, "--bptt", 10]
    stop([20], *flags, "--epochs", 1, command=finetune.main)
    out = succeed("--resume", weights, "--clip", 0.2, command=finetune.main)
    assert CHANGED in out and "Saving averaged weights" in out


def test_text_of_another_kind_is_warned_of(weights, tmp_path):
    folder = tmp_path / "capitals"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.txt").write_text("ANN SEES THE CAT\n" * 30)
    status, out, err = invoke(finetune.main, "--save", weights, "--data", folder, "--epochs", 1)
    assert (status, err.count("\n")) == (0, 1)
    assert "360 of 450 tokens (80.0%) are unknown" in out
    assert f"Warning: most of {folder} is unknown to {weights}" in err
