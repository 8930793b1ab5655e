"""Signals, full disks and rival runs, with real processes: tests/kill_loop.py and single cases."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, await_line
from kill_loop import kill_loop
from checkpoint import read_state
from checkpoint import read_checkpoint

TEST = "| End of training | test loss"


@pytest.fixture
def slow(corpus_dir, small):
    """Flags of a run that takes minutes, in epochs of seconds, and says when it has begun."""
    return ["--data", corpus_dir, *small, "--bptt", 1, "--batch_size", 1, "--log-interval", 1,
            "--save", "m.pt", "--checkpoint-minutes", 0.001]


@pytest.fixture
def start(tmp_path):
    """A function that starts a script, waits for a line, and returns the process."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    started = []

    def run(script, *argv, until=None, env=None, **kwargs):
        process = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / script), *map(str, argv)], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(env or {})},
            **kwargs,
        )
        started.append(process)
        return await_line(process, until)

    run.folder = folder
    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_killed_at_random_moments_and_resumed_it_is_the_same_run(tmp_path, corpus_dir, small):
    """At least 20 kills, in training, averaging and fine-tuning; then some by other signals."""
    flags = ["--data", str(corpus_dir), *small, "--nonmono", "0", "--epochs", "14", "--finetune",
             "5", "--checkpoint-minutes", "0.0005"]
    told = []
    for name, cycles, signals in (
        ("kill", 22, [signal.SIGKILL]), ("end", 8, [signal.SIGTERM, signal.SIGINT]),
    ):
        assert kill_loop(
            tmp_path / name, flags, cycles, seconds=0.5, signals=signals, tell=told.append
        ), "\n".join(told)
    assert sum("SIGKILL" in line for line in told) >= 20
    assert any("state of training" in line for line in told), told


@pytest.mark.parametrize(
    ("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)]
)
def test_the_first_signal_saves_and_says_how_to_resume(number, status, start, slow):
    sent = getattr(signal, number)
    process = start(
        "main.py", *slow, until=r"epoch +2 \| +3/",
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),  # the tests' may be ignored
    )
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (status, "")
    # It is the state after the very batch that was running, not an earlier one.
    last = re.findall(r"epoch +(\d+) \| +(\d+)/", process.begun + out)[-1]
    said = re.search(r"Exiting from training early \((\w+)\) at epoch (\d+), batch (\d+)\n", out)
    assert said.groups() == (number, *last)
    state = read_state(start.folder / "m.pt")
    assert (state["epoch"], len(state["losses"])) == tuple(map(int, last))
    assert "The state is saved; python main.py --resume m.pt goes on from here\n" in out
    assert (TEST in out) == (number == "SIGINT")
    assert sorted(path.name for path in start.folder.iterdir()) == [
        "m.pt", "m.pt.jsonl", "m.pt.state",
    ]
    again = start("main.py", "--resume", "m.pt", until="Resuming the run of m.pt at epoch 2, batch")
    again.kill()


def test_ctrl_c_in_the_first_epoch_does_not_test_an_older_runs_model(trained, start, slow):
    shutil.move(trained, start.folder / "m.pt")
    content = (start.folder / "m.pt").read_bytes()
    process = start("main.py", *slow, until="batches")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "No epoch was finished, so there is no model to test" in out
    assert TEST not in out
    assert (start.folder / "m.pt").read_bytes() == content


@pytest.fixture
def sabotaged(start, slow):
    """A function that runs main.py in a process of its own after some code; waits for a line."""

    def run(code, until):
        code += "\nimport main, flags; flags.run(main.main)"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, slow)], cwd=start.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for line in process.stdout:
            if line == until:
                return process
        raise AssertionError(process.stderr.read())

    return run


ENDLESS_STEP = """
import time, train, trainer
trainer.COST = 1e9  # save however long it takes
step, seen = train.train_step, []
def endless(*a):
    if len(seen) == 600:
        print("stuck", flush=True)
        time.sleep(1)
        time.sleep(100)
    seen.append(1)
    return step(*a)
train.train_step = endless
"""


