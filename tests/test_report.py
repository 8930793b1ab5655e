"""The report's experiments: their commands, running and interrupting them, results and plots."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main
from conftest import ROOT, invoke
from flags import make_parser
from report import plot, reproduce, results
from report.experiments import EXPERIMENTS, FIGURES, SCALES, command, model_path

pytest.importorskip("matplotlib", reason="requirements-plot.txt is not installed")

OUT = Path("out")


# ------------------------------------------------------------ commands


def test_eleven_experiments_are_the_reports():
    assert len(results.read_report()) == 11
    assert set(results.read_report()) == {n for n, e in EXPERIMENTS.items() if e.parameters}
    assert set().union(*FIGURES.values()) == set(EXPERIMENTS)


PUBLISHED = {
    "ptb-lstm":
        "--batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epoch 500",
    "wt2-lstm": "--epochs 750 --data data/wikitext-2 --dropouth 0.2 --seed 1882",
}


@pytest.mark.parametrize("scale", SCALES)
def test_the_commands_are_those_of_the_experiments(scale):
    for name, experiment in EXPERIMENTS.items():
        script, *argv = command(name, scale, OUT)
        size = SCALES[scale].flags.split()
        if experiment.base:
            assert script == "finetune.py"
            given = vars(make_parser("").parse_args(argv))
            size = SCALES[scale].finetune.split()
        else:
            assert script == "main.py"
            given = vars(main.parse_args(argv)[0])
        for flag, value in zip(size[::2], size[1::2]):
            assert str(given[flag.lstrip("-")]) == value
        if scale == "full" and name in PUBLISHED:
            expected, _ = main.parse_args([*PUBLISHED[name].split(), *argv[-2:]])
            assert given == vars(expected)


def test_a_list_has_each_base_once_and_first():
    status, out, _ = invoke(reproduce.main, "--list", "--only", "wt2-lstm-finetune,ptb-gru-3")
    names = [line.split()[2] for line in out.splitlines() if "python" in line]
    assert (status, names) == (0, ["ptb-gru-3:", "wt2-lstm:", "wt2-lstm-finetune:"])


# ------------------------------------------------------------ running

MICRO = """
import flags
from report import experiments, reproduce
experiments.SCALES["tiny"] = experiments.Scale(
    "micro", "--data {data} --emsize 8 --nhid 12 --nlayers 2 --batch_size 4 --bptt 10 --epochs 2",
    "--epochs 2", {{"ptb": 1, "wt2": 1}},
)
flags.run_command(reproduce.main)
"""


def outcome(out):
    """The losses of both runs, and their tests."""
    runs = results.read_epochs(out)
    return [(name, [e["valid_loss"] for e in runs[name]], results.read_log(out, name))
            for name in ("ptb-lstm", "ptb-lstm-finetune")]


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_result(corpus_dir, tmp_path):
    def begin(out):
        script = MICRO.format(data=corpus_dir)
        argv = "--only", "ptb-lstm-finetune", "--out", out, "--devices", "cpu"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, "-c", script, *argv], cwd=tmp_path, env=env)

    assert begin("whole").wait() == 0
    parts = tmp_path / "parts" / "runs"
    for number, awaited in [
        (signal.SIGTERM, "ptb-lstm/model.pt.state"), (signal.SIGINT, "ptb-lstm-finetune/log.txt"),
        (signal.SIGKILL, "ptb-lstm-finetune/model.pt.base"),
    ]:
        process = begin("parts")
        while process.poll() is None and not (parts / awaited).exists():
            time.sleep(0.02)
        if number == signal.SIGKILL:  # of its run too, as when the machine fails
            subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=True)
        process.send_signal(number)
        assert process.wait() == (-9 if number == signal.SIGKILL else 128 + number)
        assert not results.read_log(parts.parent, "ptb-lstm-finetune")[1]
    assert begin("parts").wait() == 0
    assert outcome(parts.parent) == outcome(tmp_path / "whole")


class Run:
    """A process that ends when it is polled for the third time; that of wt2-lstm with status 2."""

    active, names = [], []

    def __init__(self, name, scale, out, device, threads):
        assert device not in [run.device for run in self.active]
        self.name, self.device, self.polled = name, device, 0
        self.active.append(self)
        self.names.append(name)
        write_run(out, name, 9.0, test=None if name == "wt2-lstm" else 8.0)

    def poll(self):
        self.polled += 1
        if self.polled < 3:
            return None
        self.active.remove(self)
        self.returncode = 2 * (self.name == "wt2-lstm")
        return self.returncode


def test_devices_run_one_experiment_at_a_time_and_bases_first(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "start", Run)
    names = "ptb-lstm-finetune,wt2-lstm-finetune,ptb-bilm"
    argv = "--only", names, "--out", tmp_path / "out", "--devices", "cpu", "cpu:1"
    monkeypatch.setattr(reproduce, "parse_device", str)
    status, out, err = invoke(reproduce.main, *argv)
    assert Run.names[:2] == ["ptb-lstm", "wt2-lstm"]
    assert sorted(Run.names[2:]) == ["ptb-bilm", "ptb-lstm-finetune"]
    assert (status, err.count("\n"), "wt2-lstm: exit status 2, see" in err) == (2, 2, True)
    assert "wt2-lstm-finetune: skipped, since wt2-lstm failed" in err
    assert "ptb-bilm: done, test ppl 8.00" in out
    Run.names.clear()
    assert invoke(reproduce.main, *argv)[0] == 2
    assert Run.names == ["wt2-lstm"]  # what is done is not run again


# ------------------------------------------------------------ results


def write_run(out, name, *ppls, test=None, parts="", suffix="", **more):
    """Writes the files of a run in `out`."""
    model = model_path(out, name)
    model.parent.mkdir(parents=True, exist_ok=True)
    write_lines(f"{model}{suffix}.jsonl", *ppls, **more)
    end = f"| End of training | test loss  1.00 | test ppl  {test:.2f} |" if test else ""
    model.with_name("log.txt").write_text(f"Model total parameters: 1234\n{end}\n{parts}")


def write_lines(path, *ppls, **more):
    epochs = [
        {"seconds": 90, "valid_ppl": ppl, "train_ppl": ppl and 2 * ppl,
         "valid_loss": ppl and math.log(ppl), "train_loss": ppl and math.log(2 * ppl), **more}
        for ppl in ppls
    ]
    Path(path).write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))


def drawn(figure):
    """{label: [y, ...]} of a figure."""
    return {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}


@pytest.mark.parametrize("scale", ["full", "small"])
def test_tables_and_figures_are_the_numbers_of_the_runs(scale, tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, path: figures.update({path.stem: figure})
    )
    write_run(tmp_path, "ptb-lstm", 320.0, 250.0, None)
    write_run(tmp_path, "ptb-lstm-finetune", 64.0, 63.0, test=60.5, suffix=".finetune")
    write_run(tmp_path, "ptb-gru-3", None)
    parts = "| cloze    | loss  4.27 | ppl     7.00 | bpc    6.161"
    write_run(tmp_path, "ptb-bilm", 9.0, test=8.0, parts=parts, forward_ppl=12, cloze_ppl=6)
    results.write_results(tmp_path, scale)
    text = (tmp_path / "README.md").read_text()
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ptb")]
    table = {name: cells for name, *cells in rows}
    assert table["ptb-lstm: LSTM"] == [
        "1,234", "24,221,600", "90.0", "48", "250.00 (epoch 2 of 3 so far)", "61.48", "-", "58.98"
    ]
    assert table["ptb-lstm-finetune: LSTM, fine-tuned"][4:] == [
        "63.00 (epoch 2 of 2)", "59.04", "60.50", "-"
    ]
    assert table["ptb-gru-3: GRU, 3 layers, rate 30"][4] == "inf (epoch 1 of 1 so far)"
    assert table["ptb-bilm: cloze"][4:] == ["6.00", "-", "7.00", "-"]
    assert set(figures) == {"figure-1", "figure-2", "figure-9", "figure-10"}  # none of GRU
    curves = drawn(figures["figure-2"])
    assert curves["LSTM"][:2] == [math.log(320), math.log(250)]
    assert drawn(figures["figure-10"])["biLM, forward"] == [math.log(12)]
    # The report's own curves and the comparison with them.
    assert ("ptb-lstm: **more than 10% off" in text) == (scale == "full")
    report = curves.get("the report's LSTM")
    assert report == ([math.log(p) for p in (326.98, 216.01, 173.88, 150.46, 130.36, 119.65)]
                      if scale == "full" else None)


def test_a_departure_from_the_reports_curve_is_named_with_its_epoch():
    report = [{"valid_ppl": ppl} for ppl in (300.0, 200.0, 150.0)]
    for ppl, departs in [(164, False), (166, True), (136, False), (134, True), (None, True)]:
        epochs = [{"epoch": n, "valid_ppl": v} for n, v in enumerate((329.0, 181.0, ppl), 1)]
        said = results.describe_departure(epochs, report)
        assert ("epoch 3" in said) == departs
        assert ("within 10%" in said) != departs


# ------------------------------------------------------------ plots


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """JSON lines in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_lines("a.pt.jsonl", 3000.0, 200.0)
    write_lines("a.pt.finetune.jsonl", 190.0)
    write_lines("b.jsonl", 400.0, None, 250.0)
    Path("b.jsonl").write_text(Path("b.jsonl").read_text().rstrip())
    Path("bad.jsonl").write_text("[]\n")
    Path("empty.jsonl").write_text("")


