"""Scores of text against the model word by word, however the lines are batched."""

import io
import sys

import pytest
import torch

import evaluate
import generate
import main
import pointer
from conftest import invoke, make_params
from evaluate import score_lines
from checkpoint import load


def run(*argv):
    return invoke(lambda: evaluate.main(list(map(str, argv))))


def logprob_of(model, ids, backward=None):
    """The sum of the log-probabilities of ids[1:], one at a time."""
    total = 0.0
    for t in range(1, len(ids)):
        with torch.no_grad():
            words = torch.tensor(ids[:t]).unsqueeze(1)
            state = model(words, model.init_hidden(1))[0][-1]
            if backward:
                after = torch.zeros_like(state)
                if ids[t + 1 :]:
                    words = torch.tensor(ids[t + 1 :]).flip(0).unsqueeze(1)
                    hidden = model.init_hidden(1)[len(model.rnns) :]
                    after = model.read_backward(words, hidden)[0][-1]
                state = model.combine(state, after)
            total += model.decoder(state).log_softmax(0)[ids[t]].item()
    return total


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "biLM"])
@pytest.mark.parametrize("tokens", [1, 20, 2**15])
@pytest.mark.parametrize("bptt", [2, 2000])
def test_lines_score_as_if_alone(rnn_type, tokens, bptt, monkeypatch):
    monkeypatch.setattr(evaluate, "TOKENS", tokens)
    monkeypatch.setattr(evaluate, "BPTT", bptt)
    params = make_params(rnn_type, ntoken=20, dtype=torch.float64).eval()
    lines = [[0, *torch.randint(1, 20, (n,)).tolist(), 0] for n in (3, 0, 9, 1, 5, 9)]
    expected = [logprob_of(params[0], ids, rnn_type == "biLM") for ids in lines]
    assert score_lines(params, lines) == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "most"), [("none", 40), ("single", 40), ("combined", 12)])
def test_lines_are_fewer_at_a_time_where_each_takes_more_memory(kind, most, monkeypatch):
    monkeypatch.setattr(evaluate, "TOKENS", 40)
    monkeypatch.setattr(evaluate, "BPTT", 12)
    sizes, real = [], evaluate.score_columns

    def recorded(params, words, lengths):
        sizes.append(words.numel())
        return real(params, words, lengths)

    monkeypatch.setattr(evaluate, "score_columns", recorded)
    params = make_params(ntoken=20, attention=kind, dtype=torch.float64).eval()
    lines = [[0, 5, 3, 0]] * 30
    assert len(set(score_lines(params, lines))) == 1
    assert max(sizes) == most


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "biLM"])
def test_everything_is_on_the_models_device(rnn_type):
    """On `meta` any tensor that is left on the CPU, and any wait for a value, is an error."""
    params = make_params(rnn_type, ntoken=20).to("meta").eval()
    words, lengths = torch.zeros(9, 3, dtype=torch.int64), torch.tensor([8, 5, 1])
    with torch.no_grad():
        assert evaluate.score_columns(params, words, lengths).is_meta


def test_a_split_softmax():
    params = make_params(ntoken=20, splits=[5, 9], dtype=torch.float64).eval()
    lines = [[0, 3, 17, 8, 0], [0, 12, 0]]
    expected = []
    for ids in lines:
        with torch.no_grad():
            model, criterion = params
            words = torch.tensor(ids)
            output, _ = model(words[:-1, None], model.init_hidden(1))
            logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, output)
            expected.append(logprob.gather(1, words[1:, None]).sum().item())
    assert score_lines(params, lines) == pytest.approx(expected)


def table(out):
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows[0] == ["ppl", "loss", "tokens", "unknown", "text"]
    return rows[1:]


