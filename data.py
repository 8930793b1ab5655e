"""Text files to token ids, and the [time, batch] layouts of training and evaluation."""

import codecs
import gzip
import hashlib
import os
import platform
import re
import sys
import zlib
from array import array
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch

EOS, UNK = "<eos>", "<unk>"
UNKNOWN_TOKENS = (UNK, "<UNK>", "unk", "UNK")  # the first found is used
SPLITS = ("train", "valid", "test")
LEVELS = {"word": "word", "char": "character"}  # what a token is called
CACHE_ABOVE = 20_000_000  # bytes of text, which take about two seconds to read
CACHE_FORMAT = 1


class InputError(ValueError):
    """Unusable input from the user. The one-line message says what is wrong and what to do."""


class Dictionary:
    """A vocabulary: `word2idx` (dict) and `idx2word` (list), ids in order of first occurrence.

    `level` is "word", or "char" if the tokens are single characters (and <eos>). `unk` is the token
    that stands for unknown words, by default the first of UNKNOWN_TOKENS in the vocabulary, None if
    it has none of them. Raises InputError for an `unk` that is not in the vocabulary.
    """

    def __init__(self, words=(), level="word", unk=None):
        self.level = level
        self.idx2word = list(words)
        self.word2idx = {word: idx for idx, word in enumerate(self.idx2word)}
        if unk is not None and unk not in self.word2idx:
            raise InputError(f"--unk {unk}: not in the model's vocabulary; name one of its tokens")
        known = (token for token in UNKNOWN_TOKENS if token in self.word2idx)
        self.unk = next(known, None) if unk is None else unk

    def __len__(self):
        return len(self.idx2word)

    def split(self, line):
        """The tokens of a line of text, without <eos>."""
        return list(line.rstrip("\r\n")) if self.level == "char" else line.split()

    def join(self, tokens):
        """The text of tokens of one line."""
        return ("" if self.level == "char" else " ").join(tokens)


