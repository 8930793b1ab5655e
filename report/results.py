"""The results of reproduce.py beside the report's: README.md with a table, and figures."""

import json
import math
import re
import shlex
import statistics
from itertools import product
from pathlib import Path

from checkpoint import write_atomically
from report.experiments import EXPERIMENTS, FIGURES, SCALES, command, model_path
from report.plot import LABELS, draw, read_run
from utils import FINETUNE_RECORDS, RECORDS

LOG = "log.txt"  # beside the model
REPORT = Path(__file__).resolve().parent.parent / "records" / "report.json"
COLUMNS = [
    "run", "parameters", "the report's", "s/epoch", "the report's", "best validation ppl",
    "the report's", "test ppl", "the report's",
]


def read_report():
    """The report's curves: {name: epochs}, with epochs as from `read_run`."""
    return {
        name: [
            {"epoch": n, "valid_ppl": ppl, "valid_loss": math.log(ppl), "train_loss": loss}
            for n, (ppl, loss) in enumerate(zip(run["valid_ppl"], run["train_loss"]), 1)
        ]
        for name, run in json.loads(REPORT.read_text()).items()
    }


def read_log(out, name):
    """The number of parameters (None if unknown) and the test perplexities in the log of a run.

    The perplexities are {"test": perplexity}, plus the parts of a biLM; {} before the run's end.
    """
    log = model_path(out, name).with_name(LOG)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    parameters = re.search(r"total parameters: (\d+)", text)
    _, ended, test = text.rpartition("| End of training |")
    ppls = re.findall(r"(\w+) +(?:\| )?loss +\S+ \| (?:test )?ppl +(\S+)", test) if ended else []
    return parameters and int(parameters[1]), {part: float(ppl) for part, ppl in ppls}


def read_epochs(out):
    """{name: epochs so far} of the runs that have finished an epoch."""
    epochs = {}
    for name, experiment in EXPERIMENTS.items():
        suffix = FINETUNE_RECORDS if experiment.base else RECORDS
        records = Path(f"{model_path(out, name)}{suffix}")
        if records.exists() and records.stat().st_size:
            epochs[name] = read_run(records)
    return epochs


def cell(value, spec=".2f"):
    return "-" if value is None else format(value, spec)


def valid_ppl(epoch):
    """The validation perplexity of an epoch; the JSON lines have null if it is infinite."""
    return epoch["valid_ppl"] or math.inf


def table(out, epochs):
    """A Markdown table of our runs beside the report's; a biLM's parts have rows of their own."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for name, run in epochs.items():
        experiment = EXPERIMENTS[name]
        parameters, test = read_log(out, name)
        best = min(run, key=valid_ppl)
        so_far = "" if test else " so far"
        rows.append([
            f"{name}: {experiment.label}",
            cell(parameters, ",d"), cell(experiment.parameters, ",d"),
            cell(statistics.median(epoch["seconds"] for epoch in run), ".1f"),
            cell(experiment.seconds, "d"),
            f"{valid_ppl(best):.2f} (epoch {best['epoch']} of {len(run)}{so_far})",
            cell(experiment.valid), cell(test.pop("test", None)), cell(experiment.test),
        ])
        for part, ppl in test.items():
            valid = cell(best[f"{part}_ppl"])
            rows.append([f"{name}: {part}", *"----", valid, "-", cell(ppl), "-"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def describe_departure(epochs, report):
    """A sentence on whether our validation perplexity is within 10% of the report's."""
    for ours, theirs in zip(epochs, report):
        if abs(valid_ppl(ours) / valid_ppl(theirs) - 1) > 0.1:
            return (
                f"**more than 10% off the report's curve**, first in epoch {ours['epoch']}: "
                f"{valid_ppl(ours):.2f}, the report's {valid_ppl(theirs):.2f}."
            )
    compared = min(len(epochs), len(report))
    return f"within 10% of the report's curve in all epochs that both have ({compared})."


def curves(name, epochs, field):
    """{label: epochs} of a run in a figure.

    biLM's mean validation loss is not comparable with other models, so its forward and cloze losses
    are drawn instead.
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
    """Draws the runs so far as figure-N.png; returns the Markdown that embeds the figures.

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
        figure.savefig(out / f"figure-{number}.png")
        lines.append(f"![Figure {number}: {title}](figure-{number}.png)")
    return lines


def write_results(out, scale):
    """Writes the results so far of the runs in `out`."""
    epochs = read_epochs(out)
    report = read_report() if scale == "full" else {}
    names = ",".join(epochs or EXPERIMENTS)
    flags = ["--scale", scale, "--only", names, "--out", str(out)]
    lines = [
        '# "Regularizing and Optimizing RNN Language Models", run again',
        f"Scale `{scale}`: {SCALES[scale].about}. "
        f"Made by `python -m report.reproduce {shlex.join(flags)}`.",
        "The report's numbers are comparable only with scale `full`.",
        "## The report's Table 1, and perplexities",
        table(out, epochs),
        "The report's times are from a GTX 1080 Ti. Ours include validation, and depend on other "
        "processes on the machine.",
        "The test perplexity is that of the model with the best validation perplexity. biLSTM has "
        "seen the word that it predicts: its perplexity is not a language model's. biLM's is exp "
        "of the mean of its objective's losses, whose perplexities are listed below it.",
        *(f"* {name}: {describe_departure(epochs[name], report[name])}"
          for name in epochs if name in report),
        "## Figures",
        "At scale `full` the report's curves are drawn in grey. Its training losses are those of "
        "the last logged batches of each epoch.",
        *draw_figures(out, scale, epochs, report),
        "## Commands",
        *(f"* `python {shlex.join(command(name, scale, out))}`" for name in epochs),
    ]
    write_atomically(out / "README.md", "\n\n".join([*lines, ""]).encode())
