"""main.py and finetune.py, end to end: whole runs, recipes, fine-tuning."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

import evaluate
import finetune
import generate
import main
import pointer
import train
from bidirectional import OBJECTIVES
from checkpoint import load, pack, read_checkpoint, read_state
from conftest import NO_DROPOUT, ROOT, invoke, succeed
from data import SPLITS, Corpus
from kill_loop import same

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
    out = succeed(*command, *CUT_DOWN, "--data", corpus_dir, "--save", tmp_path / "m.pt")
    assert re.search(END_OF_TRAINING, out)


# As they stand in the README of salesforce/awd-lstm-lm, after "python -u main.py".
CHARACTERS_AND_WIKITEXT_103 = """
--epochs 50 --nlayers 3 --emsize 400 --nhid 1840 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.1 --dropouti 0.1 --dropout 0.4 --wdrop 0.2 --wdecay 1.2e-6 --bptt 200 --batch_size 128 --optimizer adam --lr 1e-3 --data data/enwik8 --save ENWIK8.pt --when 25 35
--epochs 500 --nlayers 3 --emsize 200 --nhid 1000 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.25 --dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 --batch_size 128 --optimizer adam --lr 2e-3 --data data/pennchar --save PTBC.pt --when 300 400
--epochs 14 --nlayers 4 --emsize 400 --nhid 2500 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.1 --dropouti 0.1 --dropout 0.1 --wdrop 0 --wdecay 0 --bptt 140 --batch_size 60 --optimizer adam --lr 1e-3 --data data/wikitext-103 --save WT103.12hr.QRNN.pt --when 12 --model QRNN
"""  # noqa: E501


def text_of(corpus, text):
    """`text` as ./getdata.sh writes that corpus."""
    if corpus == "enwik8":
        return " ".join("\n" if byte == 10 else str(byte) for byte in text.encode())
    if corpus == "pennchar":
        return "".join(f"{character} " for character in text.replace(" ", "_"))
    return text


def test_character_and_wikitext_103_commands_run_from_their_own_text(
    corpus_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "default_splits", lambda ntoken: [4, 8] if ntoken == 9 else [])
    for command in CHARACTERS_AND_WIKITEXT_103.strip().splitlines():
        args, _ = main.parse_args(command.split())
        folder = tmp_path / args.data
        folder.mkdir(parents=True)
        for split in SPLITS:
            text = (corpus_dir / f"{split}.txt").read_text()
            (folder / f"{split}.txt").write_text(text_of(folder.name, text))
        out = succeed(*command.split(), *"--emsize 8 --nhid 12 --epochs 2 --when 1".split())
        assert "Dividing the learning rate by 10" in out
        assert re.search(END_OF_TRAINING, out)
        checkpoint = read_checkpoint(args.save)
        letters = set((corpus_dir / "train.txt").read_text()) - {" ", "\n"}
        if folder.name == "wikitext-103":  # a split softmax, as for its 267,735 words
            assert checkpoint["splits"] == [4, 8]
        elif folder.name == "pennchar":
            assert set(checkpoint["vocabulary"]) == {*letters, "_", "<eos>"}
        else:
            assert set(checkpoint["vocabulary"]) == {*map(str, map(ord, letters)), "32", "<eos>"}


@pytest.mark.parametrize("flags", [
    "--model biLSTM", "--model GRU --attention single", "--model QRNN --attention single",
    "--attention combined --attention-window 13",
    *(f"--model biLM --objective {objective}" for objective in OBJECTIVES),
])
def test_each_model_is_averaged_fine_tuned_and_tested(flags, corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    out = succeed("--data", corpus_dir, *small, "--epochs", 3, "--nonmono", 0, "--finetune", 1,
                  *flags.split(), "--save", path)
    assert len(re.findall(END_OF_TRAINING, out)) == 2
    if "biLM" in flags:
        for name in ("forward", "backward", "cloze"):
            # After the epochs, of the base model, after the fine-tuning, of the tests.
            assert out.count(f"| {name} ") == 3 + 1 + 1 + 2


@pytest.mark.slow
def test_train_finetune_test(cli, corpus_dir, small):
    """The whole way: train, fine-tune what that has saved, test both."""
    done = cli("main.py", "--data", corpus_dir, *small, *NO_DROPOUT, "--wdrop", 0.2,
               *"--emsize 16 --nhid 24 --lr 20 --epoch 4 --save m.pt --finetune 2".split())
    out, folder = done.stdout, cli.folder
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar but on a terminal
    assert re.search(BATCHES, out)
    tests = re.findall(END_OF_TRAINING, out)
    assert len(tests) == 2
    assert re.search(r"(?m)^Model total parameters: \d+$", out)
    # It learns that a sentence's shape is certain; no model could know more than that.
    unigram = float(re.search(r"word frequencies alone .* give test ppl ([\d.]+)", out)[1])
    limit = math.exp((math.log(4) + math.log(3) + math.log(4)) / 5)
    assert limit * 0.9 < float(tests[0]) < unigram / 2

    # One JSON line an epoch, as the log has it.
    lines = (folder / "m.pt.jsonl").read_text() + (folder / "m.pt.finetune.jsonl").read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    logged = [(record["epoch"], f"{record['valid_loss']:.2f}") for record in records]
    assert logged == [(int(epoch), loss) for epoch, loss in re.findall(END_OF_EPOCH, out)]

    checkpoint = torch.load(folder / "m.pt", weights_only=True)  # torch's own safe loader
    base = read_checkpoint(folder / "m.pt.base")
    assert (base["finetuned"], checkpoint["finetuned"]) == (False, True)
    assert checkpoint["valid_loss"] <= base["valid_loss"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "m.pt", "m.pt.base", "m.pt.base.state", "m.pt.finetune.jsonl", "m.pt.jsonl", "m.pt.state",
    ]


def test_a_text_is_read_as_characters(corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    flags = ["--save", path, "--epochs", 1]
    out = succeed("--data", corpus_dir, "--level", "char", *small, *flags)
    text = {split: (corpus_dir / f"{split}.txt").read_text() for split in ("valid", "test")}
    letters = len(set("".join((corpus_dir / f"{s}.txt").read_text() for s in SPLITS)))
    assert f"valid {len(text['valid']):,}, test {len(text['test']):,}; {letters} characters" in out
    for split in text:
        [(bpc, ppl, words)] = re.findall(
            rf"{split} bpc +([\d.]+)\n\| per word \| {split} ppl +([\d.]+) \| (\d+) words", out
        )
        assert int(words) == len(text[split].split()) + text[split].count("\n")
        bits = float(bpc) * (len(text[split]) - 1)
        assert float(ppl) == pytest.approx(2 ** (bits / int(words)), rel=0.01)
    # The level stays with the model.
    again = succeed("--resume", path, "--epochs", 2)
    assert again.count("| per word | valid ppl") == 1
    status, _, err = invoke(main.main, "--resume", path, "--level", "word")
    assert (status, err.count("\n")) == (2, 1)
    assert err.endswith("m.pt has --level char; leave the flag out\n")
    out = succeed(*flags, command=finetune.main)
    assert f"; {letters} characters" in out
    assert "| model alone | test loss" in succeed("--data", corpus_dir, *flags[:2],
                                                  command=pointer.main)


def test_a_model_of_characters_speaks_plain_text(corpus_dir, small, tmp_path):
    path, text = tmp_path / "m.pt", tmp_path / "text.txt"
    succeed("--data", corpus_dir, "--level", "char", *small, "--epochs", 1, "--save", path)
    lm = load(path)
    assert lm.split("ann  sees\nb") == [*"ann  sees", "<eos>", "b"]
    expected = lm.score("ann  sees\nthe cat\n").log_prob
    text.write_text("ann  sees\nthe cat\n")
    out = succeed("--checkpoint", path, text, command=evaluate.main)
    [(tokens, ppl, words)] = re.findall(r"([\d]+) tokens.*\n.* ppl +([\d.]+) \| (\d+) words", out)
    assert (tokens, words) == ("18", "6")
    assert float(ppl) == pytest.approx(math.exp(-expected / 6), rel=1e-3)
    out = succeed("--checkpoint", path, text, "--per-line", command=evaluate.main)
    assert [line.split("\t")[-1] for line in out.splitlines()[1:]] == ["ann  sees", "the cat"]
    prompt = ["--prompt", "ann sees the ", "--words", 20, "--seed", 2]
    out = succeed("--checkpoint", path, *prompt, command=generate.main)
    assert out.startswith("ann sees the ")
    drawn = list(lm.generate("ann sees the ", 20, seed=2))
    assert out.removesuffix("\n") == ("ann sees the " + "".join(drawn)).replace(
        "<eos>", "\n"
    ).removesuffix("\n")


def test_only_an_eos_at_the_end_of_a_line_is_noted(corpus_dir, small, tmp_path):
    with open(corpus_dir / "valid.txt", "a") as file:
        file.write("ann sees the cat <eos>\nann <eos> sees\n\nbob <eos>\t\n")
    out = succeed("--data", corpus_dir, *small, "--epochs", 1, "--save", tmp_path / "m.pt")
    read = succeed("--data", corpus_dir, "--save", tmp_path / "m.pt", command=pointer.main)
    for log in (out, read):
        assert log.count("Note: lines that end in an explicit <eos>: 2;") == 1
    (corpus_dir / "valid.txt").write_text("ann <eos> sees\n\n\n")
    out = succeed("--data", corpus_dir, *small, "--epochs", 1, "--save", tmp_path / "m.pt")
    assert "explicit" not in out


def test_a_model_can_have_any_name(corpus_dir, small, tmp_path):
    path = tmp_path / "m.jsonl"
    succeed("--data", corpus_dir, *small, "--epochs", 3, "--save", path)
    assert load(path).score("ann").tokens
    assert len((tmp_path / "m.jsonl.jsonl").read_text().splitlines()) == 3


def test_another_seed_is_another_run(corpus_dir, small, tmp_path):
    models = []
    for seed in (3, 4):
        path = tmp_path / f"{seed}.pt"
        succeed("--data", corpus_dir, *small, "--epochs", 1, "--seed", seed, "--save", path)
        models.append(read_checkpoint(path)["model"])
    assert not same(*models)


def test_each_fine_tuning_keeps_its_base(trained, corpus_dir):
    args, _ = finetune.parse_args(["--save", str(trained), "--dropouth", "0.2"])
    assert (args.data, args.epochs, args.nhid, args.bptt) == (str(corpus_dir), 8000, 12, 10)
    assert args.dropouth == 0.2
    bases = set()
    for _ in range(2):
        bases.add(trained.read_bytes())
        out = succeed("--save", trained, "--epochs", 1, "--tied", command=finetune.main)
        assert "| base model | valid loss" in out
        kept = trained.parent.glob("trained.pt.base*")
        assert bases == {path.read_bytes() for path in kept if path.suffix != ".state"}


def test_a_new_run_begins_a_new_record_of_fine_tuning(trained, corpus_dir, small):
    record = trained.with_name("trained.pt.finetune.jsonl")
    succeed("--save", trained, "--epochs", 1, command=finetune.main)
    assert record.exists()
    succeed("--data", corpus_dir, *small, "--epochs", 1, "--save", trained)
    assert not record.exists()


@pytest.mark.parametrize(("flags", "rates"), [
    ("--lr 5", "--lr 5 --bias-lr 1 --wdecay 1.2e-06"),
    ("--model GRU", "--lr 10 --bias-lr 0.02 --wdecay 1.2e-06"),
    ("--model GRU --optimizer adam", "--lr 10 --bias-lr 0.02 --wdecay 1.2e-06"),
])
def test_fine_tuning_takes_sgds_rates(flags, rates, corpus_dir, tmp_path):
    """Those that the model was trained with, or where that was not SGD, the defaults."""
    save = ["--save", str(tmp_path / "m.pt")]
    out = succeed("--data", corpus_dir, *CUT_DOWN, *flags.split(), *save, "--finetune", 1)
    assert f"With SGD: {rates} " in out
    found, _ = finetune.parse_args(save)
    assert found == finetune.parse_args([*save, *rates.split()])[0]


@pytest.mark.slow
def test_a_gru_learns_with_its_default_recipe(corpus_dir, tmp_path):
    flags = "--model GRU --emsize 32 --nhid 48 --batch_size 4 --bptt 10 --epochs 8".split()
    out = succeed("--data", corpus_dir, *flags, "--save", tmp_path / "gru.pt")
    test, unigram = map(float, re.findall(r"test ppl +([\d.]+)", out))
    assert test < unigram / 2


def test_a_vocabulary_of_one_word_is_trained_and_cannot_be_wrong(tmp_path, small):
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text("<eos>\n" * 30)
    out = succeed("--data", tmp_path, *small, "--epochs", 1, "--finetune", 1,
                  "--save", tmp_path / "m.pt")
    assert "test ppl     1.00" in out
    assert out.count("Note: lines that end in an explicit <eos>: 90;") == 1


def test_importing_has_no_side_effects(tmp_path):
    modules = ", ".join(path.stem for path in ROOT.glob("*.py"))
    printed = subprocess.check_output(
        [sys.executable, "-c", f"import {modules}"], cwd=tmp_path, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert printed == b""
    assert list(tmp_path.iterdir()) == []


def test_the_decoders_bias_begins_at_the_words_frequencies(corpus_dir, small, tmp_path):
    save = tmp_path / "model.pt"
    flags = "--lr 1e-30 --wdecay 0 --epochs 1 --decoder-bias unigram".split()
    succeed("--data", corpus_dir, *small, *flags, "--save", save)
    bias = read_checkpoint(save)["model"]["decoder.bias"]
    frequencies = torch.bincount(Corpus(corpus_dir).train, minlength=len(bias)) + 1.0
    torch.testing.assert_close(bias, (frequencies / frequencies.sum()).log())


VECTORS = "5 8\nann 1 2 3 4 5 6 7 8\nANN 9 9 9 9 9 9 9 9\nthe -1 0 0 0 0 0 0 .5\n"


@pytest.mark.parametrize("model", ["LSTM", "biLM"])
def test_the_embedding_starts_from_given_vectors(model, corpus_dir, small, tmp_path):
    path, save = tmp_path / "v.txt", tmp_path / "m.pt"
    path.write_text(VECTORS.replace("5 8", "3 8"))
    flags = ["--data", corpus_dir, *small, "--model", model, "--epochs", 1, "--save", save]
    frozen = ["--lr", 1e-30, "--wdecay", 0]
    succeed(*flags, *frozen)
    without = read_checkpoint(save)
    out = succeed(*flags, *frozen, "--embeddings", path)
    found = read_checkpoint(save)
    words = found["vocabulary"]
    assert f"2 of {len(words)} words start from the vectors in {path}\n" in out
    expected = without["model"]["encoder.weight"].clone()
    expected[words.index("ann")] = torch.arange(1.0, 9)
    expected[words.index("the")] = torch.tensor([-1, 0, 0, 0, 0, 0, 0, 0.5])
    for name, weight in found["model"].items():
        is_tied = name in ("encoder.weight", "decoder.weight")
        torch.testing.assert_close(weight, expected if is_tied else without["model"][name])


def test_vectors_are_for_a_new_run(corpus_dir, small, tmp_path):
    path, other, save = tmp_path / "v.txt", tmp_path / "none.txt", tmp_path / "m.pt"
    path.write_text(VECTORS.replace("5 8", "3 8"))
    other.write_text("zebra 0 0 0 0 0 0 0 0\n")
    flags = ["--data", corpus_dir, *small, "--epochs", 1, "--embeddings"]
    for given, message in [
        ([tmp_path / "absent"], "absent"), ([other], f"{other}: has no word of {corpus_dir}"),
        ([path, "--emsize", 9], f"--emsize 9: the vectors in {path} have 8 numbers"),
    ]:
        status, _, err = invoke(main.main, *flags, *given, "--save", save)
        assert (status, err.count("\n"), save.exists()) == (2, 1, False)
        assert message in err
    succeed(*flags, path, "--save", save)
    out = succeed("--resume", save, "--epochs", 2, "--embeddings", path)
    assert "The resumed run is bit-identical" in out
    weights = tmp_path / "weights.pt"
    weights.write_bytes(save.read_bytes())
    for resumed in (save, weights):
        status, _, err = invoke(main.main, "--resume", resumed, "--embeddings", other)
        assert (status, err.count("\n")) == (2, 1)
        assert f"--embeddings {other}: {resumed} has " in err


# ------------------------------------------------------------ recipes and schedules


def test_the_log_names_what_the_recipe_set_alone(capsys):
    main.parse_args("--recipe fast --epochs 40 --wdecay 0.1".split())
    assert capsys.readouterr().out == (
        "Recipe fast: --optimizer adamw --lr 0.003 --schedule trapezoid --decoder-bias unigram "
        "--batch_size 20 --regularization-ramp 0.3 12 --partial-shuffle\n"
    )
    main.parse_args([])
    assert capsys.readouterr().out == ""


@pytest.fixture
def begin(corpus_dir, small, tmp_path):
    """A function that trains for an epoch with flags as given; returns the checkpoint's path."""

    def begin(*given):
        path = tmp_path / "m.pt"
        plain = small[: small.index("--lr")]
        succeed("--data", corpus_dir, *plain, "--epochs", 1, "--save", path, *given)
        return path

    return begin


