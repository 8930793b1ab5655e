"""Draws the curves of runs from the JSON lines that training leaves beside its checkpoints.

    python plot.py LSTM=lstm.pt GRU=gru.pt --out curves.svg
"""

import argparse
import io
import itertools
import json
import math
import warnings
from pathlib import Path

from data import InputError
from checkpoint import write_atomically
from flags import Parser, number, run
from checkpoint import FINETUNE_RECORDS, RECORDS

# Okabe and Ito's colours, which stay apart for colour-blind readers; yellow is too pale for lines.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
STYLES = ["-", "--", ":", "-."]  # one for each curve of a run
UNITS = {"seconds": 1, "minutes": 60, "hours": 3600}


def read_run(path):
    """The epochs of a run, a dictionary each, fine-tuning's after the others'.

    `path`: a file of JSON lines, or the checkpoint that has them beside it. Adds to each epoch the
    time since the run's start, as `elapsed`, in seconds. Raises InputError, naming the file.
    """
    files = [Path(f"{path}{suffix}") for suffix in (RECORDS, FINETUNE_RECORDS)]
    if Path(path).suffix == ".jsonl":
        files = [Path(path)]
    epochs, elapsed = [], 0.0
    for file in [file for file in files if file.exists()] or files[:1]:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is no text"
            raise InputError(f"{file}: cannot be read ({reason})") from None
        for number_, line in enumerate(lines, 1):
            try:
                epoch = json.loads(line)
                elapsed += epoch["seconds"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{file}: line {number_} is no epoch of a run") from None
            epochs.append({**epoch, "epoch": len(epochs) + 1, "elapsed": elapsed})
    if not epochs:
        raise InputError(f"{files[0]}: has no epoch yet")
    return epochs


def curve(epochs, field):
    """The values of `field`, one an epoch; NaN, which leaves a gap, where there is none."""
    values = [epoch.get(field) for epoch in epochs]
    return [value if isinstance(value, float | int) else math.nan for value in values]


def time_unit(seconds):
    """The largest unit of which `seconds` has at least two: its name, and its seconds."""
    return [item for item in UNITS.items() if item[1] == 1 or seconds >= 2 * item[1]][-1]


def describe(field):
    """What an axis or a legend calls a field of the JSON lines."""
    names = {"valid": "validation", "train": "training", "ppl": "perplexity"}
    return " ".join(names.get(word, word) for word in field.split("_"))


def draw(
    runs, fields=("valid_ppl",), against="epochs", scale="auto", title="", highest=None,
    reference=(),
):
    """A matplotlib figure of curves: a colour for each run, a line style for each field.

    runs: {name: epochs as of `read_run`}; against: "epochs" or "time". scale: "log", "linear", or
    "auto", which is log where the values span more than a factor of four. highest: the top of the
    vertical axis. reference: as runs, drawn in grey behind them. Raises InputError when no
    run has a field, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
    except ImportError:
        raise InputError(
            "matplotlib is not installed; pip install -r requirements-plot.txt"
        ) from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    unit, seconds = time_unit(max(epochs[-1]["elapsed"] for epochs in runs.values()))
    for field in fields:
        if not any(field in epoch for epochs in runs.values() for epoch in epochs):
            known = sorted({key for epochs in runs.values() for key in epochs[0]})
            raise InputError(f"--field {field}: no run has it; they have {', '.join(known)}")
    drawn = []
    for (name, epochs), style in zip(dict(reference).items(), itertools.cycle(STYLES)):
        axes.plot(
            [epoch["epoch"] for epoch in epochs], curve(epochs, fields[0]), style, color="0.7",
            linewidth=1.4, zorder=1, label=literal(f"the report's {name}"),
        )
    for index, (name, epochs) in enumerate(runs.items()):
        for field, style in zip(fields, STYLES):
            values = curve(epochs, field)
            if all(map(math.isnan, values)):
                continue
            times = [epoch["epoch"] for epoch in epochs]
            if against == "time":
                times = [epoch["elapsed"] / seconds for epoch in epochs]
            drawn += [value for value in values if not math.isnan(value)]
            label = name if len(fields) == 1 else f"{name}, {describe(field)}"
            axes.plot(
                times, values, style, color=COLOURS[index % len(COLOURS)], linewidth=1.6,
                marker="o" if len(epochs) <= 20 else None, markersize=3.5, label=literal(label),
            )
    if not drawn:
        raise InputError(f"--field {' '.join(fields)}: no run has a finite value")
    if scale == "log" and min(drawn) <= 0:
        raise InputError("--scale log: not all values are above 0; draw them with --scale linear")
    if highest is not None and highest <= min(drawn):
        raise InputError(f"--highest {highest:g}: all values are above it; raise it")
    log_scale = scale == "log" or (
        scale == "auto" and min(drawn) > 0 and min(max(drawn), highest or math.inf) > 4 * min(drawn)
    )
    if log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    if highest is not None:
        axes.set_ylim(top=highest)
    axes.xaxis.set_major_locator(MaxNLocator(integer=against == "epochs"))
    axes.set_xlabel("epoch" if against == "epochs" else f"time ({unit})")
    kinds = {field.rpartition("_")[2] for field in fields}
    names = [describe(fields[0] if len(fields) == 1 else kind) for kind in sorted(kinds)]
    unit_of = {"loss": " (nats a token)"}
    axes.set_ylabel(", ".join(names) + (unit_of.get(*kinds, "") if len(kinds) == 1 else ""))
    axes.set_title(literal(title))
    longest = max(len(line.get_label()) for line in axes.lines)
    columns = min(len(axes.lines), 2 if len(fields) > 1 else 4, max(1, 112 // (longest + 6)))
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, fontsize="small",
    )
    return figure


def literal(text):
    """A text of the user's for matplotlib, which reads formulas into $, and hides what begins _."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def check_replaceable(path):
    """Raises InputError unless there is a picture of the same kind at `path`, or nothing."""
    begins = {".png": (b"\x89PNG",), ".svg": (b"<?xml", b"<svg")}[Path(path).suffix.lower()]
    if Path(path).is_file() and not Path(path).read_bytes().startswith(begins):
        raise InputError(f"--out {path}: exists and is no picture; name another")


def save(figure, path):
    """Writes a figure as PNG or SVG, by the name's ending; the same figure as the same bytes."""
    import matplotlib

    file = io.BytesIO()
    kind = Path(path).suffix[1:].lower()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "awd-lstm"}):
        warnings.simplefilter("ignore")  # of letters that the font lacks
        figure.savefig(file, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else {})
    write_atomically(path, file.getvalue())


