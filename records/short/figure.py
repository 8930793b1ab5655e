"""Draws the short recipe's runs at full size over the published one's curve: figure.py OUT.png.

Run from the top of the checkout, with PYTHONPATH=. set.
"""

import argparse
from pathlib import Path

from report.plot import draw, read_run
from report.results import read_report

HERE = Path(__file__).parent
LAST = 26  # epochs of the report's curve

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("out", metavar="OUT.png")
args = parser.parse_args()
runs = {
    f"short recipe, {epochs} epochs": read_run(HERE / f"full-{epochs}.pt.jsonl")
    for epochs in (2, 4, 8)
}
reference = {"LSTM, published recipe": read_report()["ptb-lstm"][:LAST]}
figure = draw(runs, reference=reference)
figure.savefig(args.out)
