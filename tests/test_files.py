"""Files: atomic writes on a disk that is full, seals, hostile content, locks, copies."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import finetune
import main
import utils
from conftest import ROOT, invoke
from data import InputError
from checkpoint import pack, run_lock, unpack, write_atomically
from properties import repeated
from checkpoint import load

# ---------------------------------------------------------------- writing


def test_writing_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    for content in (b"old", b"new and longer", b""):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_file_and_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc here to name descriptors by")
    monkeypatch.setattr(files.os, "fsync", recorded_fsync)
    monkeypatch.setattr(
        files.os, "replace", lambda *a: events.append("rename") or replace(*a)
    )
    write_atomically(tmp_path / "file", b"x")
    assert events == [f"file.{os.getpid()}.tmp", "rename", tmp_path.name]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "big disk").mkdir()
    target, link = tmp_path / "big disk" / "m.pt", tmp_path / "m.pt"
    link.symlink_to(target)
    write_atomically(link, b"content")
    assert link.is_symlink()
    assert target.read_bytes() == b"content"


def run_child(code, limit=None):
    """Runs Python code in a process whose files cannot grow beyond `limit` bytes."""

    def preexec():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, preexec_fn=preexec
    )


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = f"from files import write_atomically; write_atomically({str(path)!r}, bytes(100_000))"
    done = run_child(code, limit=50_000)
    assert "InputError" in done.stderr
    assert "file: cannot be written (File too large)" in done.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("gone", ["renamed", "removed"])
def test_a_folder_that_vanished(tmp_path, gone):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.rename(tmp_path / "other") if gone == "renamed" else folder.rmdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(folder / "file", b"x")


def test_a_saver_keeps_what_it_could_not_write_and_retries(tmp_path):
    folder, told = tmp_path / "folder", []
    saver = files.Saver(told.append)
    assert not saver.write(folder / "a", b"1")
    assert not saver.write(folder / "a", b"2")
    assert not saver.write(folder / "b", b"3")
    assert not saver.retry()
    assert len(told) == 2  # each is said once
    assert all("cannot be written (No such file or directory)" in line for line in told)
    folder.mkdir()
    assert saver.retry()
    assert told[2:] == [f"{folder / 'a'} is written again", f"{folder / 'b'} is written again"]
    assert (folder / "a").read_bytes() == b"2"
    assert (folder / "b").read_bytes() == b"3"
    assert saver.pending == {}


def test_copies_are_numbered_and_made_once(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"1")
    assert keep(path, ".base") == keep(path, ".base") == f"{path}.base"
    path.write_bytes(b"2")
    (tmp_path / "m.state").write_bytes(b"s")
    assert keep(path, ".base", ".state") == f"{path}.base2"
    assert (tmp_path / "m.base2.state").read_bytes() == b"s"
    assert (tmp_path / "m.base").read_bytes() == b"1"
    (tmp_path / "m.state").write_bytes(b"t")
    assert keep(path, ".base", ".state") == f"{path}.base3"


# ---------------------------------------------------------------- reading


KEYS = {"weights": torch.Tensor, "words": list}


@pytest.fixture(scope="module")
def sealed():
    return bytes(pack("checkpoint", 2, {"weights": torch.arange(50.0), "words": ["a", "b"]}))


def read(content):
    return unpack("name.pt", "checkpoint", 2, KEYS, content=content)


def test_what_is_sealed_is_read_back(sealed, tmp_path):
    assert torch.equal(read(sealed)["weights"], torch.arange(50.0))
    # By torch, with or without mmap, and by zip, as any other file of torch's.
    path = tmp_path / "m.pt"
    path.write_bytes(sealed)
    for mmap in (False, True):
        contents = torch.load(path, weights_only=True, mmap=mmap)
        assert torch.equal(contents["weights"], torch.arange(50.0))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment == b"sha256:" + hashlib.sha256(sealed[:-64]).hexdigest().encode()


@repeated
@given(data=st.data())
def test_every_flipped_bit_is_refused(sealed, data):
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    damaged = bytearray(sealed)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(InputError, match=r"^name\.pt: "):
        read(bytes(damaged))


def test_a_flipped_bit_of_a_tensor_loads_silently_in_torch_but_not_here(sealed):
    damaged = bytearray(sealed)
    damaged[sealed.index(struct.pack("<f", 37.0)) + 2] ^= 1
    contents = torch.load(io.BytesIO(damaged), weights_only=True)
    assert not torch.equal(contents["weights"], torch.arange(50.0))
    with pytest.raises(InputError, match="not what its SHA-256 was made of"):
        read(bytes(damaged))


@repeated
@given(data=st.data())
def test_every_truncation_is_refused(sealed, data):
    with pytest.raises(InputError, match=r"^name\.pt: is damaged"):
        read(sealed[: data.draw(st.integers(0, len(sealed) - 1))])


@repeated
@given(st.binary(max_size=300))
def test_foreign_bytes_are_refused(content):
    with pytest.raises(InputError, match=r"^name\.pt: is damaged, or no checkpoint"):
        read(content)


def seal(content):
    """Seals the bytes of any zip archive as `pack` would."""
    content = content[:-2] + struct.pack("<H", 71) + b"sha256:"
    return content + hashlib.sha256(content).hexdigest().encode()


class Exploit:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["pickle", "archive", "sealed archive", "old torch format"])
def test_a_crafted_pickle_is_refused_unexecuted(form, tmp_path, corpus_dir):
    path, proof = tmp_path / "crafted.pt", tmp_path / "executed"
    contents = {"format": "awd-lstm checkpoint", "version": 2, "weights": Exploit(proof)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=form != "old torch format")
    if form == "sealed archive":
        path.write_bytes(seal(path.read_bytes()))
        assert files.is_sealed(path.read_bytes())
    (tmp_path / "crafted.pt.state").write_bytes(path.read_bytes())
    for command in (
        [finetune.main, "--save", path], [finetune.main, "--resume", path],
        [main.main, "--resume", path, "--data", corpus_dir],
        [main.main, "--save", path, "--data", corpus_dir],
    ):
        status, _, err = invoke(*command)
        assert (status, err.count("\n")) == (2, 1)
        assert "crafted.pt" in err
    with pytest.raises(InputError, match="is damaged, or no checkpoint"):
        load(path)
    assert not proof.exists()
    with contextlib.suppress(RuntimeError):  # it would have worked
        torch.load(path, weights_only=False)
    assert proof.exists()


def damage(path, how):
    content = bytearray(path.read_bytes())
    contents = torch.load(path, weights_only=True)
    kind = contents.pop("format").removeprefix("awd-lstm ")
    version = contents.pop("version")
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "with a flipped bit":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif how == "pickled module":  # what the original code saved
        torch.save([torch.nn.Linear(2, 2)], path)
    elif how == "someone else's":
        torch.save({"model": torch.zeros(3)}, path)
    elif how == "from a later version":
        path.write_bytes(pack(kind, 999, contents))
    elif how == "saved again by torch":
        torch.save({"format": f"awd-lstm {kind}", "version": version, **contents}, path)
    elif how == "without a vocabulary":
        del contents["vocabulary"]
        path.write_bytes(pack(kind, version, contents))
    elif how == "weights of another shape":
        contents["architecture"]["nhid"] = 14
        path.write_bytes(pack(kind, version, contents))


HOW = [
    ("truncated", "is damaged"),
    ("empty", "is damaged"),
    ("with a flipped bit", "is damaged"),
    ("pickled module", "is damaged, or no {} of main.py"),
    ("someone else's", "is a file of torch's, but no {} of main.py"),
    ("from a later version", "format version 999"),
    ("saved again by torch", "not what its SHA-256 was made of"),
    ("without a vocabulary", "lacks vocabulary"),
]


@pytest.mark.parametrize(
    ("how", "message"), [*HOW, ("weights of another shape", "do not fit its architecture")]
)
def test_unusable_checkpoints_are_refused_and_left_alone(how, message, trained):
    damage(trained, how)
    content = trained.read_bytes()
    status, _, err = invoke(finetune.main, "--save", trained)
    assert (status, err.count("\n")) == (2, 1)
    assert str(trained) in err
    assert message.format("checkpoint") in err
    assert trained.read_bytes() == content
    assert not trained.with_name("trained.pt.base").exists()
    with pytest.raises(InputError):
        load(trained)


@pytest.mark.parametrize(
    ("how", "message"), [*HOW, ("weights of another shape", "its parts do not fit together")]
)
def test_unusable_states_are_refused_and_left_alone(how, message, trained):
    state = trained.with_name("trained.pt.state")
    damage(state, how)
    files_before = {path: path.read_bytes() for path in trained.parent.glob("trained*")}
    status, _, err = invoke(main.main, "--resume", trained, "--epochs", 2)
    assert (status, err.count("\n")) == (2, 1)
    assert str(state) in err
    assert message.format("training state") in err
    assert {path: path.read_bytes() for path in trained.parent.glob("trained*")} == files_before


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.just(torch.zeros(3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=5,
)


@repeated
@given(data=st.data())
def test_junk_in_a_sealed_checkpoint_is_no_traceback(data, trained):
    """What is sealed but makes no sense, whoever made it, is bad input like any other."""
    contents = torch.load(trained, weights_only=True)
    key = data.draw(st.sampled_from(sorted(contents.keys() - {"format", "version"})))
    value = contents[key]
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        value[data.draw(st.sampled_from(sorted(value)))] = data.draw(JUNK)
    else:
        contents[key] = data.draw(JUNK)
    del contents["format"], contents["version"]
    path = trained.with_name("junk.pt")
    path.write_bytes(pack("checkpoint", utils.VERSION, contents))
    try:
        load(path)
    except InputError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


@repeated
@given(data=st.data())
def test_junk_in_a_sealed_state_is_no_traceback(data, trained):
    state = trained.with_name("trained.pt.state")
    contents = torch.load(state, weights_only=True)
    key = data.draw(st.sampled_from(sorted(resume.KEYS)))
    value = contents[key]
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        value[data.draw(st.sampled_from(sorted(value, key=str)))] = data.draw(JUNK)
    else:
        contents[key] = data.draw(JUNK)
    del contents["format"], contents["version"]
    path = trained.with_name("junk.pt")
    path.write_bytes(trained.read_bytes())
    path.with_name("junk.pt.state").write_bytes(
        pack("training state", resume.VERSION, contents)
    )
    status, _, err = invoke(main.main, "--resume", path, "--epochs", 2)
    assert status in (0, 2)
    assert err.count("\n") <= 1 or "Warning" in err


# ---------------------------------------------------------------- locks


HOLD = """
import sys, time
from checkpoint import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_held_path_is_refused_with_the_holders_process_id_until_it_dies(tmp_path):
    path = tmp_path / "m.pt"
    holder = hold(path)
    message = f"--save {path}: process {holder.pid} is training to it"
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    for name in (path, tmp_path / "." / "m.pt", link):
        with pytest.raises(InputError, match=message if name == path else str(holder.pid)):
            run_lock(name).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "m.pt.lock").exists()  # its file stays, the lock does not
    with run_lock(path):
        assert (tmp_path / "m.pt.lock").read_text() == str(os.getpid())
        with run_lock(tmp_path / "other.pt"):
            pass
    assert not (tmp_path / "m.pt.lock").exists()


def race(path, seconds, counts, index):
    deadline = time_after(seconds)
    while not deadline():
        try:
            with run_lock(path):
                inside = os.open(f"{path}.inside", os.O_CREAT | os.O_EXCL)
                os.close(inside)
                os.unlink(f"{path}.inside")
                counts[index] += 1
        except InputError:
            pass


def time_after(seconds):
    import time

    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def test_never_two_at_once(tmp_path):
    """Four processes take and release one lock as fast as they can, its file coming and going."""
    context = multiprocessing.get_context("fork")
    counts = context.Array("i", 4)
    racers = [
        context.Process(target=race, args=(str(tmp_path / "m.pt"), 2, counts, i)) for i in range(4)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert min(counts) > 0


def test_leftovers_of_the_dead_are_removed_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = [f"m.pt.{dead.pid}.tmp", f"m.pt.state.{dead.pid}.tmp"]
    stale.append(f"m.pt.state.{os.getpid()}.tmp")  # containers give the same ids again
    others = [f"m.pt.{os.getppid()}.tmp", f"n.pt.{dead.pid}.tmp", "m.pt.tmp", "m.pt.notes.tmp"]
    for name in stale + others:
        (tmp_path / name).write_text("")
    with run_lock(tmp_path / "m.pt"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
