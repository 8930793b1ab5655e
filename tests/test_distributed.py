"""torchrun with two processes on the CPU: the same run as one, ended together, resumed together."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint import read_checkpoint, read_state
from conftest import NO_DROPOUT, ROOT, await_line

ALONE = [sys.executable]
UNDER_TORCHRUN = [*ALONE, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
TWO_RANKS = [*UNDER_TORCHRUN, "2"]


@pytest.fixture
def begin(tmp_path):
    """A function that starts a script under torchrun, waits for a line, returns the process."""
    started = []

    def run(script, *argv, until=None, launch=TWO_RANKS, **environment):
        process = subprocess.Popen(
            [*launch, str(ROOT / script), *map(str, argv)], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                 **environment},
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
    """The process ids of the ranks, the first first; none where there is no /proc."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return sorted(map(int, listed.read_text().split())) if listed.exists() else []


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
    args = arguments(lr=1.0)
    with distributed.process_group(torch.device("cpu")):
        results = {model: take_steps(model, args) for model in ("LSTM", "GRU", "QRNN")}
        torch.save(results, sys.argv[1] + str(distributed.rank()))


def take_steps(model, args):
    torch.manual_seed(distributed.rank())  # the first rank's weights are what counts
    params = make_params(model, splits=(20, 30))
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
    # 107 predictions in 5 columns, the last row of which is not complete; and in one column.
    ids = torch.randint(50, (108,))
    losses += [evaluate(params, ids, columns, 7) for columns in (5, 1)]
    return losses, params.state_dict()

flags.run_command(main)
"""


def test_two_ranks_take_the_steps_of_one(begin, tmp_path):
    """Losses, clipped gradients of model and criterion, evaluation: all as in one process."""
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    finish(begin(script, "two"))
    finish(begin(script, "one", launch=ALONE))
    finish(begin(script, "lone", launch=[*UNDER_TORCHRUN, "1"]))
    one, lone, first, second = (
        torch.load(tmp_path / name) for name in ("one0", "lone0", "two0", "two1")
    )
    torch.testing.assert_close(lone, one, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-6)
    assert all(weights["1.tail_bias"].any() for _, weights in one.values())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["LSTM --attention single", "biLM --objective both"])
def test_a_run_of_two_ranks_is_that_of_one(model, begin, corpus_dir, small, tmp_path):
    """Without dropout: training, the switch to averaging, fine-tuning, the test."""
    flags = [*small, *NO_DROPOUT, "--data", corpus_dir, "--epochs", 3, "--nonmono", 0,
             "--finetune", 1, "--lr", 1, "--partial-shuffle", "--model", *model.split()]
    two, _ = finish(begin("main.py", *flags, "--save", "two.pt"))
    one, _ = finish(begin("main.py", *flags, "--save", "one.pt", launch=ALONE))
    assert "Switching to averaged SGD" in one
    # Every line once, from the first rank, with the same losses.
    one, two = (list(map(float, re.findall(r"loss +([\d.]+)", log))) for log in (one, two))
    assert one == pytest.approx(two, abs=0.011)  # they are rounded
    one, two = (read_checkpoint(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert one["valid_loss"] == pytest.approx(two["valid_loss"], rel=1e-4)
    torch.testing.assert_close(one["model"], two["model"], rtol=1e-2, atol=1e-4)


FAILING = """
import os, signal, sys
import distributed, flags, main, train

how, rank = sys.argv.pop(), int(sys.argv.pop())
end_epoch = train.Trainer.end_epoch

def fail(self):
    if self.epoch == 2 and distributed.rank() == rank:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("this rank has failed")
    end_epoch(self)

