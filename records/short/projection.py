"""Projects the short recipe to budgets that were not run: projection.py PERPLEXITY BUDGET ...

Fits loss = floor + scale * budget^-power, and the same for the perplexity, to the best validation
losses in the files full-BUDGET.pt.jsonl beside it. Prints the fitted values for larger budgets, the
budget that reaches PERPLEXITY and, with four budgets or more, a prediction of the largest from the
others. A projection, not a measurement: only these curves support it.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
AHEAD = (16, 32, 64, 100)
POWERS = np.linspace(0.01, 3, 3000)


def path_of(budget):
    return HERE / f"full-{budget}.pt.jsonl"


def best(budget):
    """The lowest validation loss, in nats, of the run of so many epochs."""
    lines = path_of(budget).read_text().splitlines()
    return min(json.loads(line)["valid_loss"] for line in lines)


def fit(budgets, values):
    """The least squares (floor, scale, power): linear in the first two for each of POWERS."""

    def solve(power):
        terms = np.stack([np.ones(len(budgets)), np.array(budgets, float) ** -power], 1)
        (floor, scale), *_ = np.linalg.lstsq(terms, np.array(values), rcond=None)
        error = np.square(terms @ [floor, scale] - values).sum()
        return error, floor, scale, power

    return min(map(solve, POWERS))[1:]


def report(name, budgets, values, to_perplexity, target):
    floor, scale, power = fit(budgets, values)

    def curve(budget):
        return to_perplexity(floor + scale * budget ** -power)

    ahead = ", ".join(f"{n}: {curve(n):.2f}" for n in AHEAD if n > max(budgets))
    meets = next((f"{n} epochs" for n in range(1, 10_000) if curve(n) <= target), "no budget")
    print(f"{name} = {floor:.3f} + {scale:.3f} * budget^-{power:.3f} | {ahead} | "
          f"floor {to_perplexity(floor):.2f} | {target:g} at {meets}")
    if len(budgets) > 3:
        floor, scale, power = fit(budgets[:-1], values[:-1])
        last, measured = budgets[-1], to_perplexity(values[-1])
        said = to_perplexity(floor + scale * last ** -power)
        print(f"  without the last: {last}: {said:.2f}, measured {measured:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=float, metavar="PERPLEXITY")
    parser.add_argument("budgets", nargs="+", type=int, metavar="BUDGET", help="in epochs")
    args = parser.parse_args()
    target, budgets = args.target, sorted(set(args.budgets))
    if len(budgets) < 3:
        parser.error("BUDGET: give three or more; the fit has three parameters")
    for budget in budgets:
        if not path_of(budget).exists():
            parser.error(f"BUDGET {budget}: there is no {path_of(budget)}")
    losses = [best(budget) for budget in budgets]
    print(", ".join(f"{n}: {math.exp(loss):.2f}" for n, loss in zip(budgets, losses)))
    report("loss", budgets, losses, math.exp, target)
    report("perplexity", budgets, [math.exp(loss) for loss in losses], float, target)
