"""main.py and finetune.py from the shell, end to end, and what they say to bad input."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import finetune
import flags
import main
from conftest import ROOT
from data import Corpus, InputError
from train import TEST_BATCH_SIZE, evaluate, perplexity
from utils import build, load, read_checkpoint

END_OF_EPOCH = re.compile(
    r"^\| end of epoch +(\d+) \| time: +[\d.]+s \| valid loss +([\d.]+) \| valid ppl +([\d.]+) "
    r"\| valid bpc +([\d.]+)$", re.MULTILINE,
)
END_OF_TRAINING = re.compile(
    r"^\| End of training \| test loss +([\d.]+) \| test ppl +([\d.]+) \| test bpc +([\d.]+)$",
    re.MULTILINE,
)
BATCHES = re.compile(
    r"^\| epoch +\d+ \| +\d+/ +\d+ batches \| lr [\d.]+ \| ms/batch +[\d.]+ \| loss +[\d.]+ "
    r"\| ppl +[\d.]+ \| bpc +[\d.]+$", re.MULTILINE,
)


def plain_data(value):
    """Whether a loaded checkpoint holds nothing but tensors and plain data."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain_data(v) for k, v in value.items())
    if isinstance(value, list):
        return all(plain_data(v) for v in value)
    return value is None or type(value) in (str, int, float, bool, torch.Tensor)


