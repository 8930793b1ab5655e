"""Fixtures: small corpora, the real ones where they are present, and the command lines."""

import io
import os
import re
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import flags
import main
from bidirectional import is_bilm, make_model
from checkpoint import Run, pack, read_checkpoint, read_state
from data import EOS, SPLITS, Dictionary
from kill_loop import lines
from model import RNN_TYPES
from splitcross import SplitCrossEntropyLoss
from utils import Preempted
from train import Trainer

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("AWD_LSTM_DATA", ROOT / "data"))
IDENTICAL = "The resumed run is bit-identical to an uninterrupted run"
CHANGED = "no longer bit-identical to an uninterrupted run: "
NO_DROPOUT = "--dropout 0 --dropouth 0 --dropouti 0 --dropoute 0 --wdrop 0".split()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def corpus_dir(tmp_path):
    """A folder with a small corpus of four-word sentences from a tiny grammar."""
    generator = np.random.default_rng(7)
    names, verbs = ["ann", "bob", "cat", "dog"], ["sees", "hears", "likes"]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, count in zip(SPLITS, (250, 40, 30)):
        text = [
            f"{generator.choice(names)} {generator.choice(verbs)} the {generator.choice(names)}"
            for _ in range(count)
        ]
        (folder / f"{split}.txt").write_text("\n".join(text) + "\n")
    return folder


@pytest.fixture
def with_bf16(monkeypatch):
    """--precision bf16 is accepted on a processor that only emulates bfloat16, too."""
    monkeypatch.setattr(flags, "has_bf16_products", lambda: True)


@pytest.fixture
def real_corpus():
    """A function from a folder's name to the path of the real corpus; skips, by name, if absent."""

    def find(name):
        if not (DATA / name / "train.txt").exists():
            pytest.skip(f"corpus {name} is absent; ./getdata.sh fetches it")
        return DATA / name

    return find


@pytest.fixture
def cli(tmp_path):
    """A function that runs a script in a process of its own, in an empty folder."""
    folder = tmp_path / "cwd"
    folder.mkdir()

    def run(script, *argv, **kwargs):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, argv)],
            cwd=folder, capture_output=True, text=True, timeout=240, **kwargs,
        )

    run.folder = folder
    return run


def await_line(process, pattern):
    """Reads what a process prints until a line matches; it is kept in `process.begun`."""
    process.begun = ""
    while pattern and not re.search(pattern, process.begun):
        line = process.stdout.readline()
        assert line, process.stderr.read()
        process.begun += line
    return process


@pytest.fixture
def small():
    """Flags of a model that trains in a second."""
    return (
        "--emsize 8 --nhid 12 --nlayers 2 --batch_size 4 --bptt 10 --lr 5 --log-interval 20"
    ).split()


def invoke(main_function, *argv):
    """Runs a command in this process; returns (exit status, its stdout, its stderr)."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["main.py", *map(str, argv)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit:
            flags.run_command(main_function)
    finally:
        sys.argv = before
    return exit.value.code or 0, out.getvalue(), err.getvalue()


def succeed(*argv, command=main.main):
    """Runs a command that must succeed without a warning; returns what it prints."""
    status, out, err = invoke(command, *argv)
    assert (status, err) == (0, "")
    return out


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


def edit(path, **new):
    """Changes and seals what a checkpoint or a training state holds."""
    contents = {**torch.load(path, weights_only=True), **new}
    path.write_bytes(pack(contents["format"].removeprefix("awd-lstm "), contents))


def train_to(path, folder, small):
    """Trains a model for one epoch; returns the path of its checkpoint."""
    succeed("--data", folder, *small, "--epochs", 1, "--save", path)
    return path


@pytest.fixture
def trained(corpus_dir, small, tmp_path):
    """The path of a checkpoint, trained for one epoch."""
    return train_to(tmp_path / "trained.pt", corpus_dir, small)


@pytest.fixture
def trained_with_unk(small, tmp_path):
    """The path of a checkpoint whose vocabulary has <unk>."""
    folder = tmp_path / "unk"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.txt").write_text("ann sees <unk>\nbob hears the cat\n" * 30)
    return train_to(tmp_path / "unk.pt", folder, small)


@pytest.fixture
def unfinished(corpus_dir, small, tmp_path):
    """A run of three epochs that was ended in its second: (path, its command's flags)."""
    path = tmp_path / "run.pt"
    flags = ["--data", corpus_dir, *small, "--epochs", 3, "--nonmono", 0, "--save", path]
    out = stop([45], *flags)
    assert f"The state is saved; python main.py --resume {path} resumes from here" in out
    return path, flags


# The arguments of make_params for a model of each kind.
MODELS = {kind: {"rnn_type": kind} for kind in RNN_TYPES}
MODELS |= {f"attention {kind}": {"attention": kind} for kind in ("single", "combined")}


def arguments(**changes):
    """The flags of a run, as a Namespace."""
    args, _ = main.parse_args(
        "--lr 5 --epochs 3 --batch_size 4 --bptt 10 --dropout 0.2 --log-interval 10 --device cpu"
        .split()
    )
    return Namespace(**{**vars(args), "save": None, **changes})


def make_params(
    rnn_type="LSTM", ntoken=50, rate=0.0, splits=(), dtype=None, attention="none", emsize=8, nhid=12
):
    """A small nn.ModuleList([model, criterion])."""
    model = make_model(rnn_type, ntoken, emsize, nhid, 2, *[rate] * 5, tie_weights=True,
                       attention=attention, attention_window=13)
    return nn.ModuleList([model, SplitCrossEntropyLoss(emsize, splits)]).to(dtype)


def make_corpus(train, evaluated, ntoken):
    """A corpus of ids [N], whose words are their ids."""
    return Namespace(
        train=train, valid=evaluated, test=evaluated, name="ids", digest="0",
        dictionary=Dictionary([EOS, *map(str, range(1, ntoken))]),
    )


def reversed_text(params, words, targets):
    """What a step of biLM takes besides: a window of the reversed text, here the same one."""
    return {"backward": (words, targets), "is_first_window": True} if is_bilm(params) else {}


def make_trainer(params, corpus, args, check=lambda due=False: due, **kwargs):
    """A Trainer of main.py's."""
    return Trainer(params, corpus, args, Run(args, "main.py", check), **kwargs)


class Interrupting:
    """A `check` that raises at its calls of the given numbers (batches and evaluation windows)."""

    def __init__(self, *points):
        self.points, self.calls = set(points), 0

    def __call__(self, due=False):
        self.calls += 1
        if self.calls in self.points:
            raise Preempted(15)
        return due
