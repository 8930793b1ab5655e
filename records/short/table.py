"""Prints the validation perplexities of runs, epoch by epoch: table.py RUN.jsonl ..."""

import argparse
import json
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("files", nargs="+", metavar="RUN.jsonl")
runs = {
    Path(path).name.removesuffix(".jsonl").removesuffix(".pt"):
        [json.loads(line) for line in Path(path).read_text().splitlines()]
    for path in parser.parse_args().files
}
longest = max(map(len, runs.values()))
print("| run |", " | ".join(str(epoch + 1) for epoch in range(longest)), "| gap |")
print("|---|" + "---|" * (longest + 1))
for name, epochs in sorted(runs.items(), key=lambda item: item[1][-1]["valid_ppl"]):
    values = [f"{epoch['valid_ppl']:.2f}" for epoch in epochs] + [""] * (longest - len(epochs))
    gap = epochs[-1]["train_ppl"] / epochs[-1]["valid_ppl"]
    print(f"| {name} |", " | ".join(values), f"| {gap:.2f} |")
