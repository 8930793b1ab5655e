"""Signals, kills and logs that cannot be written."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import evaluate
import finetune
import main
import pointer
import train
import utils
from checkpoint import read_checkpoint, read_state
from conftest import ROOT, arguments, invoke
from kill_loop import kill_loop
from utils import Preempted

TEST = "| End of training | test loss"


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_is_the_same_run(tmp_path, corpus_dir, small):
    """By SIGKILL, SIGTERM or SIGINT; which phases are hit depends on the machine's speed."""
    flags = ["--data", str(corpus_dir), *small, "--nonmono", "0", "--epochs", "14", "--finetune",
             "5", "--checkpoint-minutes", "0.0005"]
    signals, told = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT], []
    ok = kill_loop(tmp_path / "runs", flags, 30, seconds=0.5, signals=signals, tell=told.append)
    assert ok, "\n".join(told)


# ---------------------------------------------------------------- signals


@pytest.fixture
def flags(corpus_dir, small, tmp_path):
    return ["--data", corpus_dir, *small, "--epochs", 2, "--log-interval", 1,
            "--save", tmp_path / "m.pt"]


@pytest.fixture
def send(monkeypatch, request):
    """A function after whose call this process gets a signal at the given step of training."""

    def send(number, at_step, disposition=signal.SIG_DFL):
        step, steps = train.train_step, []

        def train_step(*args, **kwargs):
            steps.append(args)
            if len(steps) == at_step:
                signal.raise_signal(number)
            return step(*args, **kwargs)

        monkeypatch.setattr(train, "train_step", train_step)
        before = signal.signal(number, disposition)
        request.addfinalizer(lambda: signal.signal(number, before))

    return send


@pytest.mark.parametrize(
    ("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)]
)
def test_the_first_signal_saves_and_says_how_to_resume(name, status, send, flags, tmp_path):
    send(getattr(signal, name), 40)
    path = tmp_path / "m.pt"
    found, out, err = invoke(main.main, *flags)
    assert (found, err) == (status, "")
    # It is the state after the very batch that was running.
    last = re.findall(r"epoch +(\d+) \| +(\d+)/", out)[-1]
    assert f"Exiting from training early ({name}) at epoch {last[0]}, batch {last[1]}\n" in out
    state = read_state(path)
    assert (state["epoch"], len(state["losses"])) == tuple(map(int, last))
    assert f"The state is saved; python main.py --resume {path} resumes from here\n" in out
    assert (TEST in out) == (name == "SIGINT")


def test_nohup_is_respected(send, flags):
    send(signal.SIGHUP, 10, signal.SIG_IGN)
    assert invoke(main.main, *flags)[0] == 0


def test_ctrl_c_in_the_first_epoch_does_not_test_an_older_runs_model(
    trained, send, flags, tmp_path
):
    path = shutil.move(trained, tmp_path / "m.pt")
    content = path.read_bytes()
    send(signal.SIGINT, 3)
    status, out, err = invoke(main.main, *flags)
    assert (status, err) == (130, "")
    assert "No epoch was finished, so there is no model to test" in out
    assert TEST not in out
    assert path.with_name("m.pt.old").read_bytes() == content


def test_a_signal_during_the_evaluation_does_not_wait_for_its_end(flags, tmp_path, monkeypatch):
    """Stopped between two windows of it; resumed, it evaluates anew and goes on."""
    evaluate = train.evaluate

    def slow(params, ids, batch_size, bptt, check):
        def signalled():  # a second one would end this process
            signal.raise_signal(signal.SIGTERM)
            check()

        return evaluate(params, ids, batch_size, 1, signalled)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", slow)
        status, out, err = invoke(main.main, *flags)
    assert (status, err) == (143, "")
    batch = int(re.search(r"at epoch 1, batch (\d+)\n", out)[1])
    assert len(read_state(tmp_path / "m.pt")["losses"]) == batch
    status, out, _ = invoke(main.main, "--resume", tmp_path / "m.pt")
    assert status == 0
    assert "| epoch   1 |" not in out  # no batch was left
    assert "end of epoch   1" in out


SECOND = """
import signal, sys
from utils import Preemption
with Preemption():
    signal.raise_signal(signal.SIGINT)
    print("waits", flush=True)
    signal.raise_signal(int(sys.argv[1]))
    print("too late", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(number):
    done = subprocess.run(
        [sys.executable, "-c", SECOND, str(int(number))], cwd=ROOT, text=True, capture_output=True
    )
    assert (done.stdout, done.stderr, done.returncode) == ("waits\n", "", 128 + number)


def test_the_commands_run_in_another_thread_and_leave_signals_alone(flags):
    """And print to streams that are not files, as a notebook's."""
    *flags, save = map(str, flags)
    before, calls = signal.getsignal(signal.SIGTERM), [
        (main, [*flags, save]), (main, ["--resume", save, "--epochs", "3"]),
        (finetune, ["--save", save, "--epochs", "1"]),
        (pointer, ["--save", save, "--data", flags[1], "--dynamic"]),
    ]
    for command, argv in calls:
        statuses = []
        thread = threading.Thread(target=lambda: statuses.append(command.main(argv)))  # noqa: B023
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            thread.start()
            thread.join()
        assert (statuses, err.getvalue()) == ([0], "")
        assert "| End of training | test loss" in out.getvalue()
    assert signal.getsignal(signal.SIGTERM) == before


def test_under_torchrun_a_second_signal_repeats_the_first(monkeypatch):
    monkeypatch.setattr("distributed.is_distributed", lambda: True)
    monkeypatch.setattr("distributed.largest", lambda *numbers: list(numbers))
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"exit {status}"))
    with utils.Preemption() as preemption, pytest.raises(Preempted, match="SIGTERM"):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        preemption.check_signals()