def test_a_plot_shows_the_runs(lines):
    assert invoke(plot.main, "A=a.pt", "b.jsonl", "--out", "c.png", "c.svg")[0] == 0
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in Path("c.svg").read_bytes()

    with open("a.pt.finetune.jsonl", "a") as file:
        file.write('{"epoch": 4, "sec')  # the disk was full
    runs = {"A": plot.read_run("a.pt"), "B": plot.read_run("b.jsonl")}
    figure = plot.draw(runs)
    axes = figure.axes[0]
    assert drawn(figure) == {"A": [3000, 200, 190], "B": [400, None, 250]}
    assert axes.lines[0].get_color() != axes.lines[1].get_color()
    assert (axes.get_xlabel(), axes.get_yscale()) == ("epoch", "log")

    Path("lr=3").mkdir()
    shutil.copy("b.jsonl", "lr=3")
    assert plot.named_run("lr=3/b.jsonl") == ("lr=3/b.jsonl", "lr=3/b.jsonl")

    figure = plot.draw(runs, ["valid_loss", "train_ppl"], "time")
    first, *_, last = figure.axes[0].lines
    assert first.get_xdata().tolist() == [1.5, 3.0, 4.5]
    assert drawn(figure)["B, training perplexity"] == [800, None, 500]
    assert first.get_linestyle() != last.get_linestyle()


