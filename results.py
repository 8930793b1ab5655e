"""The results of reproduce.py: tables and figures, ours beside the report's.

Written to the folder of the runs: README.md, figure-N.png and .svg, and the runs' JSON lines.
"""

import json
import math
import shlex
import statistics
from pathlib import Path

from data import InputError
from experiments import EXPERIMENTS, PAIRS, SCALES, TITLES, corpus_of
from files import write_atomically
from plot import curve, describe, draw, read_run, save
from utils import FINETUNE_RECORDS, RECORDS

MODEL, LOG, DONE = "model.pt", "log.txt", "done.json"  # in the folder of a run
REPORT = Path(__file__).resolve().parent / "records" / "report.json"
DEPARTS = 0.1  # from the report's curve


def read_report():
    """The report's curves: {run: epochs}, as `read_run` gives ours."""
    return {
        name: [
            {"epoch": n, "valid_ppl": ppl, "valid_loss": math.log(ppl), "train_loss": loss,
             "elapsed": n * EXPERIMENTS[name].seconds}
            for n, (ppl, loss) in enumerate(zip(run["valid_ppl"], run["train_loss"]), 1)
        ]
        for name, run in json.loads(REPORT.read_text()).items()
    }


def read_results(out, names):
    """{name: its epochs} and {name: what was found at its end}, of what has run so far."""
    epochs, found = {}, {}
    for name in names:
        folder = out / "runs" / name
        lines = folder / f"{MODEL}{FINETUNE_RECORDS if EXPERIMENTS[name].base else RECORDS}"
        if lines.exists() and lines.stat().st_size:
            epochs[name] = read_run(lines)
        if (folder / DONE).exists():
            try:
                it = json.loads((folder / DONE).read_bytes())
                found[name] = {
                    "parameters": int(it["parameters"]), "test_ppl": float(it["test_ppl"]),
                    "command": list(map(str, it["command"])),
                    "parts": {part: float(ppl) for part, ppl in it["parts"].items()},
                }
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(
                    f"{folder / DONE}: is damaged; remove it, and the run is tested again"
                ) from None
            parts = {f"{part}_ppl" for part in found[name]["parts"]}
            if name not in epochs or not parts <= set(epochs[name][0]):
                raise InputError(
                    f"{lines}: is gone, or of another run; remove {folder}, and it is run again"
                )
    return epochs, found


def describe_departures(ours, report):
    """Where our validation perplexity departs from the report's, in words."""
    pairs = list(zip(curve(ours, "valid_ppl"), curve(report, "valid_ppl")))
    departs = [
        (epoch, mine, theirs) for epoch, (mine, theirs) in enumerate(pairs, 1)
        if not abs(mine / theirs - 1) <= DEPARTS
    ]
    if not departs:
        return f"within {DEPARTS:.0%} of the report's curve at {len(pairs)} of {len(pairs)} epochs."
    epoch, mine, theirs = departs[0]
    return (
        f"**more than {DEPARTS:.0%} off the report's curve** at {len(departs)} of {len(pairs)} "
        f"epochs, first at epoch {epoch}: {shown(mine)} against {theirs:.2f}."
    )


def corpus_title(corpus, scale):
    """What the tables and figures call a corpus: not by its own name where the sample stands in."""
    stands_in = "--data sample" in SCALES[scale].flags
    return f"Sample as {TITLES[corpus]}" if stands_in else TITLES[corpus]


def title(name, scale):
    return f"{corpus_title(corpus_of(name), scale)}, {EXPERIMENTS[name].label}"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cell(value, form):
    return "not reported" if value is None else format(value, form)


def shown(ppl):
    """A perplexity of the JSON lines, which have none where it is infinite."""
    return "infinite" if math.isnan(ppl) else f"{ppl:.2f}"


def missing(name, epochs):
    """What stands for a number that a run has at its end."""
    return "not finished" if name in epochs else "not run yet"


def ratio(ours, theirs, full, done=True):
    """Ours divided by the report's, where they can be compared."""
    if theirs is None:
        return "-"
    return "another scale" if not full else f"{ours / theirs:.3f}" if done else "not finished"


def size_table(names, epochs, found, scale):
    """The report's Table 1: parameters and seconds an epoch, by model and corpus."""
    rows = []
    for name in names:
        experiment = EXPERIMENTS[name]
        row = [title(name, scale), *[missing(name, epochs)] * 2]
        if name in found:
            row[1] = f"{found[name]['parameters']:,}"
        if name in epochs:
            row[2] = f"{statistics.median(curve(epochs[name], 'seconds')):.1f}"
        rows.append([*row, cell(experiment.parameters, ",d"), cell(experiment.seconds, "d")])
    return table(
        ["run", "parameters", "s/epoch", "the report's parameters", "its s/epoch (GTX 1080 Ti)"],
        rows,
    )


