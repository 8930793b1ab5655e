"""main.py and finetune.py from the shell, end to end, and what they say to bad input."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

import finetune
import main
from conftest import ROOT, invoke
from data import Corpus
from train import TEST_BATCH_SIZE, evaluate
from utils import perplexity
from checkpoint import load, read_checkpoint

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
        "m.pt", "m.pt.base", "m.pt.finetune.jsonl", "m.pt.jsonl", "m.pt.state",
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


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", (30, 1, "zeros", 2, 1)),
        ("--model biLSTM", (30, 1, "zeros", 2, 1)),
        ("--model biLM", (30, 0.01, "unigram", 2, 1)),
        ("--model biLM --lr 5", (5, 0.01, "unigram", 2, 1)),
        ("--model biLM --optimizer adam", (1e-3, 1, "zeros", 2, 1)),
        ("--attention single", (30, 0.01, "unigram", 2, 1)),
        ("--attention single --model GRU", (10, 0.02, "unigram", 0.5, 0.25)),
        ("--attention single --optimizer adam", (1e-3, 1, "zeros", 2, 1)),
        ("--model GRU", (10, 0.02, "unigram", 0.5, 0.25)),
        ("--model GRU --lr 30", (30, 1, "zeros", 2, 1)),  # as in the report
        ("--model GRU --lr 30 --beta 0", (30, 1, "zeros", 2, 0)),
        ("--model GRU --optimizer adam", (1e-3, 1, "zeros", 2, 1)),
        ("--model GRU --optimizer adamw", (5e-3, 1, "zeros", 0.5, 0.25)),
        ("--model GRU --recipe short --epochs 4", (8e-3, 1, "unigram", 0.5, 0.25)),
        ("--model GRU --recipe short --epochs 4 --alpha 2", (8e-3, 1, "unigram", 2, 0.25)),
        ("--model biLM --optimizer adamw --lr 1e-3", (1e-3, 1, "zeros", 2, 1)),
        ("--model GRU --bias-lr 0.5 --decoder-bias zeros", (10, 0.5, "zeros", 0.5, 0.25)),
        ("--model GRU --alpha 3", (10, 0.02, "unigram", 3, 0.25)),
        ("--bias-lr 0.5 --decoder-bias unigram --alpha 0", (30, 0.5, "unigram", 0, 1)),
    ],
)
def test_where_a_model_begins_and_at_which_rates(flags, expected):
    args = main.parse_args(flags.split())
    assert (args.lr, args.bias_lr, args.decoder_bias, args.alpha, args.beta) == expected


@pytest.mark.parametrize(("flags", "learns"), [([], True), (["--lr", 30], False)])
def test_a_gru_learns_with_its_own_rates_and_not_with_the_lstms(flags, learns, corpus_dir, cli):
    done = cli(
        "main.py", "--model", "GRU", "--emsize", 32, "--nhid", 48, "--batch_size", 4, "--bptt", 10,
        "--data", corpus_dir, "--epochs", 8, "--on-divergence", "continue", "--save", "gru.pt",
        *flags,
    )
    test, unigram = map(float, re.findall(r"test ppl +([\d.]+)", done.stdout))
    assert test < unigram / 2 if learns else test > unigram


def test_fine_tuning_keeps_the_rates_of_a_gru(corpus_dir, small, tmp_path):
    path = tmp_path / "gru.pt"
    plain = [f for f in small if f not in ("--lr", "5")]
    command = ["--data", corpus_dir, *plain, "--model", "GRU", "--save", path]
    assert invoke(main.main, *command, "--epochs", 1)[0] == 0
    args = finetune.parse_args(["--save", str(path)])
    assert (args.lr, args.bias_lr, args.alpha) == (10, 0.02, 0.5)
    assert invoke(main.main, *command, "--epochs", 1, "--optimizer", "adam")[0] == 0
    args = finetune.parse_args(["--save", str(path)])
    assert (args.lr, args.bias_lr, args.alpha) == (10, 0.02, 2)
    state = read_checkpoint(path)["flags"]
    assert (state["lr"], state["bias_lr"]) == (1e-3, 1)


@pytest.mark.parametrize(
    ("train", "other", "words"),
    [
        (b"<eos> <eos>\n" * 30, b"<eos>\n" * 30, 1),
        (b"\xef\xbb\xbf" + b"a b c\r\n" * 30, b"a b\r\n" * 30, 4),
        (b"a b c\n" * 30, b"a unseen\n" * 30, 5),
    ],
    ids=["a vocabulary of one", "BOM and CRLF", "a token unseen in training"],
)
def test_odd_corpora_train(train, other, words, tmp_path, small):
    for split, text in (("train", train), ("valid", other), ("test", other)):
        (tmp_path / f"{split}.txt").write_bytes(text)
    path = tmp_path / "m.pt"
    status, out, err = invoke(
        main.main, "--data", tmp_path, *small, "--epochs", 1, "--save", path, "--finetune", 1
    )
    assert (status, err) == (0, "")
    checkpoint = read_checkpoint(path)
    assert len(checkpoint["vocabulary"]) == words
    if words == 1:  # it cannot be wrong
        assert checkpoint["valid_loss"] == 0
        assert "test ppl     1.00" in out


def test_importing_has_no_side_effects(tmp_path):
    modules = [p.stem for p in ROOT.glob("*.py")]
    assert {"main", "finetune", "model", "data", "utils", "splitcross"} <= set(modules)
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(modules)}"], cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", ["zeros", "unigram"])
def test_the_decoders_bias_begins_where_it_was_asked_to(start, corpus_dir, small, tmp_path):
    corpus = Corpus(corpus_dir)
    flags = ["--data", corpus_dir, *small, "--lr", "1e-30", "--wdecay", 0, "--epochs", 1]
    save = tmp_path / "model.pt"
    assert invoke(main.main, *flags, "--decoder-bias", start, "--save", save)[0] == 0
    found = read_checkpoint(save)["model"]["decoder.bias"]
    frequencies = torch.bincount(corpus.train, minlength=len(corpus.dictionary)) + 1.0
    expected = (frequencies / frequencies.sum()).log()
    torch.testing.assert_close(found, expected if start == "unigram" else torch.zeros_like(found))
