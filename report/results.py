"""The results of reproduce.py, ours beside the report's: README.md with tables, and figures."""

import json
import math
import shlex
import statistics
from itertools import product
from pathlib import Path

from checkpoint import FINETUNE_RECORDS, RECORDS, write_atomically
from report.experiments import EXPERIMENTS, FIGURES, SCALES, command, model_path
from report.plot import LABELS, draw, read_run, save

DONE = "done.json"  # beside the model: what was found at the end of its run
REPORT = Path(__file__).resolve().parent.parent / "records" / "report.json"


def read_report():
    """The report's curves: {name: epochs}, as `read_run` gives ours."""
    return {
        name: [
            {"epoch": n, "valid_ppl": ppl, "valid_loss": math.log(ppl), "train_loss": loss}
            for n, (ppl, loss) in enumerate(zip(run["valid_ppl"], run["train_loss"]), 1)
        ]
        for name, run in json.loads(REPORT.read_text()).items()
    }


def read_results(out):
    """{name: its epochs so far} and {name: what was found at its end}."""
    epochs, found = {}, {}
    for name, experiment in EXPERIMENTS.items():
        model = model_path(out, name)
        records = Path(f"{model}{FINETUNE_RECORDS if experiment.base else RECORDS}")
        if records.exists() and records.stat().st_size:
            epochs[name] = read_run(records)
        if model.with_name(DONE).exists():
            found[name] = json.loads(model.with_name(DONE).read_text())
    return epochs, found


def table(rows):
    """Markdown; the first row is the head."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(value, form=".2f"):
    return "-" if value is None else format(value, form)


def valid_ppl(epoch):
    """The validation perplexity of an epoch; the JSON lines have null if it is infinite."""
    return epoch["valid_ppl"] or math.inf


def size_table(epochs, found):
    """The report's Table 1: parameters and seconds per epoch."""
    rows = [["run", "parameters", "s/epoch", "the report's parameters", "its s/epoch"]]
    for name, run in epochs.items():
        experiment = EXPERIMENTS[name]
        rows.append([
            f"{name}: {experiment.label}", cell(found.get(name, {}).get("parameters"), ",d"),
            cell(statistics.median(epoch["seconds"] for epoch in run), ".1f"),
            cell(experiment.parameters, ",d"), cell(experiment.seconds, "d"),
        ])
    return table(rows)


def perplexity_table(epochs, found):
    """Best validation perplexity and the test perplexity of that model; biLM's parts below it."""
    rows = [["run", "best validation", "the report's", "test", "the report's"]]
    for name, run in epochs.items():
        experiment = EXPERIMENTS[name]
        end = found.get(name, {"test_ppl": None, "parts": {}})
        best = min(run, key=valid_ppl)
        so_far = "" if name in found else " so far"
        rows.append([
            f"{name}: {experiment.label}",
            f"{valid_ppl(best):.2f} (epoch {best['epoch']} of {len(run)}{so_far})",
            cell(experiment.valid), cell(end["test_ppl"]), cell(experiment.test),
        ])
        for part, ppl in end["parts"].items():
            rows.append([f"{name}: {part}", cell(best[f"{part}_ppl"]), "-", cell(ppl), "-"])
    return table(rows)


def describe_departure(epochs, report):
    """Where our validation perplexity departs from the report's by more than 10%, in words."""
    for ours, theirs in zip(epochs, report):
        if abs(valid_ppl(ours) / valid_ppl(theirs) - 1) > 0.1:
            return (
                f"**more than 10% off the report's curve**, first in epoch {ours['epoch']}: "
                f"{valid_ppl(ours):.2f}, the report's {valid_ppl(theirs):.2f}."
            )
    return f"within 10% of the report's curve in all epochs so far ({len(epochs)})."


def curves(name, epochs, field):
    """{label: epochs} of a run in a figure.

    biLM's mean validation loss cannot be compared with other models'; its forward loss can.
    """
    if field != "valid_loss" or "cloze_ppl" not in epochs[0]:
        return {EXPERIMENTS[name].label: epochs}
    return {
        f"biLM, {part}": [
            {**epoch, field: math.log(epoch[f"{part}_ppl"] or math.nan)} for epoch in epochs
        ]
        for part in ("forward", "cloze")
    }


def draw_figures(out, scale, epochs, report):
    """Draws the runs so far as figure-N.png; returns the Markdown that shows them.

    The report's curves are cut at twice the length of ours.
    """
    lines = []
    fields = "train_loss", "valid_loss"
    for number, ((about, names), field) in enumerate(product(FIGURES.items(), fields), 1):
        drawn = {}
        for name in names:
            if any(epoch[field] for epoch in epochs.get(name, [])):
                drawn |= curves(name, epochs[name], field)
        if not drawn:
            continue
        title = f"{about}, scale {scale}: {LABELS[field]}"
        length = 2 * max(map(len, drawn.values()))
        reference = {EXPERIMENTS[n].label: report[n][:length] for n in names if n in report}
        figure = draw(drawn, [field], title=title, reference=reference)
        save(figure, out / f"figure-{number}.png")
        lines.append(f"![Figure {number}: {title}](figure-{number}.png)")
    return lines


def write_results(out, scale):
    """Writes the results so far of the runs in `out`."""
    epochs, found = read_results(out)
    report = read_report() if scale == "full" else {}
    departures = [
        f"* {name}: {describe_departure(epochs[name], report[name])}"
        for name in epochs if name in report
    ]
    commands = [f"* `python {shlex.join(command(name, scale, out))}`" for name in epochs]
    lines = [
        '# "Regularizing and Optimizing RNN Language Models", run again',
        f"Scale `{scale}`: {SCALES[scale].about}. "
        f"Made by `python -m report.reproduce --scale {scale} --only {','.join(epochs)}`.",
        "The report's numbers are of scale `full`; those of other scales do not compare with them.",
        "## Table 1: size and time",
        size_table(epochs, found),
        "The report's seconds are of a GTX 1080 Ti. Ours include validation, and depend on what "
        "ran at the same time.",
        "## Perplexities",
        perplexity_table(epochs, found),
        "The test perplexity is that of the model with the best validation perplexity. biLSTM has "
        "seen the word that it predicts: its perplexity is not a language model's. biLM's is exp "
        "of the mean of the losses that it was trained for, which are listed below it.",
        *departures,
        "## Figures",
        "At scale `full` the report's curves are drawn in grey. Its training losses are those of "
        "each epoch's last logged batches.",
        *draw_figures(out, scale, epochs, report),
        "## Commands",
        *commands,
    ]
    write_atomically(out / "README.md", "\n\n".join([*lines, ""]).encode())