@pytest.mark.parametrize(("begun", "given", "message"), [
    (["--schedule", "trapezoid"], [], "uninterrupted run: epochs 1 -> 2"),  # another schedule
    (["--regularization-ramp", 0.5, 1], [], "The resumed run is bit-identical"),
    (["--recipe", "fast", "--schedule", "constant"], ["--recipe", "fast"],
     "The resumed run is bit-identical"),
    (["--recipe", "fast"], ["--recipe", "published"], "--recipe published: "),
])
def test_a_run_with_more_epochs(begun, given, message, begin):
    status, out, err = invoke(main.main, "--resume", begin(*begun), "--epochs", 2, *given)
    assert message in out + err and "Recipe" not in out
    assert status == (2 if err else 0)


def test_a_schedule_given_at_a_resume_needs_an_end(begin):
    path = begin()
    state = read_state(path)
    state["flags"]["epochs"] = 8000
    path.with_name("m.pt.state").write_bytes(pack("training state", state))
    status, _, err = invoke(main.main, "--resume", path, "--schedule", "trapezoid")
    assert status == 2 and "--schedule trapezoid: needs --epochs" in err


def test_fine_tuning_after_a_ramp_that_was_cut_short(begin):
    path = begin("--recipe", "fast", "--regularization-ramp", 0.25, 2)
    checkpoint = read_checkpoint(path)
    checkpoint["flags"]["epochs"], checkpoint["epoch"] = 60, 2
    path.write_bytes(pack("checkpoint", checkpoint))
    args, _ = finetune.parse_args(["--save", str(path)])
    assert (args.dropout, args.alpha) == pytest.approx((0.4 * 0.625, 2 * 0.625))


