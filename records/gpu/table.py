"""Prints the tables of a log that run.sh wrote, finished or not.

    python records/gpu/table.py records/gpu/ptb/log.txt
"""

import json
import re
import sys
from pathlib import Path

REPORT = Path(__file__).parent.parent / "report.json"
REPORT_LSTM = "the report's LSTM"
REPORT_CURVES = {"data/penn": "ptb-lstm", "data/wikitext-2": "wt2-lstm"}


def sections(log):
    """(command, output) of each command in the log."""
    return [part.partition("\n")[::2] for part in log.split("\n$ python ")[1:]]


def flag(command, name):
    """The first value of a flag in a command, None if it is not there."""
    found = re.search(rf"--{name} (\S+)", command)
    return found and found[1]


def table(columns, rows):
    """The lines of a Markdown table, none if there are no rows."""
    if not rows:
        return []
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def perplexities(output):
    """What pointer.py printed: {(model, split): perplexity}, {split: tokens read of all}."""
    found, tokens = {}, {}
    line = r"\| ([a-z ]+) \| (valid|test) loss .* ppl +(\S+) \|.* ([\d,]+ of [\d,]+) tokens"
    for way, split, ppl, read in re.findall(line, output):
        found[way, split], tokens[split] = ppl, read
    return found, tokens


def models(log):
    """A row for each model, and their validation curves beside the report's LSTM's."""
    rows, curves = {}, {}
    for command, output in sections(log):
        name = (flag(command, "save") or "").removesuffix(".pt")
        if command.startswith("main.py") and name != "first":
            epochs = re.findall(r"end of epoch +\d+ \| time: +(\S+)s .* valid ppl +(\S+)", output)
            test = re.search(r"End of training \| .* test ppl +(\S+)", output)
            curves[name] = [float(ppl) for _, ppl in epochs]
            mean = sum(float(seconds) for seconds, _ in epochs) / max(1, len(epochs))
            best = min((ppl for _, ppl in epochs), key=float, default="")
            test = test[1] if test else ""
            rows[name] = [name, len(epochs), f"{mean:.1f}", best, test, *[""] * 6]
            if epochs and (run := REPORT_CURVES.get(flag(command, "data"))):
                curves[REPORT_LSTM] = json.loads(REPORT.read_text())[run]["valid_ppl"]
        elif command.startswith("pointer.py"):
            found, tokens = perplexities(output)
            if "--dynamic" in command:
                ways = ("model alone", "dynamic", "dynamic and cache")
                rows[name][7:] = [
                    tokens.get("test", ""), *(found.get((way, "test"), "") for way in ways)
                ]
            else:
                rows[name][5:7] = [
                    found.get(("with cache", split), "")
                    + note_partial(tokens.get(split)) for split in ("valid", "test")
                ]
    columns = ["", "epochs", "s per epoch", "best valid ppl", "test ppl", "cache: valid", "test",
               "tokens of test", "alone", "dynamic", "and cache"]
    return table(columns, rows.values()) + curve_table(curves)


def note_partial(tokens):
    """" (N of M tokens)" if only N of M tokens were read, else ""."""
    read, _, total = (tokens or "").partition(" of ")
    return "" if read == total else f" ({tokens} tokens)"


def curve_table(curves):
    """Validation perplexities after epochs 1, 2, 5, each tenth and the last of ours."""
    ours = {name: curve for name, curve in curves.items() if name != REPORT_LSTM}
    last = max(map(len, ours.values()), default=0)
    epochs = [n for n in range(1, last + 1) if n in (1, 2, 5, last) or n % 10 == 0]
    columns = {**ours, REPORT_LSTM: curves.get(REPORT_LSTM, [])}
    rows = [
        [n, *(f"{curve[n - 1]:.2f}" if n <= len(curve) else "" for curve in columns.values())]
        for n in epochs
    ]
    return table(["valid ppl after epoch", *columns], rows)


BENCH_FLAGS = ("model", "recipe", "batch_size", "precision", "pad-to")


def benchmarks(log):
    """A row for each benchmark; then the lines of the profile that say how long the GPU idles."""
    rows, lines = [], []
    for command, output in sections(log):
        if found := re.search(r"^\{.*\}$", output, re.M):
            _, ours, _, ratio = json.loads(found[0]).values()
            rows.append([
                *(flag(command, name) for name in BENCH_FLAGS),
                "yes" if "--cuda-graphs" in command else "no",
                f"{ours['ms_per_step']:.1f}", f"{ours['tokens_per_s']:,.0f}",
                f"{ratio['tokens_per_s']:.2f}", f"{ours['peak_mib']:.0f} ({ratio['peak_mib']:.2f})",
                f"{ours['utilization']:.2f}", f"{ratio['eval_tokens_per_s']:.2f}",
            ])
        lines += re.findall(r"^(?:step|evaluation): .*", output, re.M)
    columns = ["model", "recipe", "batch", "precision", "pad to", "graphs",
               "ms per step", "tokens/s",
               "speed over plain", "peak MiB (over plain)", "utilization",
               "evaluation speed over plain"]
    return table(columns, rows) + lines


def main():
    log = Path(sys.argv[1]).read_text()
    tests = re.findall(r"^=+ (\d+ (?:passed|failed|skipped|error).*?) =+$", log, re.M)
    notes = re.findall(r"^# ((?:failed|skipped).*)", log, re.M)
    print("\n".join([*tests, *models(log), *benchmarks(log), *notes]).strip())


if __name__ == "__main__":
    main()
