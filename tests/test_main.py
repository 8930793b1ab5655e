"""main.py and finetune.py from the shell, end to end."""

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
from bidirectional import OBJECTIVES
from checkpoint import load, read_checkpoint
from conftest import NO_DROPOUT, ROOT, invoke
from data import SPLITS, Corpus

END_OF_EPOCH = (
    r"(?m)^\| end of epoch +(\d+) \| time: +[\d.]+s \| valid loss +([\d.]+) \| valid ppl +[\d.]+ "
    r"\| valid bpc +[\d.]+$"
)
END_OF_TRAINING = (
    r"(?m)^\| End of training \| test loss +[\d.]+ \| test ppl +([\d.]+) \| test bpc +[\d.]+$"
)
BATCHES = (
    r"(?m)^\| epoch +\d+ \| +\d+/ +\d+ batches \| lr [\d.]+ \| ms/batch +[\d.]+ \| loss +[\d.]+ "
    r"\| ppl +[\d.]+ \| bpc +[\d.]+$"
)
REFERENCE = (
    "--model LSTM --emsize 400 --nhid 1150 --nlayers 3 --lr 30 --clip 0.25 --epochs 8000 "
    "--batch_size 80 --bptt 70 --dropout 0.4 --dropouth 0.3 --dropouti 0.65 --dropoute 0.1 "
    "--wdrop 0.5 --seed 1111 --nonmono 5 --log-interval 200 --alpha 2 --beta 1 --wdecay 1.2e-6 "
    "--optimizer sgd --when -1 --data data/penn"
).split()
CUT_DOWN = "--emsize 8 --nhid 12 --nlayers 2 --batch_size 4 --bptt 10 --epochs 1".split()


@pytest.mark.parametrize(("command", "epochs"), [
    ("--batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epoch 500 "
     "--save PTB.pt", 500),
    ("--epochs 750 --data data/wikitext-2 --save WT2.pt --dropouth 0.2 --seed 1882", 750),
    ("--epochs 500 --nlayers 3 --emsize 200 --nhid 1000 --alpha 0 --beta 0 --dropoute 0 "
     "--dropouth 0.25 --dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 "
     "--batch_size 128 --optimizer adam --lr 2e-3 --data data/pennchar --save PTBC.pt "
     "--when 300 400", 500),
])
def test_published_commands_mean_the_published_run(command, epochs, corpus_dir, tmp_path):
    command = command.split()
    args, _ = main.parse_args(command)
    assert args.epochs == epochs
    assert args == main.parse_args([*REFERENCE, *command])[0]  # what is not named is as there
    # The same, cut down to a second, run.
    status, out, err = invoke(main.main, *command, *CUT_DOWN, "--data", corpus_dir,
                              "--save", tmp_path / "m.pt")
    assert (status, err) == (0, "")
    assert re.search(END_OF_TRAINING, out)


@pytest.mark.parametrize("flags", [
    "--model biLSTM", "--model GRU --attention single",
    "--attention combined --attention-window 13",
    *(f"--model biLM --objective {objective}" for objective in OBJECTIVES),
])
def test_each_model_is_averaged_fine_tuned_and_tested(flags, corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    status, out, err = invoke(
        main.main, "--data", corpus_dir, *small, *"--epochs 3 --nonmono 0 --finetune 1".split(),
        *flags.split(), "--save", path,
    )
    assert (status, err) == (0, "")
    assert len(re.findall(END_OF_TRAINING, out)) == 2
    wanted, _ = main.parse_args(flags.split())
    found = read_checkpoint(path)["flags"].items()
    for flag in ("model", "objective", "attention"):
        assert (flag, getattr(wanted, flag)) in found
    last = json.loads((tmp_path / "m.pt.jsonl").read_text().splitlines()[-1])
    if wanted.model == "biLM":
        for name in ("forward", "backward", "cloze"):
            # After the epochs, of the base model, after the fine-tuning, of the tests.
            assert out.count(f"| {name} ") == 3 + 1 + 1 + 2
            assert last[f"{name}_ppl"] < 15 or name not in OBJECTIVES[wanted.objective]


@pytest.mark.slow
def test_train_finetune_test(cli, corpus_dir, small):
    """The whole way: train, hand over to fine-tuning, reload the checkpoint elsewhere."""
    done = cli("main.py", "--data", corpus_dir, *small, *NO_DROPOUT, "--wdrop", 0.2,
               *"--emsize 16 --nhid 24 --lr 20 --epoch 4 --save m.pt --finetune 2".split())
    out, folder = done.stdout, cli.folder
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar but on a terminal
    assert re.search(BATCHES, out)
    tests = re.findall(END_OF_TRAINING, out)
    model, vocabulary = load(folder / "m.pt")
    assert f"Model total parameters: {sum(p.numel() for p in model.parameters())}\n" in out
    assert "m.pt.base" in out
    # It learns that a sentence's shape is certain; no model could know more than that.
    unigram = float(re.search(r"word frequencies alone .* give test ppl ([\d.]+)", out)[1])
    limit = math.exp((math.log(4) + math.log(3) + math.log(4)) / 5)
    assert limit * 0.9 < float(tests[0]) < unigram / 2

    # One JSON line an epoch, as the log has it.
    lines = (folder / "m.pt.jsonl").read_text() + (folder / "m.pt.finetune.jsonl").read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 1, 2]
    assert [record["averaging"] for record in records] == [False] * 4 + [True] * 2
    logged = [(record["epoch"], f"{record['valid_loss']:.2f}") for record in records]
    assert logged == [(int(epoch), loss) for epoch, loss in re.findall(END_OF_EPOCH, out)]
    for record in records:
        assert record["train_ppl"] == pytest.approx(math.exp(record["train_loss"]))
        assert record["valid_ppl"] == pytest.approx(math.exp(record["valid_loss"]))
        assert record["lr"] == 20
        assert min(record["seconds"], record["tokens_per_s"]) > 0

    # The checkpoint stands alone, under torch's own safe loader.
    checkpoint = torch.load(folder / "m.pt", weights_only=True)
    base = read_checkpoint(folder / "m.pt.base")
    assert (base["finetuned"], base["epoch"] in (3, 4)) == (False, True)
    assert checkpoint["valid_loss"] <= base["valid_loss"]
    corpus = Corpus(corpus_dir)
    assert checkpoint["corpus"]["sha256"] == corpus.digest
    assert vocabulary.idx2word == corpus.dictionary.idx2word
    assert (model.training, model.wdrop) == (False, 0.2)
    output, _ = model(corpus.test[:-1, None], model.init_hidden(1))
    loss = torch.nn.functional.cross_entropy(model.decoder(output), corpus.test[1:])
    assert f"{loss.exp():.2f}" == tests[1]
    assert sorted(p.name for p in folder.iterdir()) == [
        "m.pt", "m.pt.base", "m.pt.base.state", "m.pt.finetune.jsonl", "m.pt.jsonl", "m.pt.state",
    ]


