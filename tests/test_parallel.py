"""torchrun with two processes on the CPU: the same run as one, ended together, resumed together."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import main
import distributed
import train
from conftest import ROOT, arguments, await_line, invoke, make_params, make_trainer
from data import Corpus, InputError
from kill_loop import same
from utils import Preemption
from checkpoint import read_state
from checkpoint import read_checkpoint

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
NO_DROPOUT = [word for name in ("", "h", "i", "e") for word in (f"--dropout{name}", "0")]
NO_DROPOUT += ["--wdrop", "0"]


@pytest.fixture
def begin(tmp_path):
    """A function that starts a script under torchrun, waits for a line, returns the process."""
    started = []

    def run(script, *argv, until=None, launch=LAUNCH):
        process = subprocess.Popen(
            [*launch, str(script), *map(str, argv)], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )
        started.append(process)
        return await_line(process, until)

    yield run
    for process in started:
        for child in children(process):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()


def children(process):
    """The process ids of the ranks, the first first."""
    try:
        pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except OSError:
        return []
    return sorted(map(int, pids))


def finish(process, status=0):
    """Waits; returns standard output and standard error."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return process.begun + out, err


STEPS = """
import sys
import torch
from conftest import arguments, make_params
import flags
import distributed
from train import Objective, evaluate, make_optimizer, train_step


def main():
    torch.manual_seed(distributed.rank())  # the first rank's weights are what counts
    args = arguments(lr=1.0)
    with distributed.group(torch.device("cpu"), lambda: "again"):
        params = make_params(sys.argv[1], splits=(20, 30))
        torch.nn.init.normal_(params[1].tail_vectors)
        objective = distributed.replicate(Objective(params))
        optimizer = make_optimizer(params, args)
        torch.manual_seed(3)
        words, targets = torch.randint(50, (8, 10, 12)), torch.randint(50, (8, 10, 12))
        mine = distributed.columns(12)
        hidden = params[0].init_hidden(mine.stop - mine.start)
        losses = []
        for x, y in zip(words[..., mine], targets[..., mine]):
            loss, hidden = train_step(objective, optimizer, x, y.flatten(), hidden, args)
            losses.append(distributed.mean(loss).item())
        checks = []
        # 107 predictions in 5 columns, the last row of which is not complete; and in one column.
        ids, count = torch.randint(50, (108,)), lambda: checks.append(1)
        losses += [evaluate(params, ids, columns, 7, count) for columns in (5, 1)]
        torch.save([losses, len(checks), params.state_dict()], sys.argv[2] + str(distributed.rank()))

flags.run(main)
"""


@pytest.mark.parametrize("model", ["LSTM", "GRU"])
def test_two_ranks_make_the_steps_of_one(model, begin, tmp_path):
    """Losses, clipped gradients of model and criterion, evaluation: all as in one process."""
    (tmp_path / "steps.py").write_text(STEPS)
    finish(begin("steps.py", model, "two"))
    finish(begin("steps.py", model, "one", launch=[sys.executable]))
    one, first, second = (torch.load(tmp_path / name) for name in ("one0", "two0", "two1"))
    assert first[0] == second[0]
    assert first[0] == pytest.approx(one[0], rel=1e-5)
    assert first[1] == second[1] == one[1] == 4 + 16
    for name, weights in one[2].items():
        assert torch.equal(first[2][name], second[2][name]), name
        torch.testing.assert_close(first[2][name], weights, rtol=1e-4, atol=1e-6)
    assert not torch.equal(one[2]["1.tail_bias"], torch.zeros(2))


