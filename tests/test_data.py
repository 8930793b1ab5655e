"""Corpora, vocabularies and layouts."""

import errno
import gzip
import hashlib
import math
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import data
from conftest import succeed
from data import (
    SPLITS, Corpus, Dictionary, InputError, batchify, count_words, exact_windows, get_batch,
    read_vectors, unigram_loss,
)
from properties import repeated


def write(folder, train=b"a b\nb c\n", valid=b"c d\n", test=b"a e\n"):
    for split, content in zip(SPLITS, (train, valid, test)):
        (folder / f"{split}.txt").write_bytes(content)
    return folder


def test_ids_in_order_of_first_occurrence(tmp_path):
    corpus = Corpus(write(tmp_path))
    assert corpus.dictionary.idx2word == ["a", "b", "<eos>", "c", "d", "e"]
    assert corpus.dictionary.word2idx == {w: i for i, w in enumerate(corpus.dictionary.idx2word)}
    found = [getattr(corpus, split).tolist() for split in SPLITS]
    assert found == [[0, 1, 2, 1, 3, 2], [3, 4, 2], [0, 5, 2]]
    assert corpus.train.dtype == torch.int32
    text = b"".join(b"\0split\0" + (tmp_path / f"{split}.txt").read_bytes() for split in SPLITS)
    assert corpus.digest == hashlib.sha256(text).hexdigest()
    edited = Corpus(write(tmp_path, train=b"z\n"))
    assert (edited.dictionary.idx2word[0], edited.digest == corpus.digest) == ("z", False)
    assert len(list(tmp_path.iterdir())) == 3  # a short text is not cached


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"valid\.txt: no such file; --data takes a folder"),
        (b"", r"valid\.txt: holds no words"),
        (b"\n\n \n", r"valid\.txt: holds no words"),
        (b"fine\ncaf\xe9\n", r"valid\.txt: line 2: not UTF-8"),
        (b"fine\na\0b\n", r"valid\.txt: line 2: holds a NUL byte"),
    ],
)
def test_unusable_splits_are_named(tmp_path, content, message):
    path = write(tmp_path) / "valid.txt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        Corpus(tmp_path)


@repeated
@given(
    st.binary(max_size=60)
    | st.text(st.sampled_from("ab \t\r\n\0\ufeff\u3000é"), max_size=40).map(str.encode)
)
def test_any_bytes_are_read_as_defined_or_refused_by_name(tmp_path, content):
    write(tmp_path, valid=content)
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
        usable = "\0" not in text and text.strip() != ""
    except UnicodeDecodeError:
        usable = False
    if not usable:
        with pytest.raises(InputError, match=r"valid\.txt: "):
            Corpus(tmp_path)
        return
    expected = [words for line in text.split("\n") for words in (*line.split(), "<eos>")]
    if text.endswith("\n"):
        expected.pop()  # what follows the last line's end is no line
    corpus = Corpus(tmp_path)
    assert [corpus.dictionary.idx2word[i] for i in corpus.valid] == expected


# ------------------------------------------------------------ the cache of ids


