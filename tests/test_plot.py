"""Curves: drawn from the numbers in the JSON lines, named, told apart, written whole."""

import builtins
import json
import math

import pytest

import plot
from conftest import invoke

pytest.importorskip("matplotlib", reason="requirements-plot.txt is not installed")


def write(path, *valid, seconds=90.0, **more):
    lines = [
        {"epoch": number, "seconds": seconds, "train_ppl": 2 * (value or 1), "valid_ppl": value}
        | more
        for number, value in enumerate(valid, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def draw(monkeypatch, *argv):
    """Runs plot.py; returns (exit status, stderr, the figures that it saved)."""
    figures = []
    save = plot.save
    monkeypatch.setattr(plot, "save", lambda *a: figures.append(a[0]) or save(*a))
    status, _, err = invoke(lambda: plot.main(list(map(str, argv))))
    return status, err, figures


def curves(figure):
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}


def test_a_reference_is_grey_and_behind():
    ours = [{"epoch": n, "elapsed": n, "valid_ppl": 9.0 * n} for n in (1, 2)]
    theirs = [{"epoch": n, "elapsed": n, "valid_ppl": 8.0 * n} for n in (1, 2, 3)]
    lines = plot.draw({"A": ours}, reference={"A": theirs}).axes[0].lines
    behind, front = sorted(lines, key=lambda line: line.get_zorder())
    assert (behind.get_label(), front.get_label()) == ("the report's A", "A")
    assert behind.get_xydata().tolist() == [[1, 8], [2, 16], [3, 24]]
    assert behind.get_color() == "0.7"


def test_the_curves_are_the_numbers(tmp_path, monkeypatch):
    write(tmp_path / "a.pt.jsonl", 300.0, 200.0)
    write(tmp_path / "a.pt.finetune.jsonl", 190.0)
    write(tmp_path / "b.jsonl", 400.0, None, 250.0)
    out = [tmp_path / "c.png", tmp_path / "c.svg"]
    runs = [f"A={tmp_path}/a.pt", tmp_path / "b.jsonl"]
    status, err, figures = draw(monkeypatch, *runs, "--out", *out)
    assert (status, err) == (0, "")
    assert out[0].read_bytes().startswith(b"\x89PNG")
    assert out[1].read_text().startswith("<?xml")
    drawn = curves(figures[0])
    assert drawn["A"] == [[1, 300], [2, 200], [3, 190]]
    assert drawn["b.jsonl"][::2] == [[1, 400], [3, 250]]
    assert math.isnan(drawn["b.jsonl"][1][1])
    axes = figures[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "validation perplexity")
    assert axes.get_yscale() == "linear"
    colours = [line.get_color() for line in axes.lines]
    assert len(set(colours)) == 2

    before = [path.read_bytes() for path in out]
    draw(monkeypatch, *runs, "--out", *out)
    assert [path.read_bytes() for path in out] == before


def test_against_time_with_a_style_for_each_field(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", 3000.0, 200.0)
    _, _, (figure,) = draw(
        monkeypatch, f"A={tmp_path}/a.jsonl", "--against", "time", "--field", "valid_ppl",
        "train_ppl", "--out", tmp_path / "c.png", "--title", "T", "--highest", 5000,
    )
    assert curves(figure) == {
        "A, validation perplexity": [[1.5, 3000], [3.0, 200]],
        "A, training perplexity": [[1.5, 6000], [3.0, 400]],
    }
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("time (minutes)", "perplexity")
    assert (axes.get_title(), axes.get_yscale(), axes.get_ylim()[1]) == ("T", "log", 5000)
    assert len({line.get_linestyle() for line in axes.lines}) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["absent.pt"], "absent.pt.jsonl: cannot be read (No such file or directory)"),
        (["LSTM="], "argument [NAME=]RUN: LSTM=: names no run; write NAME=RUN"),
        (["a.jsonl", "x/a.jsonl"], "two runs have the same name; give them others, as NAME=RUN"),
        (["a.jsonl", "--field", "cloze_ppl"], "--field cloze_ppl: no run has it; they have"),
        (["a.jsonl", "--out", "a.pt"], "argument --out: a.pt: must end in .png or .svg"),
        (["a.jsonl", "--out", "no/such/a.png"], "no/such/a.png: cannot be written (No such"),
        (["bad.jsonl"], "bad.jsonl: line 2 is no epoch of a run"),
        (["empty.jsonl"], "empty.jsonl: has no epoch yet"),
        (["a.jsonl", "--highest", "2"], "--highest 2: all values are above it; raise it"),
        (["a.jsonl", "--out", "new.png", "text.png"], "--out text.png: exists and is no picture"),
        (["zero.jsonl", "--scale", "log"], "--scale log: not all values are above 0"),
        (["a.jsonl", "--highest", "0"], "argument --highest: must be a number above 0, not 0"),
    ],
)
def test_bad_input(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", 3.0)
    (tmp_path / "bad.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "[]\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "text.png").write_text("no picture")
    write(tmp_path / "zero.jsonl", 0.0)
    before = sorted(tmp_path.iterdir())
    status, err, _ = draw(monkeypatch, *argv)
    assert status == 2
    assert err.partition("error: ")[2].startswith(message)
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_names_are_what_they_are(tmp_path, monkeypatch, recwarn):
    write(tmp_path / "lr=5.jsonl", 3.0)
    runs = [tmp_path / "lr=5.jsonl", f"_a $b${{={tmp_path}/lr=5.jsonl", f"={tmp_path}/lr=5.jsonl"]
    status, err, (figure,) = draw(
        monkeypatch, *runs[:2], "--title", "$\\bad$ \u65e5", "--out", tmp_path / "c.png"
    )
    assert (status, err, len(recwarn)) == (0, "", 0)
    assert list(curves(figure)) == ["lr=5.jsonl", " _a \\$b\\${"]


def test_without_matplotlib_it_says_how_to_install_it(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", 3.0)
    find = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    status, err, _ = draw(monkeypatch, tmp_path / "a.jsonl", "--out", tmp_path / "c.png")
    assert status == 2
    assert "matplotlib is not installed; pip install -r requirements-plot.txt" in err
    assert not (tmp_path / "c.png").exists()