@pytest.mark.slow
def test_same_seed_same_run(cli, corpus_dir, small):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        cli("main.py", "--data", corpus_dir, *small, "--epochs", 1, "--seed", seed, "--save", name)
    a, b, c = (read_checkpoint(cli.folder / name) for name in "abc")
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    assert a["valid_loss"] == b["valid_loss"] != c["valid_loss"]


def test_each_fine_tuning_keeps_its_base(trained, corpus_dir):
    args, _ = finetune.parse_args(["--save", str(trained), "--dropouth", "0.2"])
    assert (args.data, args.epochs, args.nhid, args.bptt) == (str(corpus_dir), 8000, 12, 10)
    assert args.dropouth == 0.2
    bases = set()
    for _ in range(2):
        bases.add(trained.read_bytes())
        status, out, _ = invoke(finetune.main, "--save", trained, "--epochs", 1, "--tied")
        assert status == 0
        assert "| base model | valid loss" in out
        kept = trained.parent.glob("trained.pt.base*")
        assert bases == {path.read_bytes() for path in kept if path.suffix != ".state"}


@pytest.mark.parametrize(("flags", "rates"), [
    ("--lr 5", "--lr 5 --bias-lr 1 --wdecay 1.2e-06"),
    ("--optimizer adam", "--lr 30 --bias-lr 1 --wdecay 1.2e-06"),
    ("--recipe short", "--lr 30 --bias-lr 1 --wdecay 1.2e-06"),
    ("--model GRU", "--lr 10 --bias-lr 0.02 --wdecay 1.2e-06"),
    ("--model GRU --optimizer adam", "--lr 10 --bias-lr 0.02 --wdecay 1.2e-06"),
])
def test_fine_tuning_takes_sgds_rates(flags, rates, corpus_dir, tmp_path):
    """Those that the model was trained with, or where that was not SGD, the defaults."""
    save = ["--save", str(tmp_path / "m.pt")]
    status, out, _ = invoke(main.main, "--data", corpus_dir, *CUT_DOWN, *flags.split(), *save,
                            "--finetune", 1)
    assert status == 0
    assert f"With SGD: {rates} " in out
    found, _ = finetune.parse_args(save)
    assert found == finetune.parse_args([*save, *rates.split()])[0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gru", "published"])
def test_a_gru_learns_with_its_own_recipe_and_not_with_the_lstms(recipe, corpus_dir, cli):
    flags = "--model GRU --emsize 32 --nhid 48 --batch_size 4 --bptt 10 --epochs 8 --save gru.pt"
    done = cli("main.py", "--data", corpus_dir, *flags.split(), "--on-divergence", "continue",
               "--recipe", recipe)
    test, unigram = map(float, re.findall(r"test ppl +([\d.]+)", done.stdout))
    assert test < unigram / 2 if recipe == "gru" else test > unigram


def test_a_vocabulary_of_one_word_is_trained_and_cannot_be_wrong(tmp_path, small):
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text("<eos>\n" * 30)
    flags = ["--data", tmp_path, *small, "--epochs", 1, "--finetune", 1]
    status, out, err = invoke(main.main, *flags, "--save", tmp_path / "m.pt")
    assert (status, err) == (0, "")
    assert "test ppl     1.00" in out


def test_importing_has_no_side_effects(tmp_path):
    modules = [path.stem for path in ROOT.glob("*.py")]
    assert {"main", "finetune", "model", "data", "utils", "splitcross"} <= set(modules)
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(modules)}"], cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_decoders_bias_begins_at_the_words_frequencies(corpus_dir, small, tmp_path):
    save = tmp_path / "model.pt"
    flags = "--lr 1e-30 --wdecay 0 --epochs 1 --decoder-bias unigram".split()
    assert invoke(main.main, "--data", corpus_dir, *small, *flags, "--save", save)[0] == 0
    bias = read_checkpoint(save)["model"]["decoder.bias"]
    frequencies = torch.bincount(Corpus(corpus_dir).train, minlength=len(bias)) + 1.0
    torch.testing.assert_close(bias, (frequencies / frequencies.sum()).log())