def contents(corpus):
    """All that a corpus holds."""
    ids = [getattr(corpus, split) for split in SPLITS]
    types = [split.dtype for split in ids]
    rest = corpus.explicit_eos, corpus.digest, types
    return vars(corpus.dictionary), *rest, [split.tolist() for split in ids]


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A folder with a short text that is cached, as if it were long."""
    monkeypatch.setattr(data, "CACHE_ABOVE", 0)
    folder = tmp_path / "cached"
    folder.mkdir()
    assert contents(Corpus(write(folder, b"a \xc3\xa9\n<unk> c\n"))) == contents(Corpus(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "ids.word.npz", "test.txt", "train.txt", "valid.txt"
    ]
    return folder


def test_the_second_start_reads_no_words(cached, monkeypatch):
    expected = contents(Corpus(cached, cache=False))
    monkeypatch.setattr(Corpus, "tokenize", None)
    assert contents(Corpus(cached)) == expected


@pytest.mark.parametrize("split", SPLITS)
def test_a_changed_byte_makes_a_new_cache(cached, split, monkeypatch):
    path = cached / f"{split}.txt"
    path.write_bytes(b"z" + path.read_bytes()[1:])
    expected = contents(Corpus(cached, cache=False))
    assert contents(Corpus(cached)) == expected
    monkeypatch.setattr(Corpus, "tokenize", None)
    assert contents(Corpus(cached)) == expected


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: b"my own file\n", lambda content: content[:-50],
    lambda content: content[: len(content) // 2], lambda content: pickle.dumps([1, 2]),
    lambda content: content.replace(b"words.npy", b"wordz.npy"),
    lambda content: content.replace(b"test.npy", b"last.npy"),
])
def test_a_damaged_or_foreign_cache_is_replaced(cached, damage):
    path = cached / "ids.word.npz"
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert path.read_bytes() != good
    assert contents(Corpus(cached)) == contents(Corpus(cached, cache=False))
    with np.load(path) as file:
        assert len(file["test"]) == 3


def test_a_cache_of_an_older_format_is_ignored(cached):
    key = f"0 {Corpus(cached).digest}"
    words = np.frombuffer(b"a", np.uint8)
    ids = dict.fromkeys(SPLITS, np.array([0], np.int32))
    np.savez(cached / "ids.word.npz", key=key, words=words, explicit_eos=0, **ids)
    assert contents(Corpus(cached)) == contents(Corpus(cached, cache=False))


def test_no_flipped_bit_of_a_cache_changes_the_corpus(cached):
    expected = contents(Corpus(cached, cache=False))
    path = cached / "ids.word.npz"
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert contents(Corpus(cached)) == expected


def test_no_code_of_a_cache_is_executed(cached, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    attack = np.array([Attack()], dtype=object)
    np.savez(cached / "ids.word.npz", **dict.fromkeys(("key", "words", *SPLITS), attack))
    assert contents(Corpus(cached)) == contents(Corpus(cached, cache=False))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_cache_is_written_completely_or_not_at_all(cached, error, monkeypatch):
    (cached / "ids.word.npz").unlink()

    def fail(file, **arrays):
        file.write(b"half")
        raise error

    monkeypatch.setattr(np, "savez", fail)
    if isinstance(error, OSError):
        assert contents(Corpus(cached)) == contents(Corpus(cached, cache=False))
    else:
        with pytest.raises(KeyboardInterrupt):
            Corpus(cached)
    assert len(list(cached.iterdir())) == 3


def test_in_a_read_only_folder_the_text_is_read(cached, monkeypatch, capsys):
    (cached / "ids.word.npz").unlink()
    expected = contents(Corpus(cached, cache=False))

    def read_only(path, mode):  # root could write anywhere
        if mode != "rb":
            raise OSError(errno.EROFS, "Read-only file system", path)
        return open(path, mode)

    monkeypatch.setattr(data, "open", read_only, raising=False)
    assert contents(Corpus(cached)) == expected
    assert len(list(cached.iterdir())) == 3
    assert capsys.readouterr() == ("", "")


def test_no_cache_is_a_flag(corpus_dir, small, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE_ABOVE", 0)
    flags = ["--data", corpus_dir, *small, "--epochs", 1, "--save", tmp_path / "m.pt"]
    plain = succeed(*flags, "--no-cache")
    assert not (corpus_dir / "ids.word.npz").exists()
    outputs = [succeed(*flags) for _ in range(2)]  # the second from the cache
    assert (corpus_dir / "ids.word.npz").exists()
    end = plain[plain.index("| End of training"):]
    assert all(end in output for output in outputs)


def test_another_vocabulary(tmp_path):
    corpus = Corpus(write(tmp_path))  # a b <eos> b c <eos>, c d <eos>, a e <eos>
    words = Dictionary(["<eos>", "c", "UNK", "a"])
    assert corpus.use_vocabulary(words) == {"b": 2, "d": 1, "e": 1}
    found = [getattr(corpus, split).tolist() for split in SPLITS]
    assert found == [[3, 2, 0, 2, 1, 0], [1, 2, 0], [3, 2, 0]]
    assert corpus.dictionary is words
    corpus = Corpus(tmp_path)
    assert corpus.use_vocabulary(Dictionary(["e", "d", "c", "<eos>", "b", "a"])) == {}
    assert corpus.valid.tolist() == [2, 1, 3]
    with pytest.raises(InputError, match=f"{tmp_path}: holds tokens .* has no <unk>: 'c', 'd'; "):
        Corpus(tmp_path).use_vocabulary(Dictionary(["<eos>", "a", "b", "e"]))


def test_unigram_loss_is_the_add_one_smoothed_frequency_model():
    train, test = torch.tensor([0, 0, 1]).int(), torch.tensor([2, 0, 1, 2]).int()
    # Counts + 1 are 3, 2, 1 of 6; the first token of the test split is not predicted. The last is
    # unseen in training, a word like any other.
    expected = -(math.log(3 / 6) + math.log(2 / 6) + math.log(1 / 6)) / 3
    assert unigram_loss(train, test, 3) == pytest.approx(expected)


def test_batchify_and_get_batch():
    """Columns lie side by side; each word is paired with the next."""
    source = batchify(torch.arange(26), 4)
    assert source.tolist() == [[i, i + 6, i + 12, i + 18] for i in range(6)]
    for begin, seq_len, end in ((1, 3, 4), (3, 9, 5)):  # in the second the text ends first
        words, targets = get_batch(source.int(), begin, None, seq_len=seq_len)
        assert torch.equal(words, source[begin:end])
        assert torch.equal(targets, source[begin + 1 : end + 1].flatten())


@pytest.mark.parametrize("n", [2, 3, 10, 11, 12, 50, 101])
@pytest.mark.parametrize("columns", [1, 3, 10])
def test_windows_predict_every_word_once(n, columns):
    """Also where two processes read a part of the columns each."""
    found = []
    for part in (slice(0, columns // 2), slice(columns // 2, columns)):
        for inputs, targets, count in exact_windows(torch.arange(n).int(), columns, 4, part):
            assert inputs.dtype == targets.dtype == torch.int64
            found += zip(inputs.flatten()[:count].tolist(), targets.flatten()[:count].tolist())
    assert sorted(found) == [(i, i + 1) for i in range(n - 1)]


def test_the_sample_corpus_is_english_and_repeatable():
    corpus = Corpus("sample")
    assert corpus.digest == Corpus("sample").digest
    assert "Python 3." in corpus.name
    words = corpus.dictionary.idx2word
    assert 20_000 < len(corpus.train) < 80_000
    assert {"the", "object", "is", "<unk>", "<eos>", "N", "."} <= set(words)
    # No long sentence is in two splits: the test split would give answers away.
    train, test = (
        {s for s in " ".join(words[i] for i in ids).split(" <eos> ") if len(s.split()) > 12}
        for ids in (corpus.train, corpus.test)
    )
    assert len(test) > 50
    assert len(train & test) <= len(test) // 20


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("penn", [929_589, 73_760, 82_430], 10_000),
        ("wikitext-2", [2_088_628, 217_646, 245_569], 33_278),
    ],
)
def test_real_corpora(real_corpus, name, sizes, words):
    corpus = Corpus(real_corpus(name))
    assert [len(getattr(corpus, split)) for split in SPLITS] == sizes
    assert len(corpus.dictionary) == words


# ------------------------------------------------------------ characters


def test_characters_are_tokens_and_a_line_ends_in_eos(tmp_path):
    write(tmp_path, "\ufeff a\u00e9\r\n\n".encode(), b"<eos> b", b"a\ta\n")
    corpus = Corpus(tmp_path, "char")
    words = corpus.dictionary.idx2word
    found = [[words[i] for i in getattr(corpus, split)] for split in SPLITS]
    assert found == [
        [" ", "a", "é", "<eos>", "<eos>"],
        [*"<eos>", " ", "b", "<eos>"],
        ["a", "\t", "a", "<eos>"],
    ]
    assert words == [" ", "a", "é", "<eos>", *"<eos>", "b", "\t"]
    assert corpus.dictionary.level == "char"
    assert corpus.digest == Corpus(tmp_path).digest  # the same bytes


@pytest.mark.parametrize(("level", "line", "tokens", "text"), [
    ("word", " the  cat \n", ["the", "cat"], "the cat"),
    ("char", " a b\r\n", [" ", "a", " ", "b"], " a b"),
    ("char", "\n", [], ""),
])
def test_a_dictionary_splits_and_joins(level, line, tokens, text):
    dictionary = Dictionary(level=level)
    assert dictionary.split(line) == tokens
    assert dictionary.join(tokens) == text


@repeated
@given(st.text(st.sampled_from("ab \t\r\nß\u3000\x1c"), min_size=1, max_size=40))
def test_words_are_counted_in_characters(tmp_path, text):
    assume(text.strip("\r\n"))
    write(tmp_path, valid=text.encode())
    words = len(Corpus(tmp_path).valid) if text.strip() else text.count("\n") + (text[-1] != "\n")
    corpus = Corpus(tmp_path, "char")
    assert count_words(corpus.valid, corpus.dictionary) == words


def test_both_levels_are_cached(cached):
    expected = contents(Corpus(cached, "char", cache=False))
    assert [contents(Corpus(cached, "char")) for _ in range(2)] == [expected] * 2
    assert (cached / "ids.char.npz").exists()
    assert contents(Corpus(cached)) != expected


# ------------------------------------------------------------ given vectors

WORDS = {"a": 0, "caf\u00e9": 1, "b": 2, "zebra": 3}
LINES = "a 1 2 3\ncaf\u00e9 -4e-1 .5 6 \nother 0 0 0\na 7 8 9\n. . 0 0 0\n"
FOUND = {"a": [1, 2, 3], "caf\u00e9": [-0.4, 0.5, 6]}


@pytest.mark.parametrize("header", ["5 3\n", ""])
@pytest.mark.parametrize("name", ["vectors.txt", "vectors.vec.gz"])
def test_the_vectors_of_known_words_are_read(name, header, tmp_path):
    """As word2vec and GloVe write them; the first vector of a word counts."""
    opener = gzip.open if name.endswith("gz") else open
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(header + LINES.replace(". .", ".\u00a0."))
    found = read_vectors(tmp_path / name, WORDS, 3)
    assert {word: vector.tolist() for word, vector in found.items()} == {
        word: pytest.approx(vector) for word, vector in FOUND.items()
    }


def test_words_of_vectors_can_hold_spaces_and_follow_a_byte_order_mark(tmp_path):
    (tmp_path / "v").write_bytes(b"\xef\xbb\xbfa 1 2 3\nto x@y.z 4 5 6\nb 7 8 9\n")
    found = read_vectors(tmp_path / "v", ["a", "b", "x@y.z"], 3)
    assert {word: vector.tolist() for word, vector in found.items()} == {
        "a": [1, 2, 3], "b": [7, 8, 9]
    }


@pytest.mark.parametrize(("content", "message"), [
    (b"2 4\na 1 2 3 4\n", "--emsize 3: the vectors in .*v have 4 numbers; give --emsize 4,"),
    (b"a 1 2\nb 1 2\n", "--emsize 3: the vectors in .*v have 2 numbers; give --emsize 2,"),
    (b"a 1 2 3\nb 1 2\n", "/v: line 2 is not a word and 3 numbers"),
    (b"a 1 2 3\nother 1 2\n", "/v: line 2 is not a word and 3 numbers"),
    (b"a 1 2 3 4\n", "--emsize 3: the vectors in .*v have 4 numbers; give --emsize 4,"),
    (b"1 3\na 1 2 x\n", "/v: line 2 is not"),
    (b"1 3\na 1 nan 3\n", "/v: line 2 is not"),
    (b"a 1 2 1e39\n", "/v: line 1 is not"),  # beyond float32
    (b"a 1 2 3\n\n", "/v: line 2 is not"),
    (b"many 3\na 1 2 3\n", "/v: line 1 is not"),
    (b"no vectors at all\n", "/v: line 1 is not"),
    (b"a,1,2,3\n", "/v: line 1 is not"),
    (b"1 3\n\x80\x00\x80?\n", "/v: line 2 is not"),  # word2vec's binary format
    (b"5 3\na 1 2 3\n", "/v: line 1 announces 5 vectors; there are 1"),
])
def test_unusable_vectors_are_refused_by_line(content, message, tmp_path):
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_vectors(tmp_path / "v", WORDS, 3)


def test_vectors_that_gzip_cannot_unpack_are_refused(tmp_path):
    (tmp_path / "v.gz").write_bytes(gzip.compress(b"a 1 2 3\n" * 99)[:-20])
    with pytest.raises(InputError, match=r"/v\.gz: "):
        read_vectors(tmp_path / "v.gz", WORDS, 3)