class Corpus:
    """A corpus in three splits.

    `path` is a folder with train.txt, valid.txt and test.txt (UTF-8, tokens separated by white
    space, each line ends in an implied <eos>), or "sample" for a corpus built from Python's own
    documentation. `dictionary` covers all three splits, as in published results; `train`, `valid`,
    `test` are int32 id vectors; `digest` is the SHA-256 of the text; `explicit_eos` is the number
    of lines that end in an explicit <eos>. With the level "char" the tokens are the characters of a
    line, including spaces.

    With `cache`, the ids of a text of more than CACHE_ABOVE bytes are written to ids.LEVEL.npz in
    the folder, if possible, and read from there for as long as the text has the same digest.

    Raises InputError, naming the file, if a split is missing, empty, binary or not UTF-8.
    """

    def __init__(self, path, level="word", cache=True):
        self.dictionary = Dictionary(level=level)
        self.name = str(path)
        self.explicit_eos = 0
        self._hash = hashlib.sha256()
        cached = None
        if self.name == "sample":
            self.name = f"sample (documentation of Python {platform.python_version()})"
            for split, lines in build_sample().items():
                setattr(self, split, self._add_split(lines, f"sample {split}"))
        else:
            files = [Path(path) / f"{split}.txt" for split in SPLITS]
            if cache and is_large(files):
                cached = Path(path) / f"ids.{level}.npz"
            if cached and self._read_cache(cached, digest_of(files)):
                return
            for split, file in zip(SPLITS, files):
                setattr(self, split, self.tokenize(file))
        self.dictionary = Dictionary(self.dictionary.idx2word, level)  # finds its `unk`
        self.digest = self._hash.hexdigest()
        if cached:
            self._write_cache(cached)

    def _read_cache(self, path, digest):
        """Reads what `_write_cache` wrote for a text with that digest; returns whether it could.

        Executes no code from the file. An old, foreign or damaged one is ignored.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["key"]) != f"{CACHE_FORMAT} {digest}":
                    return False
                words = file["words"].tobytes().decode().split("\n")
                ids = [torch.from_numpy(file[split]) for split in SPLITS]
                explicit_eos = int(file["explicit_eos"])
        except Exception:  # numpy raises many types of error for a damaged file
            return False
        self.dictionary, self.digest = Dictionary(words, self.dictionary.level), digest
        self.train, self.valid, self.test = ids
        self.explicit_eos = explicit_eos
        return True

    def _write_cache(self, path):
        """Writes the ids and the words to `path` atomically, if the folder can be written to."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        words = np.frombuffer("\n".join(self.dictionary.idx2word).encode(), np.uint8)
        arrays = {split: getattr(self, split).numpy() for split in SPLITS}
        arrays |= {"words": words, "explicit_eos": self.explicit_eos}
        with suppress(OSError):  # a full disk, too, is no reason not to train
            try:
                with open(temporary, "wb") as file:
                    np.savez(file, key=f"{CACHE_FORMAT} {self.digest}", **arrays)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def tokenize(self, path):
        """Reads one text file, adding its words to the dictionary; returns its ids, [N] int32."""
        try:
            with open(path, "rb") as lines:
                return self._add_split(lines, path)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{path}: no such file; --data takes a folder with train.txt, valid.txt and "
                "test.txt (./getdata.sh downloads some), or 'sample'"
            ) from None

    def _add_split(self, lines, name):
        word2idx = self.dictionary.word2idx
        id_of = word2idx.setdefault  # one look-up per token: a new word gets the next id
        self._hash.update(b"\0split\0")  # moving text between splits must change the digest
        ids, blank = array("i"), True
        for number, line in enumerate(lines, 1):
            self._hash.update(line)
            try:
                words = self.dictionary.split(decode_line(line, number))
            except InputError as error:
                raise InputError(f"{name}: line {number}: {error}") from None
            ids.extend([id_of(word, len(word2idx)) for word in words])
            ids.append(id_of(EOS, len(word2idx)))
            blank = blank and not words
            self.explicit_eos += words[-1:] == [EOS]
        self.dictionary.idx2word.extend(islice(word2idx, len(self.dictionary), None))
        if blank:
            raise InputError(f"{name}: holds no words")
        return torch.frombuffer(ids, dtype=torch.int32)

    def use_vocabulary(self, dictionary):
        """Encodes the text with another vocabulary; unknown words become its `unk`.

        Returns a Counter of the unknown words in the three splits. Raises InputError, naming some,
        if the vocabulary has no token for them.
        """
        words, known = self.dictionary.idx2word, dictionary.word2idx
        counts = sum(torch.bincount(getattr(self, s), minlength=len(words)) for s in SPLITS)
        unknown = Counter({w: n for w, n in zip(words, counts.tolist()) if w not in known})
        if unknown and dictionary.unk is None:
            raise InputError(
                f"{self.name}: holds tokens outside the model's vocabulary, which has no {UNK}: "
                f"{list_most_common(unknown)}; replace them, or name its token for unknown words "
                "(--unk)"
            )
        ids = [known.get(word, known.get(dictionary.unk)) for word in words]
        ids = torch.tensor(ids, dtype=self.train.dtype)
        for split in SPLITS:
            setattr(self, split, ids.index_select(0, getattr(self, split)))
        self.dictionary = dictionary
        return unknown


def is_large(files):
    """Whether the files are there, and too long to read their text at each start."""
    all_exist = all(file.is_file() for file in files)
    return all_exist and sum(file.stat().st_size for file in files) > CACHE_ABOVE


def digest_of(files):
    """The `digest` of the corpus in these files, without reading their words."""
    sha256 = hashlib.sha256()
    for path in files:
        sha256.update(b"\0split\0")
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: sha256)
    return sha256.hexdigest()


@contextmanager
def open_lines(path):
    """Opens a file, which gzip may have compressed, for reading as bytes; "-" is standard input.

    Raises InputError if the compressed file is damaged.
    """
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        compressed = file.peek(2)[:2] == b"\x1f\x8b"
        with gzip.open(file) if compressed else nullcontext(file) as lines:
            try:
                yield lines
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(f"{path}: {error}") from None


def decode_line(line, number):
    """Decodes a line of UTF-8, the first without its byte order mark. Raises InputError."""
    if line.startswith(b"\x1f\x8b"):
        raise InputError("compressed by gzip; unpack the file")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise InputError("not UTF-8; convert it") from None
    if "\0" in text:
        raise InputError("holds a NUL byte; is this a text file?")
    return text