def test_each_line_of_a_file(trained, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xef\xbb\xbfann sees the dog\r\n\r\nbob likes  the cat")
    status, out, err = run("--checkpoint", trained, "--per-line", text)
    assert (status, err) == (0, "")
    model, vocabulary = load(trained)
    rows = table(out)
    assert [row[4] for row in rows] == ["ann sees the dog", "", "bob likes the cat"]
    for ppl, loss, tokens, unknown, line in rows:
        ids = [vocabulary.word2idx[w] for w in ("<eos>", *line.split(), "<eos>")]
        expected = -logprob_of(model, ids) / (len(ids) - 1)
        assert float(loss) == pytest.approx(expected, abs=1e-4)
        assert float(ppl) == pytest.approx(2.718281828**expected, abs=0.01)
        assert (int(tokens), unknown) == (len(ids) - 1, "0")


def test_a_whole_text_is_one_stream(trained, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("ann sees the dog\nbob likes the cat\n")
    status, out, err = run("--checkpoint", trained, text)
    assert (status, err) == (0, "")
    model, vocabulary = load(trained)
    words = "<eos> ann sees the dog <eos> bob likes the cat <eos>".split()
    ids = [vocabulary.word2idx[w] for w in words]
    loss = -logprob_of(model, ids) / 10
    ppl = torch.tensor(loss).exp().item()
    assert f"| {text} | loss {loss:5.2f} | ppl {ppl:8.2f} |" in out
    assert "| 10 tokens, 0 unknown" in out
    assert run("--checkpoint", trained, text) == (status, out, err)
    sizes, real = [], evaluate.score

    def recorded(*args, batch_size):
        sizes.append(batch_size)
        return real(*args, batch_size=batch_size)

    monkeypatch.setattr(evaluate, "score", recorded)
    for columns in (1, 2, 2**30):
        _, in_parts, _ = run("--checkpoint", trained, text, "--batch_size", columns)
        assert "| 10 tokens, 0 unknown" in in_parts
    assert sizes == [1, 2, 10]  # at most one for each word


def test_the_test_split_scores_as_in_training(trained, corpus_dir, small, tmp_path):
    status, out, _ = invoke(
        main.main, "--data", corpus_dir, *small, "--epochs", 1, "--save", tmp_path / "m.pt"
    )
    assert status == 0
    logged = float(out.partition("test loss ")[2].split()[0])
    _, out, _ = run("--checkpoint", tmp_path / "m.pt", corpus_dir / "test.txt")
    assert float(out.partition("| loss ")[2].split()[0]) == pytest.approx(logged, abs=0.02)


@pytest.mark.parametrize("objective", ["lm", "cloze", "both"])
def test_bilm_reports_its_cloze_score(objective, corpus_dir, small, tmp_path):
    path, text = tmp_path / "bi.pt", tmp_path / "text.txt"
    flags = [*small, "--data", corpus_dir, "--model", "biLM", "--objective", objective]
    assert invoke(main.main, *flags, "--epochs", 1, "--save", path)[0] == 0
    text.write_text("ann sees the dog\nbob likes the cat\n")
    for use, flags in ((generate, ["--checkpoint", path]), (pointer, ["--save", path])):
        flags += ["--words", 3] if use is generate else ["--data", corpus_dir]
        status, _, err = invoke(use.main, *flags)
        assert (status, err.count("its forward language model alone is used")) == (0, 1)
        assert ("which was not trained" in err) == (objective == "cloze")
    _, out, err = run("--checkpoint", path, text)
    assert err == ""
    losses = {line.split("|")[1].strip(): line for line in out.splitlines()}
    assert set(losses) == {str(text), "forward", "backward", "cloze"}
    cloze = losses["cloze"].partition("ppl")[2].split()[0]
    assert f"ppl {float(cloze):8.2f}" in losses[str(text)]
    _, out, _ = run("--checkpoint", path, "--per-line", text)
    model, vocabulary = load(path)
    for row in table(out):
        ids = [vocabulary.word2idx[w] for w in ("<eos>", *row[4].split(), "<eos>")]
        expected = -logprob_of(model, ids, backward=True) / (len(ids) - 1)
        assert float(row[1]) == pytest.approx(expected, abs=1e-4)


def stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_unknown_words_are_mapped_and_counted(trained_with_unk, monkeypatch):
    stdin(monkeypatch, b"ann sees zoe\nbob hears zoe and eve\n")
    status, out, err = run("--checkpoint", trained_with_unk)
    assert (status, err) == (0, "")
    assert "| - | loss " in out
    assert "| 10 tokens, 4 unknown ('zoe', 'and', 'eve')" in out

    stdin(monkeypatch, b"ann sees zoe\nann sees <unk>\n")
    status, out, err = run("--checkpoint", trained_with_unk, "--per-line")
    assert status == 0
    first, second = table(out)
    assert first[:3] == second[:3]
    assert (first[3:], second[3:]) == (["1", "ann sees zoe"], ["0", "ann sees <unk>"])
    assert err == "Warning: not in the vocabulary, read as <unk>: 'zoe'\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "-: holds no words"),
        (b"\n \n", "-: holds no words"),
        (b"ann \0 sees", "-: line 1 holds a NUL byte"),
        (b"ann\n\xff\xfe", "-: line 2 is not UTF-8; convert the file"),
        (b"ann sees zoe", "{trained}: its vocabulary has no <unk>, and lacks 'zoe'; leave them"),
    ],
)
def test_bad_text(content, message, trained, monkeypatch):
    stdin(monkeypatch, content)
    status, out, err = run("--checkpoint", trained)
    assert (status, out) == (2, "")
    assert err.partition("error: ")[2].startswith(message.format(trained=trained))
    assert err.count("\n") == 1


def test_bad_files_and_flags(trained, tmp_path):
    for argv, message in (
        ([tmp_path / "absent.txt"], f"{tmp_path}/absent.txt: cannot be read (No such file"),
        ([tmp_path], f"{tmp_path}: cannot be read (Is a directory)"),
        (["-", "-"], "-: standard input can be read once; name it once"),
        (["--batch_size", 0], "argument --batch_size: must be a whole number in [1, "),
        (["--model", "GRU"], f"--model GRU: {trained} holds a model LSTM"),
    ):
        status, out, err = run("--checkpoint", trained, *argv)
        assert (status, out) == (2, "")
        assert err.partition("error: ")[2].startswith(message)
        assert err.count("\n") == 1
