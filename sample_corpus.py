"""The sample corpus: English prose from the documentation that ships inside Python itself.

A language model needs text, and a first try should need no network. `pydoc_data.topics` holds
the language reference as plain text; this file keeps its prose, drops its code, and splits it.
The text changes a little from one Python version to the next.
"""

import re
from collections import Counter

MIN_COUNT = 3  # rarer words in the training split become <unk>
TOKEN = re.compile(r"<unk>|[a-z]+(?:'[a-z]+)?|\d+(?:\.\d+)*|[.,;:?!()]")
PROSE = re.compile(r"[A-Z(\"].*[a-z]{2}.*[.:]$")  # starts as a sentence does, ends as one does
NOT_PROSE = re.compile(r"::=|>>>|==|--|\|| = .* = |   ")  # grammar, sessions, tables, code


def paragraphs():
    """The distinct paragraphs of prose in the language reference, in order of topic."""
    from data import InputError

    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            "--data sample: this Python lacks the module pydoc_data; install the full standard "
            "library, or name a folder with train.txt, valid.txt and test.txt"
        ) from None
    seen = {}  # topics repeat one another: a paragraph in two splits would give the answers away
    for _, text in sorted(topics.items()):
        for block in re.split(r"\n\s*\n", text):
            block = re.sub(r"^[*\s]+|\n\s*", " ", block).strip()
            if PROSE.match(block) and not NOT_PROSE.search(block):
                seen.setdefault(block)
    return list(seen)


def tokenize(paragraph):
    """Lower-case words, numbers as N, and punctuation; one list of tokens a sentence."""
    for sentence in re.split(r"(?<=[.:?!])\s+(?=[A-Z\"(])", paragraph):
        tokens = ["N" if t[0].isdigit() else t for t in TOKEN.findall(sentence.lower())]
        if len(tokens) > 2:
            yield tokens


def build():
    """Returns {"train": lines, "valid": lines, "test": lines}, each line UTF-8 bytes.

    Of every ten paragraphs eight go to training, one to validation, one to test.
    """
    splits = {"train": [], "valid": [], "test": []}
    for number, paragraph in enumerate(paragraphs()):
        split = {8: "valid", 9: "test"}.get(number % 10, "train")
        splits[split] += tokenize(paragraph)
    counts = Counter(token for sentence in splits["train"] for token in sentence)
    return {
        split: [
            (" ".join(t if counts[t] >= MIN_COUNT else "<unk>" for t in sentence) + "\n").encode()
            for sentence in sentences
        ]
        for split, sentences in splits.items()
    }