@pytest.mark.parametrize(("second", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_exits_at_once_and_loses_nothing_saved(second, status, start, sabotaged):
    process = sabotaged(ENDLESS_STEP, "stuck\n")
    saved = (start.folder / "m.pt.state").read_bytes()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None  # it waits for its batch
    begin = time.monotonic()
    process.send_signal(getattr(signal, second))
    process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert process.returncode == status
    assert (start.folder / "m.pt.state").read_bytes() == saved
    assert len(read_state(start.folder / "m.pt")["losses"]) > 0


SLOW_EVALUATION = """
import time, bidirectional, train
def slow(params, ids, batch_size, bptt, check):
    def announced():
        print("evaluating", flush=True)
        time.sleep(0.2)
        check()
    return train.evaluate(params, ids, batch_size, 1, announced)
bidirectional.evaluate = slow
"""


def test_a_signal_during_the_evaluation_does_not_wait_for_its_end(start, sabotaged):
    """Stopped between two windows of it; resumed, it evaluates anew and goes on."""
    process = sabotaged(SLOW_EVALUATION, "evaluating\n")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, "")
    assert out.count("evaluating") <= 1
    batch = int(re.search(r"at epoch 1, batch (\d+)\n", out)[1])
    assert len(read_state(start.folder / "m.pt")["losses"]) == batch
    again = start("main.py", "--resume", "m.pt", until="end of epoch   1")
    assert "| epoch   1 |" not in again.begun  # no batch was left


def test_ctrl_c_ends_the_reader_of_the_log_too(start, slow):
    """As `python main.py ... | tee log` in a terminal: the pipe breaks, the state is saved."""
    process = start("main.py", *slow, until=r"epoch +2 \| +3/")
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    err = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert err == "Warning: standard output cannot be written (Broken pipe): lines are lost\n"
    assert read_state(start.folder / "m.pt")["epoch"] >= 2


def test_nohup_is_respected(start, slow):
    process = start(
        "main.py", *slow, until="batches",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)


# ---------------------------------------------------------------- two runs, one path


def test_a_second_run_at_the_same_path_is_refused_until_the_first_is_dead(start, slow):
    first = start("main.py", *slow, until="batches")
    before = {path.name for path in start.folder.iterdir()}
    for argv in (["main.py", *slow], ["main.py", "--resume", "m.pt"],
                 ["main.py", *slow[:-4], "--save", "./m.pt"]):
        second = start(*argv)
        out, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert re.fullmatch(
            rf"main\.py: error: --save (\./)?m\.pt: process {first.pid} is training to it; wait "
            r"for it, or name another\n", err,
        )
        assert "batches" not in out
    assert first.poll() is None
    assert before <= {path.name for path in start.folder.iterdir()}
    first.kill()
    first.wait()
    start("main.py", "--resume", "m.pt", until="batches")


# ---------------------------------------------------------------- full disks


def test_a_run_goes_on_while_the_disk_is_full(start, corpus_dir, small):
    """No file may grow beyond 6 kB: nothing can be saved, and the run still ends in its test."""
    flags = ["--data", corpus_dir, *small, "--epochs", 3, "--save", "m.pt", "--log-interval", 1]
    process = start(
        "main.py", *flags, until="end of epoch   2",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)),
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert TEST in out
    assert "Warning: m.pt.state: cannot be written (File too large); the next save tries" in err
    assert "Warning: m.pt: cannot be written (File too large)" in err
    assert err.splitlines()[-1] == (
        "main.py: error: m.pt: could not be written until the end; make room and train again"
    )
    assert "Traceback" not in err
    assert [path.name for path in start.folder.iterdir()] == ["m.pt.jsonl"]


def test_a_disk_that_is_full_for_a_while_loses_nothing(start, slow):
    """A limit comes when there is a checkpoint, and goes later: old files stay, then new ones."""
    if not hasattr(resource, "prlimit"):
        pytest.skip("no prlimit here to change another process's limit")
    process = start("main.py", *slow, "--epochs", 7, until=r"epoch +2 \| +3/")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
    old = {name: (start.folder / name).read_bytes() for name in ("m.pt", "m.pt.state")}
    while not re.search(r"epoch +5 \| +200/", line := process.stdout.readline()):
        assert line
    assert (start.folder / "m.pt").read_bytes() == old["m.pt"]
    at_rest = read_state(start.folder / "m.pt")
    assert at_rest["epoch"] in (1, 2)  # as it was when the disk was full
    resource.prlimit(
        process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Warning: m.pt.state: cannot be written (File too large)" in err
    assert read_state(start.folder / "m.pt")["epoch"] == 8
    assert read_checkpoint(start.folder / "m.pt")["valid_loss"] == read_state(
        start.folder / "m.pt"
    )["best"]
    assert TEST in out


def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path, corpus_dir, small):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "main.py"), "--data", str(corpus_dir), *small, "--epochs",
             "1", "--save", str(tmp_path / "m.pt")], stdout=full, stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 0
    assert done.stderr == (
        "Warning: standard output cannot be written (No space left on device): lines are lost\n"
    )
    assert read_checkpoint(tmp_path / "m.pt")["epoch"] == 1
    assert read_state(tmp_path / "m.pt")["epoch"] == 2
