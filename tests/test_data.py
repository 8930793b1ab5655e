"""Corpora, vocabularies and layouts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
from data import Corpus, InputError, batchify, batchify_exact, get_batch, unigram_loss
from properties import repeated


def write(folder, train=b"a b\nb c\n", valid=b"c d\n", test=b"a e\n"):
    folder.mkdir(exist_ok=True)
    for split, content in (("train", train), ("valid", valid), ("test", test)):
        if content is not None:
            (folder / f"{split}.txt").write_bytes(content)
    return folder


def test_ids_in_order_of_first_occurrence(tmp_path):
    corpus = Corpus(write(tmp_path))
    assert corpus.dictionary.idx2word == ["a", "b", "<eos>", "c", "d", "e"]
    assert corpus.dictionary.word2idx == {w: i for i, w in enumerate(corpus.dictionary.idx2word)}
    assert corpus.train.tolist() == [0, 1, 2, 1, 3, 2]
    assert corpus.valid.tolist() == [3, 4, 2]
    assert corpus.test.tolist() == [0, 5, 2]
    assert corpus.train.dtype == torch.int64


@pytest.mark.parametrize(
    "content",
    [b"a b\r\nb c\r\n", b"\xef\xbb\xbfa b\nb c\n", b"a b\nb c", b"  a\tb \n b  c\n"],
    ids=["CRLF", "BOM", "no newline at the end", "other white space"],
)
def test_the_same_text_in_other_clothes(tmp_path, content):
    assert Corpus(write(tmp_path, train=content)).train.tolist() == [0, 1, 2, 1, 3, 2]


def test_a_blank_line_is_an_eos(tmp_path):
    corpus = Corpus(write(tmp_path, train=b"\na\n\n"))
    assert [corpus.dictionary.idx2word[i] for i in corpus.train] == [
        "<eos>", "a", "<eos>", "<eos>",
    ]


def test_edited_text_is_read_anew(tmp_path):
    before = Corpus(write(tmp_path))
    after = Corpus(write(tmp_path, train=b"z\n"))
    assert after.dictionary.idx2word[0] == "z"
    assert before.digest != after.digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"valid\.txt: no such file; --data wants a folder"),
        (b"", r"valid\.txt: holds no words"),
        (b"\n\n \n", r"valid\.txt: holds no words"),
        (b"fine\ncaf\xe9\n", r"valid\.txt: line 2 is not UTF-8"),
        (b"fine\na\0b\n", r"valid\.txt: line 2 holds a NUL byte"),
    ],
)
def test_unusable_splits_are_named(tmp_path, content, message):
    folder = write(tmp_path, valid=None)
    if content is not None:
        write(tmp_path, valid=content)
    with pytest.raises(InputError, match=message):
        Corpus(folder)


@repeated
@given(
    st.binary(max_size=60)
    | st.text(st.sampled_from("ab \t\r\n\0\ufeff\u3000é"), max_size=40).map(str.encode)
)
def test_any_bytes_are_read_as_defined_or_refused_by_name(tmp_path, content):
    folder = write(tmp_path, valid=content)
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
        expected = [words for line in text.split("\n") for words in (*line.split(), "<eos>")]
        if not text or text.endswith("\n"):
            expected.pop()  # what follows the last line's end is no line
        usable = "\0" not in text and text.strip() != ""
    except UnicodeDecodeError:
        usable = False
    if not usable:
        with pytest.raises(InputError, match=r"valid\.txt: "):
            Corpus(folder)
        return
    corpus = Corpus(folder)
    assert [corpus.dictionary.idx2word[i] for i in corpus.valid] == expected


def test_a_line_of_fifty_megabytes_is_read(tmp_path):
    line = b"some words " * 5_000_000
    corpus = Corpus(write(tmp_path, train=line))
    assert len(line) > 50e6
    assert len(corpus.train) == 10_000_001
    assert corpus.dictionary.idx2word[:3] == ["some", "words", "<eos>"]


def test_a_token_unseen_in_training_is_a_word_like_any_other(tmp_path):
    corpus = Corpus(write(tmp_path, train=b"a b\n", valid=b"a c\n", test=b"d\n"))
    assert corpus.dictionary.idx2word == ["a", "b", "<eos>", "c", "d"]
    assert unigram_loss(corpus.train, corpus.test, 5) == pytest.approx(-math.log(2 / 8))


def test_a_split_that_is_a_folder_is_named(tmp_path):
    (write(tmp_path, valid=None) / "valid.txt").mkdir()
    with pytest.raises(InputError, match=r"valid\.txt: cannot be read"):
        Corpus(tmp_path)


def test_batchify_lays_columns_side_by_side():
    columns = batchify(torch.arange(26), 4)
    assert columns.tolist() == [[i, i + 6, i + 12, i + 18] for i in range(6)]


def test_get_batch_pairs_each_word_with_the_next():
    source = batchify(torch.arange(26), 4)
    words, targets = get_batch(source, 1, None, seq_len=3)
    assert words.tolist() == source[1:4].tolist()
    assert targets.tolist() == source[2:5].flatten().tolist()
    words, targets = get_batch(source, 3, None, seq_len=9)  # the text ends first
    assert words.tolist() == source[3:5].tolist()
    assert targets.tolist() == source[4:6].flatten().tolist()


@pytest.mark.parametrize("n", [2, 3, 10, 11, 12, 50, 101])
@pytest.mark.parametrize("bsz", [1, 3, 10])
def test_exact_layout_predicts_every_token_once(n, bsz):
    inputs, targets, count = batchify_exact(torch.arange(n), bsz)
    assert count == n - 1
    flat_inputs, flat_targets = inputs.flatten()[:count], targets.flatten()[:count]
    assert sorted(flat_targets.tolist()) == list(range(1, n))
    assert torch.equal(flat_inputs + 1, flat_targets)
    steps = inputs[1:] - inputs[:-1]  # each column is a contiguous piece of the text
    complete = count // bsz
    assert (steps[: max(0, complete - 1)] == 1).all()
    assert inputs.size(0) == math.ceil(count / bsz)


def test_unigram_loss_is_the_add_one_smoothed_frequency_model():
    train, test = torch.tensor([0, 0, 1]), torch.tensor([2, 0, 1, 2])
    # Counts + 1 are 3, 2, 1 of 6; the first token of the test split is not predicted.
    expected = -(math.log(3 / 6) + math.log(2 / 6) + math.log(1 / 6)) / 3
    assert unigram_loss(train, test, 3) == pytest.approx(expected)


def test_sample_corpus_is_english_and_repeatable():
    corpus, again = Corpus("sample"), Corpus("sample")
    assert corpus.digest == again.digest
    assert torch.equal(corpus.train, again.train)
    assert 20_000 < len(corpus.train) < 80_000
    assert 700 < len(corpus.dictionary) < 2500
    assert "Python 3." in corpus.name
    words = set(corpus.dictionary.idx2word)
    assert {"the", "object", "is", "<unk>", "<eos>", "N", "."} <= words
    unknown = corpus.train == corpus.dictionary.word2idx["<unk>"]
    assert unknown.double().mean() < 0.1
    # No sentence of some length is in two splits: the test split would give answers away.
    def sentences(ids):
        text = " ".join(corpus.dictionary.idx2word[i] for i in ids)
        return {s for s in text.split(" <eos> ") if len(s.split()) > 12}

    train, test = sentences(corpus.train), sentences(corpus.test)
    assert len(test) > 50
    assert len(train & test) <= len(test) // 20


def test_python_without_its_documentation(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="lacks the module pydoc_data"):
        Corpus("sample")


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("penn", (929_589, 73_760, 82_430), 10_000),
        ("wikitext-2", (2_088_628, 217_646, 245_569), 33_278),
    ],
)
def test_real_corpora(real_corpus, name, sizes, words):
    corpus = Corpus(real_corpus(name))
    assert tuple(len(getattr(corpus, split)) for split in data.SPLITS) == sizes
    assert len(corpus.dictionary) == words
