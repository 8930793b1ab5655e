"""Scores of text against those of one pass of the model, in float64; the formats of the results."""

import csv
import gzip
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
from itertools import chain

import pytest
import torch
from torch.nn import functional as F

import evaluate
import finetune
import generate
import main
import pointer
from checkpoint import build_params, load, read_checkpoint
from conftest import ROOT, invoke, succeed, train_to


def run(*argv):
    return invoke(lambda: evaluate.main(list(map(str, argv))))


@torch.no_grad()
def log_probs_of(path, text, cloze=False):
    """The log-probability of each word of `text`, after an <eos>; cloze: given both sides."""
    _, vocabulary = load(path)
    words = torch.tensor([[vocabulary.word2idx[word]] for word in ("<eos>", *text.split())])
    model, criterion = build_params(read_checkpoint(path)).eval().double()
    states, _ = model(words[:-1], model.init_hidden(1))
    if cloze:
        hidden = model.init_hidden(1)[len(model.rnns) :]
        after = model.read_backward(words[1:].flip(0), hidden)[0].flip(0)
        states = model.combine(states, F.pad(after[1:], (0, 0, 0, 1)))
    logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, states)
    return logprob.gather(1, words[1:]).squeeze(1).tolist()


def loss_of(path, text, cloze=False):
    """The mean loss of the words of `text`."""
    found = log_probs_of(path, text, cloze)
    return -math.fsum(found) / len(found)


TEXT = "ann sees the dog\n\nbob likes  the cat\n"
LINES = [f"{line} <eos>" for line in TEXT.splitlines()]
STREAM = TEXT.replace("\n", " <eos> ")