def encode(words, dictionary):
    """Returns (ids of `words`, Counter of the words outside the vocabulary, read as its `unk`).

    Raises InputError, naming some of them, if it has no such token.
    """
    ids = dictionary.word2idx
    unknown = Counter(word for word in words if word not in ids)
    if unknown and dictionary.unk not in ids:
        raise InputError(
            f"the model's vocabulary has no {UNK}, and lacks {list_most_common(unknown)}; leave "
            "them out, or name the token for unknown words (--unk)"
        )
    return [ids[dictionary.unk if word in unknown else word] for word in words], unknown


def count_words(ids, dictionary):
    """The number of words, including <eos>, in the text whose characters are `ids` [N]."""
    is_space = torch.tensor([token.isspace() for token in dictionary.idx2word])[ids.long()]
    is_end = ids == dictionary.word2idx[EOS]
    is_letter = ~(is_space | is_end)
    starts = is_letter & ~torch.cat([torch.tensor([False]), is_letter[:-1]])
    return (starts.sum() + is_end.sum()).item()


def read_vectors(path, words, size):
    """{word: its vector [size]} of those `words` that a file of word vectors holds.

    The file is in word2vec's text format (the first line is the number of vectors and their width,
    each other line a word and its numbers) or in GloVe's, without a first line; gzip too. If
    a word occurs twice, its first vector is used. Raises InputError, naming the file and the line.
    """
    wanted, vectors = {word.encode(): word for word in words}, {}
    count, number = None, 0
    try:
        with open_lines(path) as lines:
            for number, line in enumerate(lines, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                    first, *numbers = line.split() or [b""]
                    is_header = len(numbers) == 1
                    width = int(numbers[0]) if is_header else len(list(map(float, numbers)))
                    if width not in (0, size):
                        raise InputError(
                            f"--emsize {size}: the vectors in {path} have {width} numbers; give "
                            f"--emsize {width}, or other vectors"
                        )
                    if is_header:
                        count = int(first)
                        continue
                word, *values = line.rsplit(maxsplit=size) or [b""]  # GloVe has words with spaces
                if len(values) != size:
                    raise ValueError
                if word in wanted:
                    vector = torch.tensor([float(value) for value in values])
                    if not vector.isfinite().all():
                        raise ValueError
                    vectors[wanted.pop(word)] = vector
    except InputError:
        raise
    except ValueError:
        raise InputError(f"{path}: line {number} is not a word and {size} numbers") from None
    if count not in (None, number - 1):
        raise InputError(f"{path}: line 1 announces {count:,} vectors; there are {number - 1:,}")
    return vectors


def list_most_common(words):
    """The five most common words of a Counter, quoted, for a message."""
    quoted = ", ".join(repr(word) for word, _ in words.most_common(5))
    return f"{quoted} and {len(words) - 5} others" if len(words) > 5 else quoted


def unigram_frequencies(train, ntoken):
    """The frequencies [ntoken] of the words in `train`, add-one smoothed, in float64."""
    counts = torch.bincount(train, minlength=ntoken).double() + 1
    return counts / counts.sum()


def unigram_loss(train, test, ntoken):
    """Mean negative log-likelihood (nats) of `test`[1:] under the word frequencies of `train`.

    Add-one smoothed. This is the score of a model that ignores all context.
    """
    return -unigram_frequencies(train, ntoken).log()[test[1:].long()].mean().item()


def batchify(data, bsz, args=None):
    """Arranges a stream of ids [N] in `bsz` columns that are read in parallel: [N // bsz, bsz].

    Each column is a contiguous piece of the text; the remainder that does not fill a row is
    trimmed. With the alphabet as data and bsz 4:

        a g m s
        b h n t
        c i o u
        d j p v        (y and z are trimmed)
        e k q w
        f l r x

    The result is moved to `args.device`, if set.
    """
    rows = data.size(0) // bsz
    columns = data[: rows * bsz].view(bsz, rows).t().contiguous()
    return columns.to(getattr(args, "device", None) or data.device)


def get_batch(source, i, args, seq_len=None, evaluation=False):
    """Rows i to i + seq_len (default `args.bptt`) of `source` [T, B], and the words that follow.

    Returns `(data [L, B], targets [L*B])`, int64; L is smaller at the end of the source.
    `evaluation` is accepted for compatibility with the reference, and has no effect.
    """
    seq_len = min(seq_len or args.bptt, len(source) - 1 - i)
    window = source[i : i + seq_len + 1].long()
    return window[:-1], window[1:].reshape(-1)


def exact_windows(ids, batch_size, bptt, columns):
    """Yields windows that predict each of the `ids` [N] but the first exactly once.

    The ids are arranged in `batch_size` columns, of which the slice `columns` is read. Columns are
    contiguous pieces of the text that overlap by one token: the last target of a column is the
    first input of the next. A window is (inputs [L, B], targets [L, B], count), int64, L <= bptt.
    Only the last row can be incomplete: the flattened targets after the first `count` are padding.
    In four columns, the targets of the text a b c d e f g h i j k are

        b e h j
        c f i k
        d g . .
    """
    predictions = len(ids) - 1
    rows, rest = divmod(predictions, batch_size)  # the first `rest` columns have one more
    column = torch.arange(batch_size)[columns]
    starts = column * rows + column.clamp(max=rest)
    index = (starts + torch.arange(rows + (rest > 0)).unsqueeze(1)).clamp(max=predictions - 1)
    inputs, targets, width = ids[index], ids[index + 1], len(column)
    total = rows * width + min(max(rest - columns.start, 0), width)  # predictions in these columns
    for i in range(0, len(inputs), bptt):
        window = inputs[i : i + bptt].long()
        yield window, targets[i : i + bptt].long(), max(0, min(window.numel(), total - i * width))


# ------------------------------------------------------------ the sample corpus

# The sample needs no network: `pydoc_data.topics`, a part of Python, holds the language reference
# as plain text. The sample keeps its prose and drops its code. The text differs slightly between
# Python versions.
SAMPLE_MIN_COUNT = 3  # rarer words in the training split become <unk>
TOKEN = re.compile(r"<unk>|[a-z]+(?:'[a-z]+)?|\d+(?:\.\d+)*|[.,;:?!()]")
PROSE = re.compile(r"[A-Z(\"].*[a-z]{2}.*[.:]$")  # starts and ends like a sentence
NOT_PROSE = re.compile(r"::=|>>>|==|--|\|| = .* = |   ")  # grammar, sessions, tables, code


def sample_paragraphs():
    """The distinct paragraphs of prose in the language reference, in order of topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError("--data sample: this Python lacks pydoc_data; use another") from None
    seen = {}  # topics share paragraphs, which must not leak from the training split to the others
    for _, text in sorted(topics.items()):
        for block in re.split(r"\n\s*\n", text):
            block = re.sub(r"^[*\s]+|\n\s*", " ", block).strip()
            if PROSE.match(block) and not NOT_PROSE.search(block):
                seen[block] = None
    return list(seen)


def tokenize_sample(paragraph):
    """Yields a list of tokens per sentence: lower-case words, N for numbers, and punctuation."""
    for sentence in re.split(r"(?<=[.:?!])\s+(?=[A-Z\"(])", paragraph):
        tokens = ["N" if t[0].isdigit() else t for t in TOKEN.findall(sentence.lower())]
        if len(tokens) > 2:
            yield tokens


def build_sample():
    """Returns {"train": lines, "valid": lines, "test": lines}, each line UTF-8 bytes.

    Eight of every ten paragraphs are for training, one is for validation, one for test.
    """
    splits = {split: [] for split in SPLITS}
    for number, paragraph in enumerate(sample_paragraphs()):
        split = {8: "valid", 9: "test"}.get(number % 10, "train")
        splits[split] += tokenize_sample(paragraph)
    counts = Counter(token for sentence in splits["train"] for token in sentence)
    return {
        split: [
            " ".join(t if counts[t] >= SAMPLE_MIN_COUNT else UNK for t in sentence).encode() + b"\n"
            for sentence in sentences
        ]
        for split, sentences in splits.items()
    }
