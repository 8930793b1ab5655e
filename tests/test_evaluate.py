"""Scores of text against those of one pass of the model, in float64."""

import gzip
import io
import math
import sys

import pytest
import torch
from torch.nn import functional as F

import evaluate
import generate
import main
import pointer
from checkpoint import build_params, load, read_checkpoint
from conftest import invoke


def run(*argv):
    return invoke(lambda: evaluate.main(list(map(str, argv))))


def loss_of(path, text):
    """The mean loss of the words of `text`, which an <eos> precedes; a biLM reads both sides."""
    dictionary = load(path)[1]
    words = torch.tensor([[dictionary.word2idx[word]] for word in ("<eos>", *text.split())])
    model, criterion = build_params(read_checkpoint(path)).eval().double()
    with torch.no_grad():
        states, _ = model(words[:-1], model.init_hidden(1))
        if model.rnn_type == "biLM":
            hidden = model.init_hidden(1)[len(model.rnns) :]
            after = model.read_backward(words[1:].flip(0), hidden)[0].flip(0)
            states = model.combine(states, F.pad(after[1:], (0, 0, 0, 1)))
        logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, states)
    return -logprob.gather(1, words[1:]).mean().item()


TEXT = "ann sees the dog\n\nbob likes  the cat\n"
STREAM = TEXT.replace("\n", " <eos> ")


@pytest.fixture
def text(tmp_path):
    """The path of TEXT."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def rows(out):
    header, *rows = [line.split("\t") for line in out.splitlines()]
    assert header == ["ppl", "loss", "tokens", "unknown", "text"]
    return rows


def check_lines(path, text):
    """Compares what --per-line prints of TEXT with the model at `path`."""
    status, out, err = run("--checkpoint", path, "--per-line", text)
    assert (status, err) == (0, "")
    for line, (ppl, loss, tokens, unknown, shown) in zip(TEXT.splitlines(), rows(out), strict=True):
        expected = loss_of(path, f"{line} <eos>")
        assert float(loss) == pytest.approx(expected, abs=1e-4)
        assert float(ppl) == pytest.approx(math.exp(expected), abs=0.01)
        assert (tokens, unknown) == (str(len(line.split()) + 1), "0")
        assert shown == " ".join(line.split())


def test_a_text_is_one_stream_and_a_line_is_scored_on_its_own(trained, text):
    status, out, err = run("--checkpoint", trained, text)
    assert (status, err) == (0, "")
    loss = loss_of(trained, STREAM)
    assert f"| {text} | loss {loss:5.2f} | ppl {math.exp(loss):8.2f} |" in out
    assert "| 11 tokens, 0 unknown" in out
    for columns in (2, 2**30):  # at most one for each word
        assert "| 11 tokens, 0" in run("--checkpoint", trained, text, "--batch_size", columns)[1]
    check_lines(trained, text)
    compressed = text.with_name("text.txt.gz")
    compressed.write_bytes(gzip.compress(TEXT.encode()))
    check_lines(trained, compressed)


@pytest.mark.parametrize("objective", ["lm", "cloze"])
def test_bilm_reports_its_cloze_score(objective, corpus_dir, small, tmp_path, text):
    path = tmp_path / "bi.pt"
    flags = [*small, "--data", corpus_dir, "--model", "biLM", "--objective", objective]
    assert invoke(main.main, *flags, "--epochs", 1, "--save", path)[0] == 0
    for use, flags in (
        (generate, ["--checkpoint", path, "--words", 3]),
        (pointer, ["--save", path, "--data", corpus_dir]),
    ):
        status, _, err = invoke(use.main, *flags)
        assert (status, err.count("forward language model")) == (0, 1)
        assert ("not trained" in err) == (objective == "cloze")
    _, out, err = run("--checkpoint", path, text)
    assert err == ""
    loss = loss_of(path, STREAM)
    parts = {line.split("|")[1].strip(): line for line in out.splitlines()}
    assert set(parts) == {str(text), "forward", "backward", "cloze"}
    for part in (str(text), "cloze"):
        assert f"loss {loss:5.2f} | ppl {math.exp(loss):8.2f}" in parts[part]
    check_lines(path, text)


def test_unknown_words_are_mapped_and_counted(trained_with_unk, monkeypatch):
    def piped(content, *flags):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return run("--checkpoint", trained_with_unk, *flags)

    status, out, err = piped(b"ann sees zoe\nbob hears zoe and eve\n")
    assert (status, err) == (0, "")
    assert "| 10 tokens, 4 unknown ('zoe', 'and', 'eve')" in out

    status, out, err = piped(b"ann sees zoe\nann sees <unk>\n", "--per-line")
    first, second = rows(out)
    assert first == [*second[:3], "1", "ann sees zoe"]
    assert (status, "'zoe'" in err, second[3]) == (0, True, "0")


@pytest.mark.parametrize(
    ("content", "flags", "named"),
    [
        (b"\n \n", "", "holds no words"),
        (b"ann \0 sees", "", "line 1 holds a NUL byte"),
        (b"ann\n\xff\xfe", "", "line 2 is not UTF-8"),
        (b"ann sees zoe", "", "'zoe'"),
        (b"ann", "--per-line --batch_size 2", "--batch_size"),
        (b"ann", "absent.txt", "absent.txt"),
    ],
)
def test_bad_input_is_one_line(content, flags, named, trained, text):
    text.write_bytes(content)
    status, out, err = run("--checkpoint", trained, *flags.split(), *[text] * (".txt" not in flags))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert named in err
