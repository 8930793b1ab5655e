"""Generated text: drawn as it should be, from a checkpoint alone, the same for the same seed."""

import io
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import generate
from conftest import ROOT, invoke, make_params
from data import EOS
from checkpoint import pack
from generate import Generator, truncate
from checkpoint import load, read_checkpoint


def run(*argv):
    return invoke(lambda: generate.main(list(map(str, argv))))


def take(ids, number):
    return list(itertools.islice(ids, number))


@pytest.mark.parametrize(
    ("rnn_type", "attention"),
    [("LSTM", "none"), ("GRU", "none"), ("biLM", "none"), ("LSTM", "single"), ("GRU", "combined")],
)
def test_the_likeliest_word_is_what_the_whole_text_predicts(rnn_type, attention):
    """So the state is carried on: each word is drawn given all before it."""
    params = make_params(rnn_type, attention=attention, dtype=torch.float64).eval()
    model, _ = params
    if model.attention is not None:
        model.attention.join.reset_parameters()  # the identity would saturate
    for weight in params.parameters():  # so that the likeliest word changes from place to place
        weight.data.mul_(8)
    found = take(Generator(params, 1, top_k=1).text([3, 7]), 30)
    text = torch.tensor([3, 7, *found])
    with torch.no_grad():
        output, _ = model(text.unsqueeze(1), model.init_hidden(1))
    assert found == model.decoder(output).argmax(1)[1:-1].tolist()
    assert len(set(found)) > 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_words_are_drawn_with_the_probability_of_the_softmax(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    generator = Generator(make_params(), 1, temperature, banned=[4])
    logprob = logits.log_softmax(0)
    before = logprob.clone()
    draws = [generator.draw(logprob).item() for _ in range(20_000)]
    found = np.bincount(draws, minlength=5) / 20_000
    weights = np.exp(np.array([2.0, 1.0, 0.0, -1.0]) / temperature)
    assert found[4] == 0
    assert found[:4] == pytest.approx(weights / weights.sum(), abs=0.015)
    assert torch.equal(logprob, before)


@pytest.mark.parametrize("settings", [{"top_k": 40}, {"top_p": 0.9}, {}])
def test_what_has_no_probability_is_never_drawn(settings):
    logits = torch.randn(50).log_softmax(0)
    generator = Generator(make_params(), 1, banned=[3, 5], **settings)
    probability = logits.double().exp()
    probability[[3, 5]] = 0
    left = truncate(probability / probability.sum(), **settings)
    draws = [generator.draw(logits.expand(100_000, 50)) for _ in range(10)]
    found = torch.cat(draws).bincount(minlength=50)
    assert found[left == 0].sum() == 0
    torch.testing.assert_close(found / 1e6, left.float(), rtol=0, atol=3e-3)


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert getattr(result, "dtype", None) != torch.float64, function
        return result


def test_no_float64_where_the_device_has_none(monkeypatch):
    generator = Generator(make_params(), 1, banned=[3], top_k=5)
    monkeypatch.setattr(torch.Tensor, "is_mps", True)
    with NoFloat64():
        generator.draw(torch.randn(1, 50))


def test_a_split_softmax_draws_from_its_tails():
    params = make_params(splits=[10, 30])
    params[1].tail_bias.data += 5
    assert max(take(Generator(params, 1).text([3]), 50)) >= 30


def test_truncation():
    probability = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=torch.float64)

    def found(**settings):
        return truncate(probability.clone(), **settings).tolist()

    assert found(top_k=2) == pytest.approx([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0])
    assert found(top_k=99) == pytest.approx(probability.tolist())
    assert found(top_p=1e-9) == [0, 1, 0, 0, 0]
    assert found(top_p=0.41) == pytest.approx([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0])
    assert found(top_p=0.9) == pytest.approx([0.1 / 0.95, 0.4 / 0.95, 0.2 / 0.95, 0.25 / 0.95, 0])
    # The nucleus is of what top_k leaves: 0.4 of 0.65 is more than 0.6 of it.
    assert found(top_k=2, top_p=0.6) == [0, 1, 0, 0, 0]


def test_the_same_seed_writes_the_same_text(trained):
    first, again = (run("--checkpoint", trained, "--words", 50) for _ in range(2))
    assert first == again
    assert first[0] == 0
    other = run("--checkpoint", trained, "--words", 50, "--seed", 2)
    assert other[1] != first[1]
    longer = run("--checkpoint", trained, "--words", 80)
    assert longer[1].startswith(first[1].rstrip("\n"))
    for flags in (["--top-k", 3], ["--top-p", 0.3], ["--temperature", 0.2]):
        assert run("--checkpoint", trained, "--words", 50, *flags)[1] != first[1]


def test_so_many_words_are_written_a_sentence_a_line(trained):
    _, out, err = run("--checkpoint", trained, "--words", 60)
    assert err == ""
    _, vocabulary = load(trained)
    assert set(out.split()) <= set(vocabulary.idx2word) - {EOS}
    # The end of the last line is only an <eos> where the text ended so.
    assert len(out.split()) + out.count("\n") in (60, 61)
    assert "  " not in out
    assert " \n" not in out
    assert out.endswith("\n")


