"""Generated text: drawn as it should be, from a checkpoint alone, the same for the same seed."""

import io
import re
import subprocess
import sys

import pytest

import generate
from conftest import ROOT, invoke
from data import EOS
from checkpoint import load


@pytest.fixture
def run(trained):
    """Runs generate.py, with the trained model if flags name no other."""
    return lambda *flags: invoke(
        lambda: generate.main(list(map(str, ["--checkpoint", trained, *flags])))
    )


def test_text_follows_from_the_seed_and_the_flags(run):
    first = run("--words", 50)
    assert first == run("--words", 50)
    assert (first[0], first[2]) == (0, "")
    assert run("--words", 80)[1].startswith(first[1].rstrip("\n"))


@pytest.mark.parametrize("setting", [
    {"seed": 2}, {"top_k": 3}, {"top_p": 0.3}, {"temperature": 0.2},
])
def test_each_flag_is_that_of_the_language_model(setting, run, trained):
    [(name, value)] = setting.items()
    _, out, _ = run("--words", 50, f"--{name.replace('_', '-')}", value)
    expected = load(trained).generate(words=50, **{"seed": 1111, **setting})
    assert out.replace("\n", f" {EOS} ").split()[:50] == list(expected)


@pytest.mark.parametrize(("prompt", "begin"), [
    ("", ""), ("ann  sees the", "ann sees the"), ("ann sees bob\nthe", "ann sees bob\nthe"),
])
def test_so_many_words_are_written_a_sentence_a_line(prompt, begin, run, trained):
    _, out, _ = run("--words", 60, "--prompt", prompt)
    assert out.startswith(begin)
    _, vocabulary = load(trained)
    assert set(out.split()) <= set(vocabulary.idx2word) - {EOS}
    # The end of the last line is only an <eos> where the text ended so.
    rest = out.removeprefix(begin)
    assert len(rest.split()) + rest.count("\n") in (60, 61)
    assert not re.search("  | \n", out)


def test_the_references_flags_write_a_new_file(run, tmp_path):
    path = tmp_path / "out.txt"
    flags = [
        "--data", "no/such", "--model", "LSTM", "--outf", path, "--words", 250, "--seed", 1111,
        "--temperature", 1.0, "--log-interval", 100,
    ]
    reports = "| Generated 100/250 tokens\n| Generated 200/250 tokens\n"
    assert run(*flags) == (0, "", reports)
    text = path.read_text()
    assert text == run("--words", 250)[1]
    status, _, err = run(*flags)
    assert (status, err.count("\n"), path.read_text()) == (2, 1, text)
    assert f"--outf {path}: " in err


@pytest.mark.parametrize(("flag", "value", "message"), [
    ("--checkpoint", "absent.pt", "absent.pt: no such"), ("--model", "GRU", "--model GRU: "),
    ("--temperature", "0", "--temperature: must be"), ("--top-p", "0", "--top-p: must be"),
    ("--top-k", "-1", "--top-k: must be"), ("--words", "0", "--words: must be"),
    ("--outf", "no/such/f.txt", "no/such/f.txt: No such"),
    ("--prompt", "ann sees zoe", "'zoe'"), ("--prompt", "\udcff", "--prompt: not UTF-8"),
])
def test_bad_input_is_one_line(flag, value, message, run):
    status, out, err = run(flag, value)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_refused_prompt_leaves_no_file(run, tmp_path):
    flags = ["--outf", tmp_path / "out.txt", "--words", 5]
    assert run(*flags, "--prompt", "zebras")[0] == 2
    assert run(*flags, "--prompt", "ann")[0] == 0


def test_interactive_finishes_the_sentence_of_each_prompt(run, trained_with_unk, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ann sees\n\nbob zoe\n")))
    flags = ["--checkpoint", trained_with_unk, "--interactive", "--words", 9]
    status, out, err = run(*flags)
    first, _, last = out.splitlines()
    assert status == 0
    assert first.startswith("ann sees")
    assert last.startswith("bob <unk>")
    assert "'zoe'" in err


def test_a_prompt_that_cannot_be_read_does_not_end_the_others(run, monkeypatch):
    content = b"ann sees\nann sees zebras\n\xff\nbob\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    status, out, err = run("--interactive", "--words", 9)
    first, second, third, last = out.splitlines()
    assert (status, second, third) == (2, "", "")
    assert first.startswith("ann sees") and last.startswith("bob")
    second, third = err.splitlines()
    assert "line 2" in second and "'zebras'" in second
    assert "line 3" in third and "UTF-8" in third


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
