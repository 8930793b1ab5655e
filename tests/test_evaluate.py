"""Scores of text against the model word by word, and in float64."""

import io
import math
import sys

import pytest
import torch

import evaluate
import generate
import main
import pointer
from conftest import invoke, make_params
from evaluate import score_lines
from checkpoint import build_params, load, read_checkpoint


def run(*argv):
    return invoke(lambda: evaluate.main(list(map(str, argv))))


def logprob_of(params, ids):
    """The sum of the log-probabilities of ids[1:], one at a time, of a biLM from both sides."""
    model, criterion = params.double()
    total = 0.0
    for t in range(1, len(ids)):
        with torch.no_grad():
            words = torch.tensor(ids[:t]).unsqueeze(1)
            state = model(words, model.init_hidden(1))[0][-1:]
            if model.rnn_type == "biLM":
                after = torch.zeros_like(state)
                if ids[t + 1 :]:
                    words = torch.tensor(ids[t + 1 :]).flip(0).unsqueeze(1)
                    hidden = model.init_hidden(1)[len(model.rnns) :]
                    after = model.read_backward(words, hidden)[0][-1:]
                state = model.combine(state, after)
            logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, state)
            total += logprob[0, ids[t]].item()
    return total


def loss_of(path, text):
    """(The mean loss of a text, which an <eos> precedes, by the model at `path`; its tokens)."""
    ids = [load(path)[1].word2idx[word] for word in ("<eos>", *text.split())]
    logprob = logprob_of(build_params(read_checkpoint(path)).eval(), ids)
    return -logprob / (len(ids) - 1), len(ids) - 1


@pytest.mark.parametrize(
    ("rnn_type", "splits"), [("LSTM", []), ("LSTM", [5, 9]), ("GRU", []), ("biLM", [])]
)
def test_lines_score_as_if_alone(rnn_type, splits):
    params = make_params(rnn_type, ntoken=20, splits=splits, dtype=torch.float64).eval()
    for lengths in ((3, 0, 9, 1, 5, 9), (0,), (4,)):
        lines = [[0, *torch.randint(1, 20, (n,)).tolist(), 0] for n in lengths]
        expected = [logprob_of(params, ids) for ids in lines]
        assert score_lines(params, lines).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("rnn_type", ["LSTM", "biLM"])
def test_scores_leave_the_models_device_at_the_end_only(rnn_type):
    """On `meta` any tensor that is left on the CPU is an error, and so is the copy of the sums."""
    params = make_params(rnn_type, ntoken=20).to("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        score_lines(params, [[0, 3, 5, 0], [0, 0]])


def table(out):
    header, *rows = [line.split("\t") for line in out.splitlines()]
    assert header == ["ppl", "loss", "tokens", "unknown", "text"]
    return rows


def check_table(out, path):
    """Compares the rows of --per-line with the model at `path`."""
    for ppl, loss, tokens, unknown, line in table(out):
        expected, count = loss_of(path, f"{line} <eos>")
        assert float(loss) == pytest.approx(expected, abs=1e-4)
        assert float(ppl) == pytest.approx(math.exp(expected), abs=0.01)
        assert (int(tokens), unknown) == (count, "0")


def test_each_line_of_a_file(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "LINES", 2)
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xef\xbb\xbfann sees the dog\r\n\r\nbob likes  the cat")
    status, out, err = run("--checkpoint", trained, "--per-line", text)
    assert (status, err) == (0, "")
    assert [row[4] for row in table(out)] == ["ann sees the dog", "", "bob likes the cat"]
    check_table(out, trained)


def test_a_whole_text_is_one_stream(trained, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("ann sees the dog\nbob likes the cat\n")
    status, out, err = run("--checkpoint", trained, text)
    assert (status, err) == (0, "")
    loss, tokens = loss_of(trained, "ann sees the dog <eos> bob likes the cat <eos>")
    assert f"| {text} | loss {loss:5.2f} | ppl {math.exp(loss):8.2f} |" in out
    assert f"| {tokens} tokens, 0 unknown" in out
    for columns in (2, 2**30):  # at most one for each word
        assert "| 10 tokens, 0" in run("--checkpoint", trained, text, "--batch_size", columns)[1]


@pytest.mark.parametrize("objective", ["lm", "cloze"])
def test_bilm_reports_its_cloze_score(objective, corpus_dir, small, tmp_path):
    path, text = tmp_path / "bi.pt", tmp_path / "text.txt"
    flags = [*small, "--data", corpus_dir, "--model", "biLM", "--objective", objective]
    assert invoke(main.main, *flags, "--epochs", 1, "--save", path)[0] == 0
    text.write_text("ann sees the dog\nbob likes the cat\n")
    for use, flags in (
        (generate, ["--checkpoint", path, "--words", 3]),
        (pointer, ["--save", path, "--data", corpus_dir]),
    ):
        status, _, err = invoke(use.main, *flags)
        assert (status, err.count("forward language model")) == (0, 1)
        assert ("not trained" in err) == (objective == "cloze")
    _, out, err = run("--checkpoint", path, text)
    assert err == ""
    loss, _ = loss_of(path, "ann sees the dog <eos> bob likes the cat <eos>")
    parts = {line.split("|")[1].strip(): line for line in out.splitlines()}
    assert set(parts) == {str(text), "forward", "backward", "cloze"}
    for part in (str(text), "cloze"):
        assert f"loss {loss:5.2f} | ppl {math.exp(loss):8.2f}" in parts[part]
    check_table(run("--checkpoint", path, "--per-line", text)[1], path)


def test_unknown_words_are_mapped_and_counted(trained_with_unk, monkeypatch):
    def piped(content, *flags):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return run("--checkpoint", trained_with_unk, *flags)

    status, out, err = piped(b"ann sees zoe\nbob hears zoe and eve\n")
    assert (status, err) == (0, "")
    assert "| 10 tokens, 4 unknown ('zoe', 'and', 'eve')" in out

    status, out, err = piped(b"ann sees zoe\nann sees <unk>\n", "--per-line")
    first, second = table(out)
    assert first[:3] == second[:3]
    assert (first[3:], second[3:]) == (["1", "ann sees zoe"], ["0", "ann sees <unk>"])
    assert (status, "'zoe'" in err) == (0, True)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\n \n", "holds no words"),
        (b"ann \0 sees", "line 1 holds a NUL byte"),
        (b"ann\n\xff\xfe", "line 2 is not UTF-8"),
        (b"ann sees zoe", "'zoe'"),
        (None, "text.txt"),  # there is no file
    ],
)
def test_bad_text_is_one_line(content, named, trained, tmp_path):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    status, out, err = run("--checkpoint", trained, text)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert named in err