def test_main_fine_tunes_at_the_strength_of_the_best_models_epoch(begin, monkeypatch):
    made, fit, save = [], train.Trainer.fit, train.Trainer.save_model
    monkeypatch.setattr(train.Trainer, "fit", lambda run: made.append(run) or fit(run))
    monkeypatch.setattr(  # so that the first epoch's model is the best
        train.Trainer, "save_model", lambda run, *found: run.epoch > 1 or save(run, *found)
    )
    begin("--recipe", "fast", "--epochs", 2, "--finetune", 1, "--regularization-ramp", 0.25, 2)
    trained, fine_tuned = made
    assert trained.params[0].dropout == 0.4 * 0.625 and fine_tuned.params[0].dropout == 0.4 * 0.25


def test_a_regularizer_given_while_fine_tuning_has_that_value(begin, monkeypatch):
    path = begin("--recipe", "fast", "--finetune", 1, "--regularization-ramp", 0.25, 2)
    made, fit = [], train.Trainer.fit
    monkeypatch.setattr(train.Trainer, "fit", lambda run: made.append(run) or fit(run))
    for given in (["--dropout", 0.3], []):
        out = succeed("--resume", path, "--finetune", 2, *given)
        assert out.count("dropout 0.1 -> 0.3") == 1  # the state remembers the change
        assert made[-1].params[0].dropout == 0.3
        assert made[-1].params[0].dropouth == 0.3 * 0.25


def test_fine_tuning_after_the_fast_recipe(begin, monkeypatch):
    """SGD at its own rate and decay, no schedule, the regularizers as the ramp left them."""
    made, fit = [], train.Trainer.fit
    monkeypatch.setattr(train.Trainer, "fit", lambda run: made.append(run) or fit(run))
    path = begin("--recipe", "fast", "--finetune", 1, "--regularization-ramp", 0.25, 2)
    for flags in (
        ["--save", path, "--epochs", 1], ["--resume", path, "--epochs", 2],
        ["--save", path, "--epochs", 1, "--lr", 5, "--dropout", 0.3],
    ):
        succeed(*flags, command=finetune.main)
    strength = 0.25
    expected = [(30, 0.4 * strength)] * 3 + [(5, 0.3)]
    for run, (lr, dropout) in zip(made[1:], expected, strict=True):
        args, (model, _), group = run.args, run.params, run.optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (lr, 1.2e-6)
        assert (args.optimizer, args.schedule) == ("sgd", "constant")
        assert (model.dropout, args.alpha, args.beta) == (dropout, 2 * strength, strength)
        assert {rnn.dropout for rnn in model.rnns} == {0.5 * strength}
