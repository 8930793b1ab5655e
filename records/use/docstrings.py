"""Writes a small corpus: the prose in docstrings of Python's standard library.

    PYTHONPATH=. python records/use/docstrings.py FOLDER

The sentences are tokenized as the sample corpus is. Of every ten paragraphs the ninth is for
validation, the tenth for test.
"""

import ast
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from data import NOT_PROSE, PROSE, SPLITS, tokenize_sample

MODULES = (
    "datetime difflib email.message inspect logging pathlib subprocess tarfile threading typing "
    "unittest.case unittest.mock zipfile"
).split()


def paragraphs():
    """The distinct paragraphs of prose in the docstrings, in order."""
    seen = {}
    for name in MODULES:
        source = Path(find_spec(name).origin).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for block in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                    block = " ".join(block.split())
                    if PROSE.match(block) and not NOT_PROSE.search(block):
                        seen[block] = None
    return list(seen)


def main(folder):
    splits = {split: [] for split in SPLITS}
    for number, paragraph in enumerate(paragraphs()):
        split = {8: "valid", 9: "test"}.get(number % 10, "train")
        splits[split] += [" ".join(tokens) for tokens in tokenize_sample(paragraph)]
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