def records(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("model", ["LSTM --attention single", "biLM --objective both"])
def test_a_run_of_two_ranks_is_that_of_one(model, begin, corpus_dir, small, tmp_path):
    """Without dropout: training, the switch to averaging, fine-tuning, the test."""
    flags = [*small, *NO_DROPOUT, "--data", corpus_dir, "--epochs", 3, "--nonmono", 0,
             "--finetune", 1, "--lr", 1, "--model", *model.split()]
    out, _ = finish(begin(ROOT / "main.py", *flags, "--save", "two.pt"))
    single, _ = finish(begin(ROOT / "main.py", *flags, "--save", "one.pt", launch=[sys.executable]))
    assert "2 processes" in out
    for name in ("pt.jsonl", "pt.finetune.jsonl"):
        one, two = records(tmp_path, f"one.{name}"), records(tmp_path, f"two.{name}")
        assert len(one) == len(two) > 0
        for a, b in zip(one, two):
            assert a["averaging"] == b["averaging"]
            for key in ("train_loss", "valid_loss"):
                assert b[key] == pytest.approx(a[key], rel=1e-4)
    # Every line once, from the first rank.
    for text in ("| end of epoch   1 ", "| base model |", "Model total parameters"):
        assert out.count(text) == single.count(text) > 0, text
    tests = [re.findall(r"test loss +([\d.]+)", text) for text in (out, single)]
    assert tests[0] == tests[1]
    assert len(tests[0]) == 2
    one, two = (read_checkpoint(tmp_path / name) for name in ("one.pt", "two.pt"))
    for name, weights in one["model"].items():
        torch.testing.assert_close(two["model"][name], weights, rtol=1e-2, atol=1e-4)


def test_one_process_under_torchrun_takes_the_ranks_way(begin, corpus_dir, small, tmp_path):
    """It has the process group and the replica that two would have, and the same results."""
    (tmp_path / "one.py").write_text(ONE)
    flags = [*small, "--data", corpus_dir, "--epochs", 2, "--nonmono", 0]
    launch = [*LAUNCH[:-1], "--nproc_per_node=1"]
    out, _ = finish(begin("one.py", *flags, "--save", "run.pt", launch=launch))
    assert "backend gloo, objective DistributedDataParallel" in out
    finish(begin(ROOT / "main.py", *flags, "--save", "plain.pt", launch=[sys.executable]))
    assert same(
        *(read_checkpoint(tmp_path / name)["model"] for name in ("run.pt", "plain.pt"))
    )


ONE = """
import torch.distributed as dist
import flags, main, trainer

fit = train.Trainer.fit

def announced(self):
    print(f"backend {dist.get_backend()}, objective {type(self.objective).__name__}")
    fit(self)

train.Trainer.fit = announced
flags.run(main.main)
"""

FAILS = """
import sys
import flags, main, parallel, trainer

step, failing = train.train_step, int(sys.argv.pop())

def fail(*args, **kwargs):
    if distributed.rank() == failing:
        raise ValueError("this rank has failed")
    return step(*args, **kwargs)

train.train_step = fail
flags.run(main.main)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_fails_the_others_do_not_hang(rank, begin, corpus_dir, small, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    begun = time.monotonic()
    process = begin("fails.py", *small, "--data", corpus_dir, "--epochs", 2, rank)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ValueError: this rank has failed" in err
    assert time.monotonic() - begun < 40


def test_a_connection_that_fails_says_why(monkeypatch):
    def fail(*args, **kwargs):
        raise dist.DistBackendError("NCCL error:\nError while creating shared memory segment")

    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(None, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", fail)
    monkeypatch.setenv("RANK", "1")
    message = "rank 1 cannot connect to the others: NCCL error: Error while creating shared memory"
    with pytest.raises(InputError, match=message), distributed.group(torch.device("cpu"), None):
        pass


def test_a_batch_takes_one_exchange_between_the_hosts(corpus_dir, monkeypatch):
    """That of the signals and of whether to save; the losses are exchanged by the devices."""
    exchanged, made = [], []
    monkeypatch.setattr(parallel, "is_distributed", lambda: True)
    monkeypatch.setattr(parallel, "replicate", lambda module: module)
    monkeypatch.setattr(distributed.group, "hosts", "hosts", raising=False)
    monkeypatch.setattr(dist, "all_reduce", lambda t, op=None, group=None: exchanged.append(group))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *args: exchanged.append("hosts"))
    monkeypatch.setattr(dist, "all_gather_object", lambda *args: exchanged.append("hosts"))
    corpus, args = Corpus(corpus_dir), arguments(epochs=1)
    run = make_trainer(
        make_params(ntoken=len(corpus.dictionary)), corpus, args, Preemption().check
    )
    monkeypatch.setattr(train, "train_step", lambda *a: made.append(a) or (torch.ones(()), None))
    run.hidden = []
    run.train_epoch()
    assert len(made) > 20
    assert exchanged == [None, "hosts"] * len(made)


def test_ended_together_and_resumed_it_is_the_same_run(begin, corpus_dir, small, tmp_path):
    """A signal to torchrun, or to one of the processes only, with dropout of its own in each."""
    flags = [*small, "--data", corpus_dir, "--epochs", 4, "--nonmono", 0]
    finish(begin(ROOT / "main.py", *flags, "--save", "whole.pt"))
    process = begin(ROOT / "main.py", *flags, "--save", "parts.pt", until=r"epoch +2 \| +20/")
    process.terminate()
    out, _ = process.communicate(timeout=60)
    out = process.begun + out
    assert "Exiting from training early (SIGTERM)" in out
    again = "torchrun --nproc_per_node=2 main.py --resume parts.pt goes on from here"
    assert out.count(again) == 1
    assert len(read_state(tmp_path / "parts.pt")["generators"]["others"]) == 1

    process = begin(ROOT / "main.py", "--resume", "parts.pt", until="end of epoch +2 ")
    assert "It goes on bit-identical to a run never interrupted" in process.begun
    if children(process):
        os.kill(children(process)[1], signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert "Exiting from training early (SIGINT)" in process.begun + out
        process = begin(ROOT / "main.py", "--resume", "parts.pt")
    finish(process)
    whole, parts = (read_checkpoint(tmp_path / name) for name in ("whole.pt", "parts.pt"))
    assert same(whole["model"], parts["model"])
    assert whole["valid_loss"] == parts["valid_loss"]


def test_another_number_of_ranks_is_announced(begin, corpus_dir, small, tmp_path):
    flags = [*small, "--data", corpus_dir, "--epochs", 20]
    process = begin(ROOT / "main.py", *flags, "--save", "m.pt", until="end of epoch +1 ")
    process.terminate()
    process.communicate(timeout=60)
    done = begin(ROOT / "main.py", "--resume", "m.pt", "--epochs", 3, launch=[sys.executable])
    out, _ = finish(done)
    assert re.search("no longer bit-identical.*ranks 2 -> 1", out)
    assert math.isfinite(read_checkpoint(tmp_path / "m.pt")["valid_loss"])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to find the ranks in")
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_dies_the_others_end_and_the_last_state_stands(
    victim, begin, corpus_dir, small, tmp_path
):
    flags = [*small, "--data", corpus_dir, "--epochs", 9999, "--checkpoint-minutes", 0.0005]
    process = begin(ROOT / "main.py", *flags, "--save", "m.pt", until="end of epoch +1 ")
    os.kill(children(process)[victim], signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert process.returncode != 0
    survivor = f"main.py: error: rank {1 - victim}: another process of this run is gone"
    assert survivor in err
    assert "--resume m.pt goes on from there" in err
    assert not re.search(rf'File "{re.escape(str(ROOT))}/\w+\.py', err)  # torchrun's own stands
    assert read_state(tmp_path / "m.pt")["epoch"] >= 1


def test_without_a_name_the_ranks_share_one_made_from_the_time(begin, corpus_dir, small, tmp_path):
    out, err = finish(begin(ROOT / "main.py", *small, "--data", corpus_dir, "--epochs", 1))
    assert "| End of training | test loss" in out
    assert len(list(tmp_path.glob("*.pt"))) == 1
    assert "Warning" not in err  # one a rank, if torch had one


def test_what_the_first_rank_refuses_is_said_once(begin, corpus_dir, small, tmp_path):
    flags = [*small, "--data", corpus_dir, "--epochs", 1]
    for name in ("a.pt", "b.pt"):
        finish(begin(ROOT / "main.py", *flags, "--save", name, launch=[sys.executable]))
    process = begin(ROOT / "main.py", "--resume", "b.pt", "--save", "a.pt", "--epochs", 2)
    _, err = finish(process, 1)
    assert err.count("main.py: error: ") == 1
    assert "main.py: error: --save a.pt: exists; --resume a.pt goes on from it" in err


def test_on_a_full_disk_the_best_model_is_tested_and_reported(begin, corpus_dir, small, tmp_path):
    launch = ["bash", "-c", f'ulimit -f 4; exec {" ".join(LAUNCH)} "$@"', "bash"]
    process = begin(ROOT / "main.py", *small, "--data", corpus_dir, "--emsize", 50, "--epochs", 1,
                    "--save", "m.pt", launch=launch)
    out, err = finish(process, 1)
    assert "| End of training | test loss" in out
    assert err.count("main.py: error: ") == 1
    assert "could not be written until the end" in err
    assert not (tmp_path / "m.pt").exists()


# Each rank on a device of its own, as on a machine with two GPUs.
OWN_DEVICES = """
import sys
import torch
import flags, main, parallel

load = torch.load
torch.load = lambda *args, map_location=None, **more: load(*args, map_location="cpu", **more)
distributed.own_device = lambda device, asked_for: torch.device("cpu", distributed.rank())
flags.run(main.main)
"""


def test_ranks_with_devices_of_their_own_resume_together(begin, corpus_dir, small, tmp_path):
    (tmp_path / "own.py").write_text(OWN_DEVICES)
    flags = [*small, "--data", corpus_dir, "--epochs", 3, "--save", "m.pt"]
    process = begin("own.py", *flags, until="end of epoch +1 ")
    process.terminate()
    process.communicate(timeout=60)
    out, _ = finish(begin("own.py", "--resume", "m.pt"))
    assert "| End of training | test loss" in out


BLOCKED = """
import torch
from utils import Preemption
with Preemption():
    a = torch.zeros(12000, 12000)
    print("blocked", flush=True)
    a @ a  # for half a minute or so, in which no handler can run
"""


def test_a_second_signal_ends_a_rank_that_waits_for_ever(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "blocked\n"
    time.sleep(0.5)
    for _ in range(2):  # at once: torchrun passes on what a scheduler has sent to all
        process.terminate()
        time.sleep(0.3)
    time.sleep(3)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=10) == 143


def test_a_batch_that_does_not_divide_is_refused_once(begin, corpus_dir, small, tmp_path):
    process = begin(ROOT / "main.py", *small, "--data", corpus_dir, "--batch_size", 5)
    _, err = finish(process, 1)
    assert err.count("--batch_size 5: does not divide over 2 processes; name a multiple, or ") == 1
    assert list(tmp_path.glob("*.pt*")) == []


@pytest.mark.parametrize("flags", [["--batch_size", 5], ["--batch_size", "x"]])
def test_a_rank_lets_the_first_report_before_it_ends(flags, monkeypatch):
    """Else torchrun could end the first too soon; where the first has not found it, it speaks."""
    waited = []
    monkeypatch.setattr(parallel, "let_another_speak", lambda: waited.append(sys.stderr.getvalue()))
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed.os, "_exit", sys.exit)
        status, _, err = invoke(main.main, *flags)
        assert status == 2
        assert err.startswith("main.py: error: ")
        assert waited == [""] * int(rank)