@pytest.fixture
def text(tmp_path):
    """The path of TEXT."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def rows(out):
    """The rows below a header of tab-separated columns, as dictionaries."""
    header, *lines = [line.split("\t") for line in out.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def objects(out):
    """The JSON objects, one per line."""
    return [json.loads(line) for line in out.splitlines()]


def check_lines(path, text):
    """Compares what --per-line prints of TEXT with the model at `path`."""
    status, out, err = run("--checkpoint", path, "--per-line", text)
    assert status == 0
    for line, row in zip(LINES, rows(out), strict=True):
        expected = loss_of(path, line)
        assert float(row["loss"]) == pytest.approx(expected, abs=1e-4)
        assert float(row["ppl"]) == pytest.approx(math.exp(expected), rel=1e-4)
        assert (row["tokens"], row["unknown"]) == (str(len(line.split())), "0")
        assert f"{row['text']} <eos>".split() == line.split()
    return err


def test_a_text_is_one_stream_and_a_line_is_scored_by_itself(trained, text):
    status, out, err = run("--checkpoint", trained, text)
    assert (status, err) == (0, "")
    loss = loss_of(trained, STREAM)
    assert f"| {text} | loss {loss:5.2f} | ppl {math.exp(loss):8.2f} |" in out
    assert "| 11 tokens, 0 unknown" in out
    for columns in (2, 2**30):  # at most one for each word
        flags = ["--batch_size", columns, "--format", "json"]
        [row] = objects(run("--checkpoint", trained, text, *flags)[1])
        expected = load(trained).score(STREAM.split(), columns=columns).log_prob
        assert (row["tokens"], row["log_prob"]) == (11, expected)
    assert check_lines(trained, text) == ""


@pytest.mark.parametrize("name", ["text.txt.gz", "no-ending"])
def test_a_text_can_be_compressed(name, trained, text, monkeypatch):
    content = gzip.compress(TEXT.encode())
    path = text.with_name(name)
    path.write_bytes(content)
    check_lines(trained, path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    check_lines(trained, "-")


def test_programs_get_every_column_in_full_precision(trained, text):
    flags = ["--checkpoint", trained, text]
    of_lines = [log_probs_of(trained, line) for line in LINES]
    of_stream = log_probs_of(trained, STREAM)
    assert objects(run(*flags, "--format", "json")[1]) == [{
        "file": str(text), "tokens": 11, "unknown": 0,
        "log_prob": pytest.approx(sum(of_stream), abs=1e-5),
        "loss": pytest.approx(-sum(of_stream) / 11, abs=1e-6),
        "ppl": pytest.approx(math.exp(-sum(of_stream) / 11), rel=1e-6),
    }]
    found = objects(run(*flags, "--format", "json", "--per-line", "--batch_size", 2)[1])
    assert [row["log_prob"] for row in found] == pytest.approx(list(map(sum, of_lines)), abs=1e-5)
    assert [row["line"] for row in found] == [1, 2, 3]
    for per_line, expected in (([], of_stream), (["--per-line"], list(chain(*of_lines)))):
        _, out, _ = run(*flags, "--format", "csv", "--per-token", *per_line)
        found = list(csv.DictReader(io.StringIO(out)))
        assert [row["token"] for row in found] == STREAM.split()
        assert [row["line"] for row in found] == list("11111233333")
        log_probs = [float(row["log_prob"]) for row in found]
        assert log_probs == pytest.approx(expected, abs=1e-5)
        assert [float(row["surprisal"]) for row in found] == pytest.approx(
            [-p / math.log(2) for p in log_probs]
        )
    lm = load(trained)
    found = objects(run(*flags, "--format", "json", "--per-token", "--per-line")[1])
    scored = [pair for score in map(lm.score, TEXT.splitlines(True)) for pair in score.tokens]
    assert [(row["token"], row["log_prob"]) for row in found] == [
        (token, pytest.approx(log_prob, abs=1e-6)) for token, log_prob in scored
    ]


def test_a_sentence_given_another_is_a_difference_of_sums(trained, tmp_path):
    first, both = "ann sees the dog\n", "ann sees the dog\nbob likes the cat\n"
    (tmp_path / "1.txt").write_text(first)
    (tmp_path / "12.txt").write_text(both)
    _, out, _ = run(
        "--checkpoint", trained, "--format", "json", tmp_path / "1.txt", tmp_path / "12.txt"
    )
    one, two, total = objects(out)
    given = log_probs_of(trained, both.replace("\n", " <eos> "))[5:]
    assert two["log_prob"] - one["log_prob"] == pytest.approx(sum(given), abs=1e-5)
    assert (total["file"], total["tokens"]) == ("total", 15)
    assert total["log_prob"] == one["log_prob"] + two["log_prob"]


def test_quotes_and_identifiers_survive_in_csv_and_json(trained_with_unk, tmp_path):
    """The lines of WikiText's kind, with quotes, and of Kaldi's, with an identifier."""
    path = tmp_path / "quotes.txt"
    path.write_text('utt-1 ann sees " the\nutt-2 " ann " , " bob\n\nutt-4\n')
    flags = ["--checkpoint", trained_with_unk, "--per-line", path]
    plain = tmp_path / "plain.txt"
    plain.write_text('ann sees " the\n" ann " , " bob\n\n\n')
    expected = objects(run(*flags[:-1], plain, "--format", "json")[1])
    found = list(csv.DictReader(io.StringIO(run(*flags, "--ids", "--format", "csv")[1])))
    assert [row["id"] for row in found] == ["utt-1", "utt-2", "", "utt-4"]
    assert [row["text"] for row in found] == ['ann sees " the', '" ann " , " bob', "", ""]
    assert [float(row["log_prob"]) for row in found] == [row["log_prob"] for row in expected]
    found = objects(run(*flags, "--ids", "--format", "json")[1])
    assert [row["text"] for row in found] == ['ann sees " the', '" ann " , " bob', "", ""]
    assert [row["id"] for row in rows(run(*flags, "--ids")[1])] == ["utt-1", "utt-2", "", "utt-4"]


def test_an_explicit_eos_is_noted(trained, text):
    text.write_text("ann <eos>\nann <eos> sees\nbob\n")
    status, _, err = run("--checkpoint", trained, text)
    assert (status, err.count("\n")) == (0, 1)
    assert "end in an explicit <eos>: 1;" in err


def test_a_line_is_answered_before_the_next_is_written(trained):
    flags = [sys.executable, ROOT / "evaluate.py", "--checkpoint", trained, "--per-line"]
    with subprocess.Popen(flags, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        limit = threading.Timer(120, process.kill)  # else an answer held back would hang the test
        limit.daemon = True
        limit.start()
        assert process.stdout.readline().startswith(b"ppl\t")
        for line in (b"ann sees the dog\n", b"bob\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\t" + line)
        process.stdin.close()
        assert process.wait() == 0
        limit.cancel()


def test_a_bad_file_or_line_does_not_end_the_others(trained, tmp_path):
    names = ["a.txt", "empty.txt", "absent.txt", "latin1.txt", "half.txt.gz", "b.txt"]
    paths = [tmp_path / name for name in names]
    for path, content in zip(
        [paths[0], paths[1], paths[3], paths[4], paths[5]],
        [b"ann\n", b"\n", b"ann sees\ncaf\xe9\nbob\n", gzip.compress(b"ann " * 999)[:-9], b"bob\n"],
    ):
        path.write_bytes(content)
    status, out, err = run("--checkpoint", trained, *paths)
    assert status == 2
    assert re.findall(r"\| (\S+) \| loss", out) == [str(paths[0]), str(paths[5]), "total"]
    assert [any(f"{path.name}:" in line for line in err.splitlines()) for path in paths] == [
        False, True, True, True, True, False
    ]
    assert len(err.splitlines()) == 4

    status, out, err = run("--checkpoint", trained, "--per-line", "--batch_size", 2, paths[3])
    first, bad, last = rows(out)
    assert (status, first["text"], last["text"]) == (2, "ann sees", "bob")
    assert (bad["ppl"], bad["tokens"]) == ("", "")
    assert "latin1.txt: line 2: not UTF-8" in err
    _, out, _ = run("--checkpoint", trained, "--per-line", "--format", "json", paths[3])
    assert [row["loss"] is None for row in objects(out)] == [False, True, False]


def test_what_could_be_read_of_a_damaged_file_is_scored(trained, tmp_path):
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(b"ann sees the dog\n" * 5000)[:-20])
    status, out, err = run("--checkpoint", trained, "--per-line", "--batch_size", 1000, path)
    assert (status, err.count("\n")) == (2, 1)
    assert len(rows(out)) > 1000
    assert {row["text"] for row in rows(out)} == {"ann sees the dog"}


def test_any_name_of_a_file_can_be_written(trained, text, cli):
    names = [b"\xff.txt", "\u00fc.txt".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(cli.folder), name), "wb") as file:
            file.write(TEXT.encode())
    locale = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for form in ("text", "csv", "json"):
        flags = ["--checkpoint", trained, "--format", form, *map(os.fsdecode, names), text]
        done = cli("evaluate.py", *flags, env=locale)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == 4 + (form == "csv")


def test_a_carriage_return_does_not_end_a_row(corpus_dir, small, tmp_path):
    path, text = tmp_path / "m.pt", tmp_path / "text.txt"
    train = ["--data", corpus_dir, "--level", "char", *small, "--epochs", 1, "--save", path]
    (corpus_dir / "test.txt").write_bytes(b"ann\rsees\n")
    succeed(*train)
    text.write_bytes(b"ann\rsees\nbob\n")
    _, out, _ = run("--checkpoint", path, "--per-line", "--format", "csv", text)
    found = list(csv.DictReader(io.StringIO(out, newline="")))
    assert [row["text"] for row in found] == ["ann\rsees", "bob"]


@pytest.mark.parametrize("objective", ["lm", "cloze"])
def test_bilm_reads_forwards_and_reports_its_other_scores(
    objective, corpus_dir, small, tmp_path, text
):
    path = tmp_path / "bi.pt"
    flags = [*small, "--data", corpus_dir, "--model", "biLM", "--objective", objective]
    assert invoke(main.main, *flags, "--epochs", 1, "--save", path)[0] == 0
    for use, flags in (
        (generate, ["--checkpoint", path, "--words", 3]),
        (pointer, ["--save", path, "--data", corpus_dir]),
    ):
        status, _, err = invoke(use.main, *flags)
        assert (status, err.count("forward language model")) == (0, 1)
    _, out, err = run("--checkpoint", path, text)
    assert err.count("forward language model") == 1
    parts = {line.split("|")[1].strip(): line for line in out.splitlines()}
    assert set(parts) == {str(text), "forward", "backward", "cloze"}
    for part, cloze in ((str(text), False), ("forward", False), ("cloze", True)):
        loss = loss_of(path, STREAM, cloze)
        assert f"loss {loss:5.2f} | ppl {math.exp(loss):8.2f}" in parts[part]
    assert check_lines(path, text).count("\n") == 1


def test_unknown_words_are_mapped_and_counted(trained_with_unk, monkeypatch):
    def piped(content, *flags):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
        return run("--checkpoint", trained_with_unk, *flags)

    status, out, err = piped(b"ann sees zoe\nbob hears zoe and eve\n")
    assert (status, err) == (0, "")
    assert "| 10 tokens, 4 unknown ('zoe', 'and', 'eve')" in out

    status, out, err = piped(b"ann sees zoe\nann sees <unk>\n", "--per-line")
    first, second = rows(out)
    assert first == {**second, "unknown": "1", "text": "ann sees zoe"}
    assert (status, "'zoe'" in err, second["unknown"]) == (0, True, "0")
    _, out, _ = piped(b"ann sees zoe\n", "--per-token")
    assert [row["unknown"] for row in rows(out)] == ["0", "0", "1", "0"]


@pytest.mark.parametrize("token", ["<unk>", "<UNK>", "unk", "[OOV]"])
def test_the_unknown_token_is_recognised_or_named(token, small, tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(f"ann sees {token}\nbob hears the cat\n" * 30)
    path = train_to(tmp_path / "m.pt", folder, small)
    text = tmp_path / "text.txt"
    text.write_text("ann\nann sees zebras\nbob\n")
    named = ["--unk", token] if token == "[OOV]" else []
    status, out, _ = run("--checkpoint", path, text, *named)
    assert (status, "8 tokens, 1 unknown ('zebras')" in out) == (0, True)
    _, out, err = invoke(
        lambda: generate.main(["--checkpoint", str(path), "--no-unk", "--words", "300", *named])
    )
    assert (token in out, err) == (False, "")
    status, _, err = run("--checkpoint", path, text, "--unk", "absent")
    assert (status, "--unk absent" in err) == (2, True)
    (folder / "train.txt").write_text("ann sees zebras\n" * 30)
    flags = ["--save", path, "--data", folder, "--epochs", 1, *named]
    out = succeed(*flags, command=finetune.main)
    assert f"30 of 660 tokens (4.5%) are unknown, read as {token}: 'zebras'" in out
    if not named:
        return
    status, _, err = invoke(finetune.main, *flags[:-2])
    assert (status, err.count("\n"), "--unk" in err) == (2, 1, True)
    # Without a name: the lines that can be scored are, and the other is named.
    status, out, err = run("--checkpoint", path, "--per-line", text)
    assert (status, [row["ppl"] != "" for row in rows(out)]) == (2, [True, False, True])
    assert "line 2" in err and "'zebras'" in err and "--unk" in err
    assert run("--checkpoint", path, text)[:2] == (2, "")
    status, _, err = invoke(
        lambda: generate.main(["--checkpoint", str(path), "--no-unk", "--words", "3"])
    )
    assert (status, "--no-unk" in err) == (0, True)


def test_a_model_keeps_the_unknown_token_of_its_training(small, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("ann sees [OOV] and an unk\n" * 50)
    trained, started = tmp_path / "m.pt", tmp_path / "started.pt"
    succeed("--data", folder, *small, "--unk", "[OOV]", "--epochs", 1, "--save", trained)
    trained.with_name("m.pt.state").unlink()
    succeed("--resume", trained, *small[6:], "--epochs", 1, "--save", started)
    for path in (trained, started):
        assert load(path).vocabulary.unk == "[OOV]"
    assert load(trained, unk="unk").vocabulary.unk == "unk"


@pytest.mark.parametrize(
    ("content", "flags", "named"),
    [
        (b"\n \n", "", "holds no words"),
        (b"ann \0 sees", "", "line 1: holds a NUL byte"),
        (b"ann\n\xff\xfe", "", "line 2: not UTF-8"),
        (b"ann sees zoe", "", "'zoe'"),
        (b"ann", "--batch_size 0", "--batch_size"),
        (b"ann", "absent.txt", "Error: absent.txt: No such file or directory\n"),
    ],
)
def test_bad_input_is_one_line(content, flags, named, trained, text):
    text.write_bytes(content)
    status, out, err = run("--checkpoint", trained, *flags.split(), *[text] * (".txt" not in flags))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert named in err
