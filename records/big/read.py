"""Time and memory of reading a corpus of N million tokens, the first time and again. For Linux.

    PYTHONPATH=. python records/big/read.py 1 10 100

The texts are random (Zipf's law), with WikiText-103's number of words. Each is read twice, each
time in a new process. `peak_over_ids` is the peak memory that reading added, divided by the size of
the training ids.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from bench import new_process, print_rows, process_peak_mib, zipf
from data import Corpus

WORDS = 267_735


def write_corpus(folder, tokens):
    """Writes a corpus with `tokens` training tokens; every split begins with each word once."""
    for split, lines in {"train": (tokens - WORDS) // 100, "valid": 0, "test": 0}.items():
        with open(Path(folder, f"{split}.txt"), "w") as file:
            print(*range(WORDS - 1), file=file)  # and <eos>
            for _ in range(lines):
                print(*zipf(WORDS, [99]).tolist(), file=file)


def read_corpus(folder):
    """{figure: value} of reading the corpus in this process."""
    before, begin = process_peak_mib(), perf_counter()
    corpus = Corpus(folder)
    elapsed, added = perf_counter() - begin, process_peak_mib() - before
    tokens = len(corpus.train)
    return {
        "tokens": tokens, "words": len(corpus.dictionary), "tokens_per_s": tokens / elapsed,
        "peak_over_ids": added * 2**20 / corpus.train.nbytes,
    }


def main():
    for millions in sys.argv[1:]:
        with TemporaryDirectory() as folder:
            write_corpus(folder, int(float(millions) * 1e6))
            for name in ("corpus", "again"):  # a long text: again from its cache
                with new_process() as process:
                    print_rows({name: process.submit(read_corpus, folder).result()})


if __name__ == "__main__":
    main()
