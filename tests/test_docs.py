"""The documentation: --help, links, flags of printed commands, examples.

And faults.py, which no other test runs: each fault is still in the code.

`python tests/test_docs.py` writes docs/flags.md again.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest

from faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "flags.md"
MARK = "<!-- From here on: made by `python tests/test_docs.py`. -->\n"
COMMANDS = ("main", "finetune", "pointer", "generate", "evaluate", "bench")


def help_of(command):
    """What `python COMMAND.py --help` prints, 100 columns wide, without the usage."""
    output = StringIO()
    with (
        patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"),
        patch.object(sys, "argv", [f"{command}.py", "--help"]),
        redirect_stdout(output),
        suppress(SystemExit),
    ):
        importlib.import_module(command).main()
    return output.getvalue().partition("\n\n")[2]


def written_again():
    """docs/flags.md: its introduction as it is, the flags of each command as --help prints them."""
    introduction = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    sections = [f"\n## {name}.py\n\n```text\n{help_of(name)}```\n" for name in COMMANDS]
    return introduction + MARK + "".join(sections)


def test_the_page_of_flags_is_what_help_prints():
    assert PAGE.read_text(encoding="utf-8") == written_again(), "run: python tests/test_docs.py"


@pytest.mark.parametrize("page", ["README.md", "docs", "records"])
def test_links_lead_to_files(page):
    path = ROOT / page
    for file in sorted(path.rglob("*.md")) if path.is_dir() else [path]:
        text = re.sub(r"```.*?```|`[^`]*`", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in link:
                continue
            target, _, anchor = link.partition("#")
            other = file.parent / target if target else file
            assert other.exists(), f"{file.relative_to(ROOT)}: {link}"
            assert not anchor or anchor in anchors(other), f"{file.relative_to(ROOT)}: {link}"


def anchors(page):
    """Those of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"(?m)^#+ (.*)", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_printed_commands_have_flags_that_exist():
    found = []
    for page in [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"(?m)^(?:\t| {4}).*?python (?:-u )?(\w+)\.py ([^$\n]*)$", text)
    assert len(found) > 30
    for command, argv in found:
        parse(command, shlex.split(argv, comments=True))


def parse(command, argv):
    """Exits if the command has no such flags. finetune.parse_args would read the checkpoint."""
    module = importlib.import_module(command)
    if command == "main":
        return module.make_main_parser().parse_args(argv)
    if command == "finetune":
        return module.make_parser("").parse_args(argv)
    return module.parse_args(argv)


def run_python(argv, folder):
    """Runs Python in a folder, where the scripts can be imported; returns what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_examples(page):
    """The Python of a page: fenced blocks, and indented ones that import something."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    indented = re.findall(r"(?:^    .*\n|^\n)+", text, flags=re.MULTILINE)
    return fenced + [textwrap.dedent(block) for block in indented if "    from " in block]


@pytest.mark.parametrize(
    ("page", "model", "examples"),
    [("README.md", "LSTM", 1), *(("docs/using.md", model, 2) for model in ("LSTM", "GRU", "QRNN"))],
)
def test_the_examples_run_as_printed(page, model, examples, tmp_path):
    flags = f"--data sample --model {model} --emsize 16 --nhid 24 --batch_size 40 --epochs 1"
    run_python([ROOT / "main.py", *flags.split(), "--save", "sample.pt"], tmp_path)
    found = python_examples(page)
    assert len(found) == examples
    for example in found:
        assert "nan" not in run_python(["-c", example], tmp_path)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_in_the_code(name):
    fault = FAULTS[name]
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    file, test = fault.test.split("::")
    assert f"def {test.partition('[')[0]}(" in (ROOT / "tests" / file).read_text()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(written_again(), encoding="utf-8")