def test_train_finetune_test(cli, corpus_dir, small):
    """The whole way: train, hand over to fine-tuning, reload the checkpoint elsewhere."""
    learning = "--emsize 16 --nhid 24 --lr 20 --dropout 0 --dropouth 0 --dropouti 0 --dropoute 0"
    done = cli("main.py", "--data", corpus_dir, *small, *learning.split(), "--wdrop", 0.2,
               "--epoch", 4, "--save", "m.pt", "--finetune", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar but on a terminal
    assert BATCHES.search(done.stdout)
    epochs = END_OF_EPOCH.findall(done.stdout)
    assert [int(e[0]) for e in epochs] == [1, 2, 3, 4, 1, 2]
    tests = END_OF_TRAINING.findall(done.stdout)
    assert len(tests) == 2
    model, vocabulary = load(cli.folder / "m.pt")
    assert f"Model total parameters: {sum(p.numel() for p in model.parameters())}\n" in done.stdout
    assert "m.pt.base" in done.stdout
    unigram = re.search(r"word frequencies alone .* give test ppl ([\d.]+)", done.stdout)[1]
    # It learns that a sentence's shape is certain; no model could know more than that.
    limit = math.exp((math.log(4) + math.log(3) + math.log(4)) / 5)
    assert limit * 0.9 < float(tests[0][1]) < float(unigram) / 2

    # One JSON line an epoch, as the log has it.
    lines = (cli.folder / "m.pt.jsonl").read_text().splitlines()
    tuned = (cli.folder / "m.pt.finetune.jsonl").read_text().splitlines()
    for number, (line, logged) in enumerate(zip(lines + tuned, epochs)):
        record = json.loads(line)
        assert record["epoch"] == int(logged[0])
        assert record["averaging"] == (number >= 4)
        assert record["valid_loss"] == pytest.approx(float(logged[1]), abs=0.006)
        assert record["valid_ppl"] == pytest.approx(math.exp(record["valid_loss"]))
        assert record["train_ppl"] == pytest.approx(math.exp(record["train_loss"]))
        assert record["lr"] == 20
        assert record["seconds"] > 0
        assert record["tokens_per_s"] > 0
    assert len(lines) + len(tuned) == len(epochs)

    # The checkpoint stands alone, and is plain data under torch's own safe loader.
    checkpoint = torch.load(cli.folder / "m.pt", weights_only=True)
    assert plain_data(checkpoint)
    base = read_checkpoint(cli.folder / "m.pt.base")
    assert (base["finetuned"], base["epoch"] in (3, 4)) == (False, True)
    assert checkpoint["valid_loss"] <= base["valid_loss"]
    corpus = Corpus(corpus_dir)
    assert checkpoint["corpus"]["sha256"] == corpus.digest
    assert vocabulary.idx2word == corpus.dictionary.idx2word
    assert not model.training
    assert model.wdrop == 0.2
    params = build(checkpoint, dropout=0, dropouth=0, dropouti=0, dropoute=0, wdrop=0)
    loss = evaluate(params, corpus.test, TEST_BATCH_SIZE, 7)
    assert f"{perplexity(loss):.2f}" == tests[1][1]
    assert sorted(p.name for p in cli.folder.iterdir()) == [
        "m.pt", "m.pt.base", "m.pt.finetune.jsonl", "m.pt.jsonl",
    ]


def test_same_seed_same_run(cli, corpus_dir, small):
    command = ["main.py", "--data", corpus_dir, *small, "--epochs", 1]
    first, second, other = (
        END_OF_EPOCH.search(cli(*command, "--seed", seed, "--save", f"{n}.pt").stdout)[3]
        for n, seed in enumerate([3, 3, 4])
    )
    a, b, c = (read_checkpoint(cli.folder / f"{n}.pt") for n in range(3))
    assert first == second
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert first != other or a["valid_loss"] != c["valid_loss"]


def invoke(main_function, *argv):
    """Runs a command in this process; returns (exit status, stderr's lines)."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["main.py", *map(str, argv)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit:
            flags.run(main_function)
    finally:
        sys.argv = before
    return exit.value.code or 0, out.getvalue(), err.getvalue()


@pytest.fixture
def trained(corpus_dir, small, tmp_path):
    """The path of a checkpoint, trained for one epoch."""
    path = tmp_path / "trained.pt"
    status, _, err = invoke(
        main.main, "--data", corpus_dir, *small, "--epochs", 1, "--save", path
    )
    assert status == 0, err
    return path


def test_finetune_takes_from_the_checkpoint_what_is_not_given(trained, corpus_dir):
    base = trained.read_bytes()
    args = finetune.parse_args(["--save", str(trained), "--dropouth", "0.2"])
    assert (args.emsize, args.nhid, args.nlayers, args.model) == (8, 12, 2, "LSTM")
    assert (args.lr, args.batch_size, args.bptt, args.dropouth) == (5, 4, 10, 0.2)
    assert (args.data, args.epochs) == (str(corpus_dir), 8000)
    status, out, _ = invoke(finetune.main, "--save", trained, "--epochs", 1, "--tied")
    assert status == 0
    assert "| base model | valid loss" in out
    copy = trained.with_name("trained.pt.base")
    assert copy.read_bytes() == base
    # Again: the base of the second fine-tuning is what the first one made; neither is lost.
    once = trained.read_bytes()
    assert invoke(finetune.main, "--save", trained, "--epochs", 1)[0] == 0
    assert copy.read_bytes() == base
    if once != base:
        assert trained.with_name("trained.pt.base2").read_bytes() == once


def test_finetune_after_adam_does_not_take_its_rate(corpus_dir, small, tmp_path):
    path = tmp_path / "adam.pt"
    plain = [f for f in small if f not in ("--lr", "5")]
    status, out, _ = invoke(
        main.main, "--data", corpus_dir, *plain, "--epochs", 1, "--optimizer", "adam",
        "--save", path,
    )
    assert status == 0
    assert "| lr 0.00100 |" in out
    assert finetune.parse_args(["--save", str(path)]).lr == 30
    status, out, _ = invoke(
        main.main, "--data", corpus_dir, *plain, "--epochs", 1, "--optimizer", "adam",
        "--save", path, "--finetune", 1,
    )
    assert status == 0
    assert "| lr 30.00000 |" in out.partition("Fine-tuning")[2]


def test_resume_is_a_warm_start_with_the_flags_given(trained, corpus_dir, tmp_path):
    save = tmp_path / "resumed.pt"
    status, out, err = invoke(
        main.main, "--resume", trained, "--data", corpus_dir, "--epochs", 1, "--save", save,
        "--batch_size", 4, "--lr", 1e-9, "--wdecay", 0,
    )
    assert status == 0, err
    assert "Warm start" in out
    before, after = read_checkpoint(trained), read_checkpoint(save)
    assert after["architecture"] == before["architecture"]
    assert after["valid_loss"] == pytest.approx(before["valid_loss"], abs=1e-4)
    assert (after["flags"]["lr"], after["flags"]["bptt"]) == (1e-9, 70)


def test_resume_onto_itself_keeps_the_better_model(trained, corpus_dir):
    content = trained.read_bytes()
    status, out, _ = invoke(
        main.main, "--resume", trained, "--data", corpus_dir, "--epochs", 1, "--save", trained,
        "--batch_size", 4, "--lr", 3000, "--clip", 0.25,
    )
    assert status == 0
    assert "Saving" not in out
    assert trained.read_bytes() == content
    # Its record is not lost either: the resumed run's line comes after it.
    assert len(trained.with_name("trained.pt.jsonl").read_text().splitlines()) == 2


def test_published_commands_parse_to_the_published_run():
    ptb = main.parse_args(
        "--batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epoch 500 "
        "--save PTB.pt".split()
    )
    expected = {
        "batch_size": 20, "data": "data/penn", "dropouti": 0.4, "dropouth": 0.25, "seed": 141,
        "epochs": 500, "save": "PTB.pt", "model": "LSTM", "emsize": 400, "nhid": 1150, "nlayers": 3,
        "lr": 30, "clip": 0.25, "bptt": 70, "dropout": 0.4, "dropoute": 0.1, "wdrop": 0.5,
        "nonmono": 5, "alpha": 2, "beta": 1, "wdecay": 1.2e-6, "optimizer": "sgd", "when": [-1],
        "log_interval": 200, "resume": "",
    }
    assert {key: getattr(ptb, key) for key in expected} == expected
    wt2 = main.parse_args(
        "--epochs 750 --data data/wikitext-2 --save WT2.pt --dropouth 0.2 --seed 1882".split()
    )
    assert (wt2.batch_size, wt2.dropouti, wt2.dropouth, wt2.lr) == (80, 0.65, 0.2, 30)
    pennchar = main.parse_args(
        "--epochs 500 --nlayers 3 --emsize 200 --nhid 1000 --alpha 0 --beta 0 --dropoute 0 "
        "--dropouth 0.25 --dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 "
        "--batch_size 128 --optimizer adam --lr 2e-3 --data data/pennchar --save PTBC.pt "
        "--when 300 400".split()
    )
    assert (pennchar.lr, pennchar.when, pennchar.alpha) == (2e-3, [300, 400], 0)
    default = main.parse_args([])
    assert (default.seed, default.dropouth, default.dropouti, default.epochs) == (
        1111, 0.3, 0.65, 8000,
    )
    assert default.save.endswith(".pt")
    assert main.parse_args(["--optimizer", "adam"]).lr < 0.1
    assert main.parse_args(["--model", "GRU"]).lr < 30


# ---------------------------------------------------------------- bad input


BAD_FLAGS = [
    (["--model", "QRNN"], "--model: model QRNN is not supported yet; choose from LSTM"),
    (["--model", "lstm2"], "--model: model lstm2 is unknown"),
    (["--emsize", "-5"], "--emsize: must be a whole number in [1, 2.14748e+09), not -5"),
    (["--nhid", "0"], "--nhid: must be"),
    (["--nlayers", "two"], "--nlayers: 'two' is not a whole number"),
    (["--batch_size", "0"], "--batch_size: must be"),
    (["--bptt", "-1"], "--bptt: must be"),
    (["--epochs", "0"], "--epochs: must be"),
    (["--dropout", "1"], r"--dropout: must be a number in [0, 1), not 1"),
    (["--wdrop", "-0.1"], "--wdrop: must be a number in [0, 1)"),
    (["--dropouti", "nan"], "--dropouti: must be"),
    (["--lr", "0"], "--lr: must be a number in (0, 1e+30)"),
    (["--clip", "-1"], "--clip: must be"),
    (["--seed", "-1"], "--seed: must be"),
    (["--device", "tpu"], "--device: must be cpu, cuda, cuda:N or mps"),
    (["--model", "biLSTM", "--nhid", "13"], "--nhid 13 is odd"),
    (["--model", "biLSTM", "--emsize", "13"], "--emsize 13 is odd"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--save", "absent/m.pt"], "--save absent/m.pt: the folder absent does not exist"),
    (["--save", "."], "--save .: is a folder"),
    (["--save", "new/"], "--save new/: is a folder"),
    (["--save", "notes.txt"], "notes.txt exists and is no checkpoint"),
    (["--save", "archive.zip"], "archive.zip exists and is no checkpoint"),
    (["--save", "run"], "run.jsonl exists and is no run's record"),
    (["--save", "run2"], "run2.jsonl exists and is no run's record"),
    (["--save", "w.pt", "--when", "3", "1"], "w.pt.e1 exists and is no checkpoint"),
    (["--device", "cpu:1"], "--device: must be cpu, cuda, cuda:N or mps"),
    (["--lr", "1e39"], "--lr: must be a number in (0, 1e+30), not 1e39"),
    (["--wdecay", "1e300"], "--wdecay: must be a number in [0, 1e+30)"),
    (["--nhid", "100000000000"], "--nhid: must be a whole number in [1, 2.14748e+09)"),
    (["--nhid", "2000000"], "out of memory; lower"),
    (["--data", "absent"], "train.txt: no such file; --data wants a folder"),
    (["--batch_size", "5000"], "--batch_size 5000: the training split has 1250 tokens"),
    (["--resume", "absent.pt"], "absent.pt: no such checkpoint"),
    (["--resume", "notes.txt"], "notes.txt: is damaged, or no checkpoint of main.py"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_FLAGS)
def test_bad_input_is_one_line_and_writes_nothing(
    argv, message, corpus_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "run.jsonl", "w.pt.e1"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "run2.jsonl").mkdir()
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("precious", "precious")
    archived = (tmp_path / "archive.zip").read_bytes()
    before = sorted(tmp_path.rglob("*"))
    status, out, err = invoke(main.main, "--data", corpus_dir, *argv)
    assert status == 2
    assert err.startswith("main.py: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "end of epoch" not in out
    assert sorted(tmp_path.rglob("*")) == before
    for name in ("notes.txt", "run.jsonl", "w.pt.e1"):
        assert (tmp_path / name).read_text() == "precious"
    assert (tmp_path / "archive.zip").read_bytes() == archived


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("argv", [["--cuda"], ["--device", "cuda"], ["--device", "cuda:1"]])
def test_cuda_where_there_is_none(argv, corpus_dir):
    status, _, err = invoke(main.main, "--data", corpus_dir, *argv)
    assert (status, err.count("\n")) == (2, 1)
    assert argv[0] in err


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickled module":  # what the original code saved
        torch.save([torch.nn.Linear(2, 2)], path)
    elif how == "someone else's":
        torch.save({"model": torch.zeros(3)}, path)
    elif how == "from a later version":
        torch.save({**torch.load(path, weights_only=True), "version": 999}, path)
    elif how == "without a vocabulary":
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["vocabulary"]
        torch.save(checkpoint, path)
    elif how == "weights of another shape":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["architecture"]["nhid"] = 14
        torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is damaged"),
        ("empty", "is damaged"),
        ("pickled module", "is damaged, or no checkpoint of main.py"),
        ("someone else's", "no checkpoint of main.py"),
        ("from a later version", "format version 999"),
        ("without a vocabulary", "lacks vocabulary"),
        ("weights of another shape", "do not fit its architecture"),
    ],
)
def test_unusable_checkpoints_are_refused_and_left_alone(how, message, trained):
    damage(trained, how)
    content = trained.read_bytes()
    status, _, err = invoke(finetune.main, "--save", trained)
    assert (status, err.count("\n")) == (2, 1)
    assert str(trained) in err
    assert message in err
    assert trained.read_bytes() == content
    assert not trained.with_name("trained.pt.base").exists()
    with pytest.raises(InputError):
        load(trained)


def test_finetune_names_what_does_not_fit(trained, corpus_dir, tmp_path):
    status, _, err = invoke(finetune.main, "--save", trained, "--nhid", 20)
    assert status == 2
    assert "--nhid 20" in err
    assert "nhid 12" in err
    other = tmp_path / "other"
    shutil.copytree(corpus_dir, other)
    (other / "train.txt").write_text("quite another text\n" * 40)
    status, _, err = invoke(finetune.main, "--save", trained, "--data", other)
    assert status == 2
    assert "vocabulary" in err
    status, _, err = invoke(finetune.main)
    assert status == 2
    assert "--save" in err


def test_a_diverging_run_says_so(cli, corpus_dir, small):
    done = cli("main.py", "--data", corpus_dir, *small, "--clip", 0, "--lr", 1e29,
               "--save", "m.pt")
    assert done.returncode == 2
    assert re.fullmatch(
        r"main\.py: error: epoch 1, lr 1e\+29: the loss is (nan|inf) at batch \d+; try a lower "
        r"--lr or --clip 0\.25; no model was saved\n", done.stderr,
    )
    assert list(cli.folder.iterdir()) == []


def test_a_save_that_fails_leaves_the_old_checkpoint(trained, monkeypatch):
    import utils

    content = trained.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.os, "fsync", full)
    with pytest.raises(InputError, match=r"trained\.pt: cannot be written \(No space left"):
        utils.write_atomically(trained, b"new")
    assert trained.read_bytes() == content
    assert not list(trained.parent.glob("*.tmp"))


# ---------------------------------------------------------------- Ctrl-C


def interrupt_after(pattern, command, folder):
    """Starts a command, sends SIGINT once its output matches; returns (status, output)."""
    process = subprocess.Popen(
        [sys.executable, "-u", *map(str, command)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )
    output = ""
    deadline = time.monotonic() + 120
    for line in process.stdout:
        output += line
        if re.search(pattern, line):
            os.kill(process.pid, signal.SIGINT)
            break
        assert time.monotonic() < deadline
    output += process.communicate(timeout=120)[0]
    return process.returncode, output


def test_ctrl_c_tests_the_best_model_and_exits_130(tmp_path, corpus_dir, small):
    command = [ROOT / "main.py", "--data", corpus_dir, *small, "--save", "m.pt"]
    status, output = interrupt_after("end of epoch +2", command, tmp_path)
    assert status == 130
    assert "Exiting from training early" in output
    assert END_OF_TRAINING.search(output)
    assert "Traceback" not in output
    assert read_checkpoint(tmp_path / "m.pt")["epoch"] in (1, 2, 3)


def test_ctrl_c_in_the_first_epoch(trained, tmp_path, corpus_dir, small):
    """A model that an earlier run left at --save is neither lost nor tested as this run's."""
    shutil.move(trained, tmp_path / "m.pt")
    content = (tmp_path / "m.pt").read_bytes()
    command = [ROOT / "main.py", "--data", corpus_dir, *small, "--save", "m.pt",
               "--bptt", 1, "--batch_size", 1, "--log-interval", 1]
    status, output = interrupt_after("1/ .* batches", command, tmp_path)
    assert status == 130
    assert "no model to test" in output
    assert "Traceback" not in output
    assert not END_OF_TRAINING.search(output)
    assert (tmp_path / "m.pt").read_bytes() == content


def test_importing_has_no_side_effects(tmp_path):
    modules = [p.stem for p in ROOT.glob("*.py")]
    assert {"main", "finetune", "model", "data", "utils", "splitcross"} <= set(modules)
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(modules)}"], cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
