"""The files of a run: whole, sealed, plain data, one run to a path, written when they are due."""

import contextlib
import hashlib
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import finetune
import main
import train
from checkpoint import (
    DIGEST, VERSION, Run, copy_base, how_to_resume, is_sealed, keep_older_run, load, pack,
    read_checkpoint, read_state, run_lock, unpack, write_atomically,
)
from conftest import (
    ROOT, arguments, edit, files_at, invoke, make_params, make_trainer, outcome, refuse, stop,
    succeed,
)
from data import Corpus, InputError
from kill_loop import lines, same
from properties import TRIES, repeated
from utils import Preempted


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
    assert f"now at {older}; python main.py --resume {older} continues the unfinished run\n" in out
    assert contents(older) == before
    succeed("--resume", older)
    assert same(outcome(path), outcome(older))  # the same flags and seed: the same run

    finished, before = path.with_name("run.pt.old2"), contents(path)
    out = stop([1], *flags)
    assert f"now at {finished}\n" in out
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


# ---------------------------------------------------------------- when a state is saved


@pytest.fixture
def new_trainer(corpus_dir, tmp_path):
    """A function that makes a Trainer, which saves to m.pt, from flags."""
    corpus = Corpus(corpus_dir)

    def make(*check, rate=0.0, finetuning=False, **flags):
        params = make_params(ntoken=len(corpus.dictionary), rate=rate)
        args = arguments(save=str(tmp_path / "m.pt"), **flags)
        return make_trainer(params, corpus, args, *check, finetuning=finetuning)

    return make


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
        f"main.py: error: {path}: could not be written; free disk space, or make the folder "
        f"writable, then run python main.py --resume {path}"
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