@pytest.mark.parametrize(
    ("stop", "status"), [(KeyboardInterrupt(), 130), (Preempted(signal.SIGTERM), 143)]
)
def test_a_signal_outside_training_is_one_line(stop, status):
    found, out, err = invoke(Mock(side_effect=stop))
    assert (found, out, err.count("\n")) == (status, "", 1)


# ---------------------------------------------------------------- ranks


def test_each_rank_draws_its_own_masks(corpus_dir, monkeypatch):
    monkeypatch.setattr("distributed.rank", lambda: 1)
    utils.prepare(arguments(data=str(corpus_dir), seed=5))
    assert torch.initial_seed() == 6


def test_a_rank_without_a_saved_state_draws_its_own_masks(monkeypatch):
    device, draws = torch.device("cpu"), []
    saved = utils.get_generators(device)
    for rank in range(3):
        monkeypatch.setattr("distributed.rank", lambda rank=rank: rank)
        utils.set_generators(saved, device)
        draws.append((np.random.random(), torch.rand(()).item()))
    windows, masks = map(set, zip(*draws))
    assert (len(windows), len(masks)) == (1, 3)


# ---------------------------------------------------------------- logs


def test_a_command_runs_with_its_standard_streams_closed():
    program = "from flags import run_command; run_command(lambda: print(1))"
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    assert subprocess.call([*shell, sys.executable, "-c", program], cwd=ROOT) == 0


def test_text_is_utf8_whatever_the_locale():
    program = "from flags import run_command; run_command(lambda: print('\u4eca'))"
    written = subprocess.check_output(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert written.decode() == "\u4eca\n"


def run_without_output(reason, argv):
    """Runs Python with a standard output that cannot be written; returns (status, stderr)."""
    if reason == "Broken pipe":  # as when Ctrl-C ends `| tee log` too
        reader, output = os.pipe()
        os.close(reader)
    elif os.path.exists("/dev/full"):
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        pytest.skip("no /dev/full here")
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        stdout=output, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )
    os.close(output)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("reason", "status", "message"),
    [
        ("No space left on device", 2, "cannot write the output (No space left on device); free"),
        ("Broken pipe", 141, ""),
    ],
)
def test_output_that_is_lost_when_a_command_ends(reason, status, message):
    program = "from flags import run_command; run_command(lambda: print('a row'))"
    returned, err = run_without_output(reason, ["-c", program])
    assert returned == status
    assert message in err and err.count("\n") == (status == 2)


@pytest.mark.parametrize(
    ("command", "argv"),
    [(evaluate, "--checkpoint {0} {1}/test.txt"), (pointer, "--save {0} --data {1} --split test")],
)
def test_a_result_that_is_lost_is_an_error(command, argv, trained, corpus_dir, monkeypatch):
    class Full(StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(utils.log, "failed", False)  # so that it is false again afterwards
    monkeypatch.setattr(sys, "stdout", Full())
    assert command.main(argv.format(trained, corpus_dir).split()) == 2


@pytest.mark.parametrize("reason", ["No space left on device", "Broken pipe"])
def test_a_log_that_cannot_be_written_does_not_end_the_run(reason, flags, tmp_path):
    status, err = run_without_output(reason, [ROOT / "main.py", *flags, "--epochs", "1"])
    assert status == 0
    assert err == (
        f"Warning: cannot write to standard output ({reason}); log lines are lost\n"
    )
    assert read_checkpoint(tmp_path / "m.pt")["epoch"] == 1
    assert read_state(tmp_path / "m.pt")["epoch"] == 2
