"""Generated text: drawn as it should be, from a checkpoint alone, the same for the same seed."""

import io
import re
import subprocess
import sys
from itertools import islice

import pytest
import torch

import generate
from conftest import ROOT, invoke, make_params
from data import EOS
from generate import Generator, truncate
from checkpoint import load


@pytest.fixture
def run(trained):
    """Runs generate.py, with the trained model if flags name no other."""
    return lambda *flags: invoke(
        lambda: generate.main(list(map(str, ["--checkpoint", trained, *flags])))
    )


@pytest.mark.parametrize(
    ("rnn_type", "attention"),
    [
        ("LSTM", "none"), ("GRU", "none"), ("QRNN", "none"), ("biLM", "none"), ("LSTM", "single"),
        ("GRU", "combined"),
    ],
)
def test_each_word_is_drawn_given_all_before_it(rnn_type, attention):
    """The likeliest word is what a pass over the whole text predicts."""
    params = make_params(rnn_type, attention=attention, dtype=torch.float64)
    model, _ = params
    if model.attention is not None:
        model.attention.join.reset_parameters()  # the identity would saturate
    for weight in params.parameters():  # so that the likeliest word changes from place to place
        weight.data.mul_(8)
    found = list(islice(Generator(params, 1, top_k=1).text([3, 7]), 30))
    text = torch.tensor([3, 7, *found])
    with torch.no_grad():
        output, _ = model(text.unsqueeze(1), model.init_hidden(1))
    assert found == model.decoder(output).argmax(1)[1:-1].tolist()
    assert len(set(found)) > 2


@pytest.mark.parametrize(
    ("temperature", "truncation"),
    [(0.5, {}), (1.0, {"top_k": 40}), (2.0, {"top_p": 0.9})],
)
def test_words_are_drawn_with_their_probability_and_never_with_none(temperature, truncation):
    logprob = torch.randn(50).log_softmax(0)
    generator = Generator(make_params(), 1, temperature, banned=[3, 5], **truncation)
    expected = logprob.double().exp() ** (1 / temperature)
    expected[[3, 5]] = 0
    expected = truncate(expected / expected.sum(), **truncation)
    draws = [generator.draw(logprob.expand(100_000, 50)) for _ in range(5)]
    found = torch.cat(draws).bincount(minlength=50) / 5e5
    assert found[expected == 0].sum() == 0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4e-3)


def test_a_split_softmax_draws_from_its_tails():
    params = make_params(splits=[10, 30])
    params[1].tail_bias.data += 5
    assert max(islice(Generator(params, 1).text([3]), 50)) >= 30


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.9}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # of what top_k leaves, 0.4 of 0.65 is more than 0.6
    ],
)
def test_truncation(settings, kept):
    probability = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=torch.float64)
    expected = torch.zeros_like(probability)
    expected[kept] = probability[kept] / probability[kept].sum()
    torch.testing.assert_close(truncate(probability, **settings), expected)


def test_text_follows_from_the_seed_and_the_flags(run):
    first = run("--words", 50)
    assert first == run("--words", 50)
    assert (first[0], first[2]) == (0, "")
    assert run("--words", 80)[1].startswith(first[1].rstrip("\n"))
    for flags in (["--seed", 2], ["--top-k", 3], ["--top-p", 0.3], ["--temperature", 0.2]):
        assert run("--words", 50, *flags)[1] != first[1]


@pytest.mark.parametrize(("prompt", "begin"), [
    ("", ""), ("ann  sees the", "ann sees the"), ("ann sees bob\nthe", "ann sees bob\nthe"),
])
def test_so_many_words_are_written_a_sentence_a_line(prompt, begin, run, trained):
    _, out, _ = run("--words", 60, "--prompt", prompt)
    assert out.startswith(begin)
    assert set(out.split()) <= set(load(trained)[1].idx2word) - {EOS}
    # The end of the last line is only an <eos> where the text ended so.
    rest = out.removeprefix(begin)
    assert len(rest.split()) + rest.count("\n") in (60, 61)
    assert not re.search("  | \n", out)


def test_unk_can_be_left_out(run, trained_with_unk):
    flags = ["--checkpoint", trained_with_unk, "--words", 300, "--temperature", 5]
    assert "<unk>" in run(*flags)[1]
    assert "<unk>" not in run(*flags, "--no-unk")[1]


def test_the_references_flags_write_a_new_file(run, tmp_path):
    path = tmp_path / "out.txt"
    flags = [
        "--data", "no/such", "--model", "LSTM", "--outf", path, "--words", 250, "--seed", 1111,
        "--temperature", 1.0, "--log-interval", 100,
    ]
    reports = "| Generated 100/250 words\n| Generated 200/250 words\n"
    assert run(*flags) == (0, "", reports)
    text = path.read_text()
    assert text == run("--words", 250)[1]
    status, _, err = run(*flags)
    assert (status, err.count("\n"), path.read_text()) == (2, 1, text)


@pytest.mark.parametrize(
    "flags",
    [
        ["--checkpoint", "absent.pt"], ["--temperature", "0"], ["--top-p", "0"],
        ["--top-p", "1.1"], ["--top-k", "-1"], ["--words", "0"], ["--outf", "no/such/f.txt"],
        ["--prompt", "ann sees zoe"], ["--model", "GRU"], ["--prompt", "\udcff UTF-8"],
    ],
)
def test_bad_input_is_one_line(flags, run):
    status, out, err = run(*flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert flags[1].split()[-1] in err


def test_interactive_finishes_the_sentence_of_each_prompt(run, trained_with_unk, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ann sees\n\nbob zoe\n")))
    flags = ["--checkpoint", trained_with_unk, "--interactive", "--words", 9]
    status, out, err = run(*flags)
    first, _, last = out.splitlines()
    assert status == 0
    assert first.startswith("ann sees")
    assert last.startswith("bob <unk>")
    assert "'zoe'" in err


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