def test_a_prompt_begins_the_text(trained):
    _, out, _ = run("--checkpoint", trained, "--words", 5, "--prompt", "ann  sees the")
    assert out.startswith("ann sees the")
    assert len(out.split()) + out.count("\n") in (8, 9)
    status, out, err = run("--checkpoint", trained, "--words", 5, "--prompt", "ann sees zoe")
    assert (status, out) == (2, "")
    assert "its vocabulary has no <unk>, and lacks 'zoe'; leave them out" in err


def test_words_that_are_unknown_are_named(trained_with_unk):
    status, out, err = run(
        "--checkpoint", trained_with_unk, "--words", 5, "--prompt", "ann sees zoe"
    )
    assert status == 0
    assert out.startswith("ann sees <unk>")
    assert err == "Warning: not in the vocabulary, read as <unk>: 'zoe'\n"


def test_unk_can_be_left_out(trained_with_unk):
    argv = ["--checkpoint", trained_with_unk, "--words", 300, "--temperature", 5]
    assert "<unk>" in run(*argv)[1]
    assert "<unk>" not in run(*argv, "--no-unk")[1]


def test_the_references_flags_write_a_file(trained, tmp_path):
    for words in (250, 100):
        out = tmp_path / f"{words}.txt"
        status, printed, err = run(
            "--data", "no/such", "--model", "LSTM", "--checkpoint", trained, "--outf", out,
            "--words", words, "--seed", 1111, "--temperature", 1.0, "--log-interval", 100,
        )
        assert (status, printed) == (0, "")
        reports = [f"| Generated {n}/{words} words\n" for n in (100, 200) if n <= words]
        assert err == "".join(reports)
        assert len(out.read_text().split()) + out.read_text().count("\n") in (words, words + 1)
    assert out.read_text() == run("--checkpoint", trained, "--words", 100)[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--checkpoint", "absent.pt"], "absent.pt: no such checkpoint"),
        (["--temperature", "0"], "argument --temperature: must be a number of 0.001 or more"),
        (["--top-p", "0"], "argument --top-p: must be a number above 0, not 0"),
        (["--top-p", "1.1"], "argument --top-p: must be a number of 1 or less, not 1.1"),
        (["--top-k", "-1"], "argument --top-k: must be a whole number of 0 or more"),
        (["--words", "0"], "argument --words: must be a whole number in [1, "),
        (["--outf", "no/such/f.txt"], "--outf no/such/f.txt: cannot be written (No such file"),
        (["--outf", "{trained}"], "--outf {trained}: exists; remove it, or name another"),
        (["--interactive", "--prompt", "ann"], "--interactive: asks for the prompt"),
        (["--model", "GRU"], "--model GRU: {trained} holds a model LSTM; leave the flag out"),
    ],
)
def test_bad_input(argv, message, trained):
    before = trained.read_bytes()
    argv = [text.format(trained=trained) for text in argv]
    status, out, err = run("--checkpoint", trained, *argv)
    assert (status, out) == (2, "")
    assert err.partition("error: ")[2].startswith(message.format(trained=trained))
    assert err.count("\n") == 1
    assert trained.read_bytes() == before


def test_interactive_goes_on_with_each_prompt_to_the_sentences_end(trained_with_unk, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ann sees\n\nbob zoe\n"))
    status, out, err = run("--checkpoint", trained_with_unk, "--interactive", "--words", 9)
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("ann sees")
    assert lines[2].startswith("bob <unk>")
    assert all(len(line.split()) <= 11 for line in lines)
    assert "read as <unk>: 'zoe'" in err


def test_text_streams_and_a_reader_that_leaves_ends_it_quietly(trained):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), "--checkpoint", str(trained),
         "--words", "100000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    assert process.stdout.readline()  # long before the last word
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_closed_streams(closed, trained):
    flags = "--interactive" if closed == "<&-" else "--words 3"
    done = subprocess.run(
        f"{sys.executable} {ROOT}/generate.py --checkpoint {trained} {flags} {closed}", shell=True,
        capture_output=True, text=True,
    )
    expected = "generate.py: error: --interactive: standard input is closed; open it\n"
    assert (done.returncode, done.stderr) == ((2, expected) if closed == "<&-" else (0, ""))


def test_a_file_that_is_no_regular_one_is_written_to(trained):
    command = f"{sys.executable} {ROOT}/generate.py --checkpoint {trained} --words 9 --outf"
    piped = subprocess.run(f"{command} /dev/stdout | cat", shell=True, capture_output=True,
                           text=True, timeout=60)
    assert piped.stdout == run("--checkpoint", trained, "--words", 9)[1]
    if Path("/dev/full").exists():
        full = subprocess.run(f"{command} /dev/full", shell=True, capture_output=True, text=True)
        assert full.returncode == 2
        assert full.stderr.startswith("generate.py: error: the output cannot be written (No space")


def test_checkpoints_that_no_text_can_come_from(trained, tmp_path):
    for change, message in (("nan", "its weights are not all finite"), ("eos", "has no <eos>")):
        checkpoint = read_checkpoint(trained)
        if change == "nan":
            checkpoint["model"]["decoder.bias"][0] = float("nan")
        else:
            words = checkpoint["vocabulary"]
            words[words.index(EOS)] = "other"
        content = {k: v for k, v in checkpoint.items() if k not in ("format", "version")}
        path = tmp_path / f"{change}.pt"
        path.write_bytes(pack("checkpoint", checkpoint["version"], content))
        status, out, err = run("--checkpoint", path)
        assert (status, out) == (2, "")
        assert message in err
