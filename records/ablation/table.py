"""Prints the table of an ablation: python records/ablation/table.py FOLDER"""

import json
import re
import sys
from pathlib import Path

NAMES = ("all", "all-seed-142", "no-weight-drop", "no-embedding-dropout", "no-locked-dropout",
         "no-ar-tar", "no-averaging", "none")

print("| run | best valid ppl | at epoch | last valid ppl | last train ppl | test ppl | switch |")
print("|---|---|---|---|---|---|---|")
for name in NAMES:
    folder = Path(sys.argv[1])
    lines = (folder / f"{name}.pt.jsonl").read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    best = min(epochs, key=lambda e: e["valid_loss"])
    test = re.search(r"test ppl +([\d.]+) \|", (folder / f"{name}.log").read_text())[1]
    averaging = [e["epoch"] for e in epochs if e["averaging"]]
    switch = f"after {averaging[0] - 1}" if averaging else "-"
    print(
        f"| {name} | {best['valid_ppl']:.2f} | {best['epoch']} | {epochs[-1]['valid_ppl']:.2f} "
        f"| {epochs[-1]['train_ppl']:.2f} | {test} | {switch} |"
    )
