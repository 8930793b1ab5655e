"""Draws the curves of runs from the JSON lines beside their checkpoints.

    python -m report.plot LSTM=lstm.pt GRU=gru.pt --out curves.svg
"""

import argparse
import json
from pathlib import Path

from data import InputError
from flags import Parser, run_command
from utils import FINETUNE_RECORDS, RECORDS

# Okabe and Ito's colour-blind-safe colours, without yellow, which is too pale for lines.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
LABELS = {
    "train_loss": "training loss", "train_ppl": "training perplexity",
    "valid_loss": "validation loss", "valid_ppl": "validation perplexity",
}
STYLES = ["-", "--", ":", "-."]  # one per field of a run


def import_matplotlib():
    """Returns matplotlib; raises InputError if it is not installed."""
    try:
        import matplotlib.figure
    except ImportError:
        raise InputError(
            "matplotlib is not installed; pip install -r requirements-plot.txt"
        ) from None
    return matplotlib


def read_run(path):
    """The epochs of a run, a list of dictionaries, with the epochs of fine-tuning at the end.

    `path` is a file of JSON lines or the checkpoint beside it. Adds `minutes`, the time since the
    start of the run, to each epoch. Raises InputError, naming the file.
    """
    files = [Path(f"{path}{RECORDS}"), Path(f"{path}{FINETUNE_RECORDS}")]
    if Path(path).suffix == ".jsonl":
        files = [Path(path)]
    epochs, minutes = [], 0.0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        for line in text[: text.rfind("}") + 1].splitlines():  # a full disk can cut the last one
            try:
                epoch = json.loads(line)
                minutes += epoch["seconds"] / 60
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{file}: does not contain the JSON lines of a run") from None
            epochs.append({**epoch, "epoch": len(epochs) + 1, "minutes": minutes})
    if not epochs:
        raise InputError(f"{files[0]}: is missing, or has no epochs yet")
    return epochs


def draw(runs, fields=("valid_ppl",), against="epochs", title="", reference=None):
    """A matplotlib figure of curves, with one colour per run and one line style per field.

    runs: {name: epochs from `read_run`}; None values leave gaps. against: "epochs" or "time".
    reference: like runs, drawn in grey. The vertical axis is logarithmic for perplexities. Raises
    InputError if no run has a field.
    """
    figure = import_matplotlib().figure.Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.grid(alpha=0.3, which="both")

    def plot(epochs, field, style, **kwargs):
        x = [epoch["epoch" if against == "epochs" else "minutes"] for epoch in epochs]
        axes.plot(x, [epoch.get(field) for epoch in epochs], style, **kwargs)

    for (name, epochs), style in zip((reference or {}).items(), STYLES):
        plot(epochs, fields[0], style, color="0.7", zorder=1, label=f"the report's {name}")
    for field, style in zip(fields, STYLES):
        if all(epoch.get(field) is None for epochs in runs.values() for epoch in epochs):
            raise InputError(f"--field {field}: no run has this field")
        suffix = f", {LABELS.get(field, field)}" if len(fields) > 1 else ""
        for (name, epochs), colour in zip(runs.items(), COLOURS * len(runs)):
            plot(epochs, field, style, color=colour, marker=".", label=name + suffix)
    if all(field.endswith("ppl") for field in fields):
        axes.set_yscale("log", subs=[2, 3, 5])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("epoch" if against == "epochs" else "time (minutes)")
    scale = " (log scale)" if axes.get_yscale() == "log" else ""
    axes.set_ylabel(", ".join(LABELS.get(field, field) for field in fields) + scale)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def named_run(text):
    """An argparse type: NAME=PATH, or a path that is also the name."""
    name, _, path = text.partition("=")
    return (name, path) if path and not Path(text).exists() else (text, text)


def image_path(text):
    """An argparse type: the path of a PNG or SVG file."""
    if Path(text).suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text}: must end in .png or .svg")
    return text


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", type=named_run, nargs="+", metavar="[NAME=]RUN",
        help="a checkpoint or a file of JSON lines, and its name in the plot")
    add("--out", type=image_path, nargs="+", default=["curves.png"],
        help="the files to write, .png or .svg (default: curves.png)")
    add("--field", nargs="+", default=["valid_ppl"], metavar="FIELD",
        help="fields of the JSON lines to draw, at most four: valid_ppl (the default), train_ppl, "
             "valid_loss, train_loss, tokens_per_s, ...")
    add("--against", choices=["epochs", "time"], default="epochs")
    args = parser.parse_args(argv)
    if len(dict(args.runs)) < len(args.runs):
        parser.error("two runs have the same name; rename them with NAME=RUN")
    if len(args.field) > len(STYLES):
        parser.error(f"--field: at most {len(STYLES)} fields fit into a plot")
    return args


def main(argv=None):
    args = parse_args(argv)
    runs = {name: read_run(path) for name, path in args.runs}
    figure = draw(runs, args.field, args.against)
    for path in args.out:
        figure.savefig(path)
        print(f"Wrote {path}")


if __name__ == "__main__":
    run_command(main)