def perplexity_table(names, epochs, found, scale):
    """Best validation perplexity, and the test perplexity of that model; biLM's three under it."""
    rows, full = [], scale == "full"
    for name in names:
        experiment, parts = EXPERIMENTS[name], found.get(name, {"parts": {}})["parts"]
        cells = ["not run yet", cell(experiment.valid, ".2f"), "-"]
        if name in epochs:
            values = curve(epochs[name], "valid_ppl")
            best = min(values, key=lambda ppl: math.inf if math.isnan(ppl) else ppl)
            at = values.index(best)
            so_far = "" if name in found else " so far"
            cells[0] = f"{shown(best)} (epoch {at + 1} of {len(values)}{so_far})"
            cells[2] = ratio(best, experiment.valid, full, name in found)
        test = [missing(name, epochs), cell(experiment.test, ".2f"), "-"]
        if name in found:
            test[0] = f"{found[name]['test_ppl']:.2f}"
            test[2] = ratio(found[name]["test_ppl"], experiment.test, full)
        rows.append([title(name, scale), *cells, *test])
        for part, ppl in parts.items():
            valid = shown(curve(epochs[name], f"{part}_ppl")[at])
            rows.append(
                [f"{title(name, scale)}: {part}", valid, "-", "-", f"{ppl:.2f}", "-", "-"]
            )
    return table(
        ["run", "best validation", "the report's", "ratio", "test", "the report's", "ratio"], rows
    )


def curves(name, epochs, field):
    """{label: epochs} of a run in a figure: of biLM, validation is forward and cloze apart."""
    label = EXPERIMENTS[name].label
    parts = [part for part in ("forward", "cloze") if f"{part}_ppl" in epochs[0]]
    if field != "valid_loss" or not parts:
        return {label: epochs}
    ppls = {part: curve(epochs, f"{part}_ppl") for part in parts}
    return {
        f"biLM, {part}": [{**e, field: math.log(ppl)} for e, ppl in zip(epochs, ppls[part])]
        for part in parts
    }


def write_results(out, scale, names):
    """Writes all that can be said of the runs so far: of `names`, and of earlier ones."""
    names = [n for n in EXPERIMENTS if n in names or (out / "runs" / n).exists()]
    epochs, found = read_results(out, names)
    report = read_report() if scale == "full" else {}
    about = SCALES[scale]
    only = "" if len(names) == len(EXPERIMENTS) else f" --only {','.join(names)}"
    text = [
        '# "Regularizing and Optimizing RNN Language Models", run again\n',
        f"Scale `{scale}`: {about.about}. Made by `python reproduce.py --scale {scale}{only}`.",
    ]
    if scale != "full":
        text.append(
            "**The numbers are not comparable with the report's**, which are of the published size "
            "and of hundreds of epochs; they stand here for orientation, and its curves are not "
            "drawn."
        )
    text += [
        "\n## Table 1: size and time\n", size_table(names, epochs, found, scale),
        "\nAn epoch's seconds include its validation, and depend on what ran beside it.",
        "\n## Perplexities\n", perplexity_table(names, epochs, found, scale),
        "\nThe test perplexity is that of the model with the best validation perplexity. biLSTM "
        "has seen the word that it predicts: its perplexity is not a language model's. biLM's is "
        "exp of the mean of the losses that it was trained for, of the three under it.",
    ]
    text += [
        f"\n{title(name, scale)}: {describe_departures(epochs[name], report[name])}"
        for name in names if name in epochs and name in report
    ]
    text.append("\n## Figures\n")
    figures = [(*pair, field) for pair in PAIRS for field in ("train_loss", "valid_loss")]
    for number, (corpus, about_them, kinds, field) in enumerate(figures, 1):
        members = [f"{corpus}-{kind}" for kind in kinds]
        runs = {}
        for n in members:
            runs |= curves(n, epochs[n], field) if n in epochs else {}
        if not any(math.isfinite(v) for run in runs.values() for v in curve(run, field)):
            continue
        if about_them == "ours" and not any(n in epochs for n in members[1:]):
            continue  # figures 1 and 2 again
        heading = f"{corpus_title(corpus, scale)}, {about_them}: {describe(field)}"
        longest = max(map(len, runs.values()))  # of 500 epochs a few would be a dot
        grey = {EXPERIMENTS[n].label: report[n][: 2 * longest] for n in members if n in report}
        # Its logs have no mean over an epoch.
        note = "\n(the report's: of each epoch's last logged batches)"
        above = note if grey and field == "train_loss" else ""
        figure = draw(runs, [field], title=heading + above, reference=grey)
        for kind in ("png", "svg"):
            save(figure, out / f"figure-{number}.{kind}")
        text.append(f"![Figure {number}: {heading}](figure-{number}.png)\n")
    text.append("\n## Commands\n\nfinetune.py works on a copy of its base's model.\n")
    text += [f"* `{shlex.join(found[name]['command'])}`" for name in names if name in found]
    write_atomically(out / "README.md", ("\n".join(text) + "\n").encode())
