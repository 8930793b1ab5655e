"""How long main.py takes to start on a text of WikiText-103's size, first and again.

    PYTHONPATH=. python records/big/start.py

The text is random (Zipf's law): 103 million tokens, of 267,735 words. Times are from the start of
the process to the line that names the corpus, and to the first step of a small model.
"""

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from read import write_corpus

FLAGS = "--emsize 8 --nhid 8 --nlayers 1 --batch_size 60 --log-interval 1 --save m.pt".split()


def start(folder, *flags):
    """Starts a run, prints when it says what, and ends it after its first step."""
    begin = time.perf_counter()
    command = [sys.executable, "-u", Path("main.py").resolve(), "--data", ".", *FLAGS, *flags]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith(("Corpus", "| epoch")):
                print(f"{time.perf_counter() - begin:6.2f} s: {line.strip()}", flush=True)
            if line.startswith("| epoch"):
                run.kill()
                break
    for file in Path(folder).glob("m.pt*"):
        file.unlink()


def main():
    with TemporaryDirectory() as folder:
        write_corpus(folder, 103_000_000)
        train = Path(folder, "train.txt")
        print(f"train.txt: {train.stat().st_size:,} bytes")
        for what, flags in (("first start", []), ("again", []), ("again", []),
                            ("with --no-cache", ["--no-cache"])):
            print(f"# {what}")
            start(folder, *flags)
        with open(train, "r+b") as file:
            file.write(b"1")  # in place of the first word, 0
        for what in ("after an edit of one byte", "again"):
            print(f"# {what}")
            start(folder)
        print(*(f"{f.name} {f.stat().st_size:,} bytes" for f in sorted(Path(folder).iterdir())))


if __name__ == "__main__":
    main()