# ------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("absent.pt", "absent.pt.jsonl"),
        ("A=b.jsonl A=a.pt", "NAME=RUN"),
        ("b.jsonl --field cloze_ppl", "--field cloze_ppl"),
        ("b.jsonl --field a b c d e", "--field: at most 4"),
        ("b.jsonl --out a.pt", "a.pt: must end in .png or .svg"),
        ("b.jsonl --out no/such.png", "no/such.png"),
        ("bad.jsonl", "bad.jsonl"),
        ("empty.jsonl", "empty.jsonl"),
    ],
)
def test_bad_input_of_plot_is_named_in_one_line(argv, message, lines):
    status, _, err = invoke(plot.main, *argv.split())
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--only ptb-lstm,ptb-rnn", "--only ptb-rnn: unknown; choose from ptb-lstm, "),
        ("--scale full", "data/penn does not exist; ./getdata.sh"),
        ("--out small", "--out small"),
        ("--out .", "--out ."),
        ("--out bad.jsonl", "bad.jsonl"),
        ("--devices cpu gpu", "'gpu'"),
    ],
)
def test_bad_input_of_reproduce_is_named_in_one_line(argv, message, lines, monkeypatch):
    monkeypatch.setattr(reproduce, "run_all", lambda *a: pytest.fail("it ran"))
    Path("small/runs").mkdir(parents=True)
    Path("small/runs/scale").write_text("small\n")
    status, _, err = invoke(reproduce.main, *argv.split())
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


def test_without_matplotlib_the_package_to_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = invoke(reproduce.main, "--out", tmp_path / "new")
    assert status == 2
    assert "requirements-plot.txt" in err
    assert not (tmp_path / "new").exists()