train.Trainer.end_epoch = fail
flags.run_command(main.main)
"""


@pytest.mark.parametrize(("rank", "how"), [(0, "raises"), (1, "raises"), (0, "dies"), (1, "dies")])
def test_when_a_rank_fails_the_others_do_not_hang(rank, how, begin, corpus_dir, small, tmp_path):
    script, save = tmp_path / "failing.py", tmp_path / "m.pt"
    script.write_text(FAILING)
    process = begin(script, *small, "--data", corpus_dir, "--save", save, rank, how,
                    until="end of epoch +1 ")
    _, err = finish(process, 1)
    assert ("ValueError: this rank has failed" in err) == (how == "raises")
    assert read_state(save)["epoch"] >= 1  # the last one that was saved stands


def test_a_set_up_that_fails_names_its_cause(begin, corpus_dir):
    process = begin("main.py", "--data", corpus_dir, launch=[*UNDER_TORCHRUN, "1"],
                    GLOO_SOCKET_IFNAME="nowhere")
    _, err = finish(process, 1)
    assert re.search("^main.py: error: the processes cannot communicate: .*nowhere", err, re.M)
    assert not re.search(rf'File "{re.escape(str(ROOT))}/\w+\.py', err)  # torchrun's own stands


@pytest.mark.slow
def test_ended_together_and_resumed_it_is_the_same_run(begin, corpus_dir, small, tmp_path):
    """A signal to torchrun, or to one of the processes only, with dropout of its own in each."""
    flags = [*small, "--data", corpus_dir, "--epochs", 4, "--nonmono", 0, "--save"]
    finish(begin("main.py", *flags, "whole.pt"))
    process = begin("main.py", *flags, "parts.pt", until=r"epoch +2 \| +20/")
    process.terminate()
    out, _ = process.communicate(timeout=60)
    out = process.begun + out
    assert "Exiting from training early (SIGTERM)" in out
    assert out.count("torchrun --nproc_per_node=2 main.py --resume parts.pt resumes from here") == 1

    # Another number of ranks is announced.
    out, _ = finish(begin("main.py", "--resume", "parts.pt", "--save", "alone.pt", launch=ALONE))
    assert re.search("no longer bit-identical.*ranks 2 -> 1", out)

    process = begin("main.py", "--resume", "parts.pt", until="end of epoch +2 ")
    assert "The resumed run is bit-identical to an uninterrupted run" in process.begun
    if children(process):
        os.kill(children(process)[1], signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert "Exiting from training early (SIGINT)" in process.begun + out
        process = begin("main.py", "--resume", "parts.pt")
    finish(process)
    whole, parts = (read_checkpoint(tmp_path / name) for name in ("whole.pt", "parts.pt"))
    torch.testing.assert_close(whole["model"], parts["model"], rtol=0, atol=0)
    assert whole["valid_loss"] == parts["valid_loss"]


def test_without_a_name_the_ranks_share_one_made_from_the_time(begin, corpus_dir, small, tmp_path):
    out, err = finish(begin("main.py", *small, "--data", corpus_dir, "--epochs", 1))
    assert "| End of training | test loss" in out
    assert len(list(tmp_path.glob("*.pt"))) == 1
    assert "Warning" not in err  # one a rank, if torch had one


@pytest.mark.parametrize(("flags", "message"), [
    ("--batch_size 5", "--batch_size 5: not divisible by 2 processes; use a multiple, or "),
    ("--save absent/m.pt", "--save absent/m.pt: cannot be written (No such"),  # first rank's
])
def test_a_refusal_ends_all_ranks(flags, message, begin, corpus_dir, tmp_path):
    _, err = finish(begin("main.py", "--data", corpus_dir, *flags.split()), 1)
    assert f"main.py: error: {message}" in err
    assert list(tmp_path.glob("*.pt*")) == []


def test_on_a_full_disk_the_best_model_is_tested_and_reported(begin, corpus_dir, small, tmp_path):
    launch = ["bash", "-c", f'ulimit -f 4; exec {" ".join(TWO_RANKS)} "$@"', "bash"]
    process = begin("main.py", *small, "--data", corpus_dir, "--emsize", 50, "--epochs", 1,
                    "--save", "m.pt", launch=launch)
    out, err = finish(process, 1)
    assert "| End of training | test loss" in out
    assert "could not be written; free disk space" in err
    assert not (tmp_path / "m.pt").exists()
