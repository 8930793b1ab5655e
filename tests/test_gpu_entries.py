"""records/gpu/run.sh: rehearsals of each entry on a CPU, with tiny models; its command line."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT

GPU = ROOT / "records" / "gpu"
ENTRIES = ("check", "ptb-fast", "wt2-fast", "gru-fast", "ptb", "ptb-80", "wt2-short", "models")

pytestmark = pytest.mark.skipif(not shutil.which("timeout"), reason="run.sh needs GNU timeout")


def command(*argv, script=GPU / "run.sh"):
    return ["bash", str(script), *map(str, argv)]


def environment(tmp_path):
    """The environment of a rehearsal, with its temporary folder in `tmp_path`."""
    (tmp_path / "tmp").mkdir()
    return os.environ | {
        "REHEARSE": "1", "PYTHON": sys.executable, "TMPDIR": str(tmp_path / "tmp"),
    }


def rehearse(entry, tmp_path):
    """Runs an entry; returns its log and its table."""
    done = subprocess.run(
        command(entry, tmp_path / "out"), env=environment(tmp_path), cwd=tmp_path,
        capture_output=True, text=True, timeout=560,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) < 1e6
    assert list((tmp_path / "tmp").glob("tmp.*")) == []
    log, table = ((tmp_path / "out" / name).read_text() for name in ("log.txt", "table.md"))
    assert done.stdout.endswith(table)
    assert str(tmp_path) not in log and str(ROOT) not in log
    check_header(log, entry)
    return log, table


def check_header(log, entry):
    assert re.match(
        rf"# command:  REHEARSE=1 records/gpu/run.sh {entry} FOLDER\n# date: +\d.*\n"
        r"# commit: +\S+\n# machine: +no GPU; .*\n# versions: Python .*, torch .*, cuDNN .*\n",
        log,
    )


def rows(table):
    """{first cell: other cells} of the first table."""
    lines = table.partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: row for name, *row in cells[2:]}


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["ptb-fast", "wt2-fast", "gru-fast", "ptb", "ptb-80", "wt2-short"])
def test_a_model_is_trained_tested_and_evaluated(entry, tmp_path):
    log, table = rehearse(entry, tmp_path)
    assert "| End of training | test loss" in log.partition("pointer.py")[0]
    epochs, _, *ppls, tokens, alone, dynamic, both = rows(table)[entry]
    assert int(epochs) >= 1
    assert len(ppls) == 4
    assert all(1 < float(ppl) < 2000 for ppl in (*ppls, alone, dynamic, both))
    read, whole = (int(number.replace(",", "")) for number in tokens.split(" of "))
    assert 0 < read <= whole
    assert f"| {tokens} tokens\n" in log
    assert "| valid ppl after epoch | " + entry + " | the report's LSTM |" in table
    first = "692.58" if entry.startswith("wt2") else "326.98"
    assert re.search(rf"^\| 1 \| [\d.]+ \| {first} \|$", table, re.M)
    assert len((tmp_path / "out" / f"{entry}.jsonl").read_text().splitlines()) == int(epochs)


@pytest.mark.slow
def test_models_share_the_time(tmp_path):
    _, table = rehearse("models", tmp_path)
    found = rows(table)
    assert list(found) == ["lstm", "gru", "bilm", "attention"]
    for epochs, _, *ppls in found.values():
        assert epochs == "1"
        assert all(1 < float(ppl) < 2000 for ppl in ppls[:4])


@pytest.mark.slow
def test_check_lists_benchmarks_and_what_was_skipped(tmp_path):
    log, table = rehearse("check", tmp_path)
    assert "| LSTM | ptb | 20 | fp32 |" in table and "step: ms " in table
    benchmarks = len(re.findall(r"^\| (?:LSTM|GRU) \| (?:ptb|wt2) \|", table, re.M))
    assert log.count("bench.py --recipe ") == table.count("skipped, ") + benchmarks + 1
    assert re.match(r"\d+ passed", table)


@pytest.mark.slow
def test_the_log_survives_a_kill(tmp_path):
    log = tmp_path / "out" / "log.txt"
    process = subprocess.Popen(
        command("ptb", tmp_path / "out"), env=environment(tmp_path), stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not (log.exists() and "| end of epoch   1 " in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    check_header(log.read_text(), "ptb")
    done = subprocess.run(
        [sys.executable, str(GPU / "table.py"), str(log)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    epochs, _, best, test, *_ = rows(done.stdout)["ptb"]
    assert int(epochs) >= 1
    assert float(best) > 1
    assert test == ""


@pytest.fixture
def elsewhere(tmp_path):
    """A copy of run.sh in a checkout that has no data, and the log of one entry."""
    folder = tmp_path / "checkout" / "records" / "gpu"
    (folder / "ptb").mkdir(parents=True)
    (folder / "ptb" / "log.txt").write_text("# date: then\n# commit:   abc1234\n")
    return shutil.copy(GPU / "run.sh", folder)


def test_the_list_names_each_entry_and_the_commit_of_its_log(elsewhere):
    done = subprocess.run(command("list", script=elsewhere), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert tuple(lines) == ENTRIES
    assert all("one GPU, 10 minutes" in line for line in lines.values())
    assert "data/penn; log of commit abc1234" in lines["ptb"]
    assert "data/wikitext-2; no log" in lines["wt2-short"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "usage: "), (["ptb"], "usage: "), (["list", "out"], "usage: "),
        (["nonsense", "out"], "usage: "), (["ptb", "out", "more"], "usage: "),
        (["ptb-80", "out"], "data/penn is missing; "),
        (["wt2-short", "out"], "data/wikitext-2 is missing; "),
    ],
)
def test_wrong_use(argv, message, elsewhere, tmp_path):
    given = {name: value for name, value in os.environ.items() if name != "REHEARSE"}
    done = subprocess.run(
        command(*argv, script=elsewhere), capture_output=True, text=True, cwd=tmp_path, env=given
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"run.sh: error: {message}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