def named(text):
    """An argparse type: NAME=PATH, or a path that is its own name."""
    name, equals, path = text.partition("=")
    if equals and not path:
        raise argparse.ArgumentTypeError(f"{text}: names no run; write NAME=RUN")
    exists = any(Path(f"{text}{suffix}").exists() for suffix in ("", RECORDS))
    whole = exists or not (name and equals)
    return (Path(text).name, text) if whole else (name, path)


def picture(text):
    """An argparse type: the path of a PNG or SVG file."""
    if Path(text).suffix.lower() not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text}: must end in .png or .svg")
    return text


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", type=named, nargs="+", metavar="[NAME=]RUN",
        help="a checkpoint, or a file of JSON lines, and what to call it")
    add("--out", type=picture, nargs="+", default=["curves.png"],
        help="the files to write, .png or .svg (default: curves.png)")
    add("--field", nargs="+", default=["valid_ppl"], metavar="FIELD",
        help="what to draw of each run, as its JSON lines name it, at most four: valid_ppl (the "
             "default), train_ppl, valid_loss, train_loss, tokens_per_s, ...")
    add("--against", choices=["epochs", "time"], default="epochs")
    add("--scale", choices=["auto", "log", "linear"], default="auto", help="of the vertical axis")
    add("--highest", type=number(float, 0, open_low=True), help="the top of the vertical axis")
    add("--title", default="")
    args = parser.parse_args(argv)
    names = [name for name, _ in args.runs]
    if len(set(names)) < len(names):
        parser.error("two runs have the same name; give them others, as NAME=RUN")
    if len(args.field) > len(STYLES):
        parser.error(f"--field: at most {len(STYLES)} can be told apart; draw the others apart")
    return args


def main(argv=None):
    args = parse_args(argv)
    runs = {name: read_run(path) for name, path in args.runs}
    figure = draw(runs, args.field, args.against, args.scale, args.title, args.highest)
    for path in args.out:
        check_replaceable(path)
    for path in args.out:
        save(figure, path)
        print(f"Written: {path}")


if __name__ == "__main__":
    run(main)
