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
from cpu_kernels import has_bf16_products

GPU = ROOT / "records" / "gpu"
ENTRIES = (
    "check", "ptb-fast", "wt2-fast", "gru-fast", "ptb", "ptb-80", "qrnn", "char", "models",
)

pytestmark = pytest.mark.skipif(not shutil.which("timeout"), reason="run.sh needs GNU timeout")


def command(*argv, script=GPU / "run.sh"):
    return ["bash", str(script), *map(str, argv)]


def environment(tmp_path):
    """The environment of a rehearsal, with its temporary folder in `tmp_path`."""
    (tmp_path / "tmp").mkdir()
    return os.environ | {
        "REHEARSE": "1", "FLAGS": "--clip 0.3", "PYTHON": sys.executable,
        "TMPDIR": str(tmp_path / "tmp"),
    }


def rehearse(entry, tmp_path):
    """Runs an entry; returns its log and its table."""
    done = subprocess.run(
        command(entry, tmp_path / "out"), env=environment(tmp_path), cwd=tmp_path,
        capture_output=True, text=True, timeout=560,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert list((tmp_path / "tmp").glob("tmp.*")) == []
    log, table = ((tmp_path / "out" / name).read_text() for name in ("log.txt", "table.md"))
    assert done.stdout.endswith(table)
    assert str(tmp_path) not in log and str(ROOT) not in log
    check_header(log, entry)
    return log, table


def check_header(log, entry):
    assert re.match(
        r"# command:  REHEARSE=1 (EPOCHS=2 )?"
        rf'FLAGS="--clip 0.3" records/gpu/run.sh {entry} FOLDER\n'
        r"# date: +\d.*\n# commit: +\S+\n"
        r"# machine: +no GPU; .*\n# versions: Python .*, torch .*, cuDNN .*\n",
        log,
    )


def rows(table):
    """{first cell: other cells} of the first table."""
    lines = table.partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: row for name, *row in cells[2:]}


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES[1:-1])
def test_a_model_is_trained_tested_and_evaluated(entry, tmp_path):
    log, table = rehearse(entry, tmp_path)
    assert "| End of training | test loss" in log.partition("pointer.py")[0]
    assert set(re.findall(r"'clip': ([\d.]+)", log)) == {"0.3"}
    epochs, _, *ppls, tokens, alone, dynamic, both = rows(table)[entry]
    assert len(ppls) == 4
    assert all(1 < float(ppl) < 2000 for ppl in (*ppls, alone, dynamic, both))
    assert f"| {tokens} tokens\n" in log
    assert "| valid ppl after epoch | " + entry + " | the report's LSTM |" in table
    assert len((tmp_path / "out" / f"{entry}.jsonl").read_text().splitlines()) == int(epochs) > 0


@pytest.mark.slow
def test_the_number_of_epochs_can_be_given(tmp_path, monkeypatch):
    monkeypatch.setenv("EPOCHS", "2")
    log, table = rehearse("ptb-fast", tmp_path)
    assert rows(table)["ptb-fast"][0] == "2" and "first.pt" not in log
    assert "REHEARSE=1 EPOCHS=2 FLAGS" in log


@pytest.mark.slow
def test_models_share_the_time(tmp_path):
    _, table = rehearse("models", tmp_path)
    found = rows(table)
    assert list(found) == ["lstm", "gru", "bilm", "attention"]
    for epochs, _, *ppls in found.values():
        assert epochs == "1" and all(1 < float(ppl) < 2000 for ppl in ppls[:4])


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16_products(), reason="this processor only emulates bfloat16")
def test_check_lists_benchmarks_and_what_was_skipped(tmp_path):
    log, table = rehearse("check", tmp_path)
    assert "| LSTM | ptb | 20 | fp32 |" in table and "step: ms " in table
    benchmarks = len(re.findall(r"^\| (?:LSTM|GRU) \| (?:ptb|wt2) \|", table, re.M))
    assert log.count("bench.py --recipe ") == table.count("skipped, as") + benchmarks + 1
    assert re.search(r"^\d+ passed", table, re.M)


@pytest.mark.slow
def test_the_log_survives_a_kill(tmp_path):
    log = tmp_path / "out" / "log.txt"
    process = subprocess.Popen(
        command("ptb", tmp_path / "out"), env=environment(tmp_path), stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (log.exists() and "| end of epoch   1 " in log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    check_header(log.read_text(), "ptb")
    table = subprocess.check_output([sys.executable, GPU / "table.py", log], text=True)
    epochs, _, best, test, *_ = rows(table)["ptb"]
    assert int(epochs) >= 1
    assert best and not test


@pytest.fixture
def elsewhere(tmp_path):
    """A copy of run.sh in a checkout that has no data, and the log of one entry."""
    folder = tmp_path / "checkout" / "records" / "gpu"
    (folder / "ptb").mkdir(parents=True)
    (folder / "ptb" / "log.txt").write_text("# date: then\n# commit:   abc1234\n")
    return shutil.copy(GPU / "run.sh", folder)


def test_the_list_names_each_entry_and_the_commit_of_its_log(elsewhere):
    listed = subprocess.check_output(command("list", script=elsewhere), text=True)
    lines = dict(line.split(": ", 1) for line in listed.splitlines())
    assert tuple(lines) == ENTRIES
    assert "data/penn; log of commit abc1234" in lines["ptb"]
    assert "data/wikitext-2; no log" in lines["wt2-fast"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "usage: "), (["ptb"], "usage: "), (["nonsense", "out"], "usage: "),
        (["ptb-80", "out"], "data/penn is missing; "),
    ],
)
def test_wrong_use(argv, message, elsewhere, tmp_path):
    done = subprocess.run(
        command(*argv, script=elsewhere), capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"run.sh: error: {message}")
    assert not (tmp_path / "out").exists()
