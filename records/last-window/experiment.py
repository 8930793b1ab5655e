"""What does the last window of an epoch do to the validation loss that is printed after it?

    python records/last-window/experiment.py PTB.pt data/penn

The reference scales each step's rate by the window length that was *drawn*. The last window of an
epoch is cut where the text ends: with the published seed its lengths are 11, 24 and 78 of about 70
in epochs 1 to 3, and the cut ones take a step at the full rate on few tokens, right before the
evaluation. Here the rate is scaled by the actual length. From a number of points along one
trajectory, this takes that last step both ways and evaluates each.
"""

import copy
import math
import statistics
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from data import Corpus, batchify, get_batch
from train import Objective, evaluate, make_optimizer, train_step
from checkpoint import build_params, read_checkpoint
from model import DROPOUTS

POINTS, STEPS_BETWEEN, VALID_TOKENS = 8, 3, 10_000

checkpoint = read_checkpoint(sys.argv[1])
corpus = Corpus(sys.argv[2])
args = Namespace(**checkpoint["flags"])
print(f"checkpoint: epoch {checkpoint['epoch']}, valid loss {checkpoint['valid_loss']:.4f}")
torch.manual_seed(0)
params = build_params(checkpoint, **{rate: getattr(args, rate) for rate in DROPOUTS})
optimizer = make_optimizer(params, args)
source = batchify(corpus.train, args.batch_size)
tail = source[-25:]  # the last 24 predictions of the training text, as in epoch 2
hidden = params[0].init_hidden(args.batch_size)


def valid(params):
    return evaluate(params, corpus.valid[:VALID_TOKENS], 10, 70)


def after_last_window(scale):
    """The validation loss after one more step, on `tail`, at `scale` times the full rate."""
    twin = copy.deepcopy(params)
    # train_step multiplies the rate by 24 / 70; undo that, and apply the scale asked for.
    scaled = Namespace(**{**vars(args), "lr": args.lr * scale * 70 / 24})
    words, targets = get_batch(tail, 0, args)
    torch.manual_seed(point)
    twin.train()
    train_step(Objective(twin), make_optimizer(twin, scaled), words, targets, hidden, args)
    return valid(twin)


columns = {"before": [], "scaled by actual length": [], "full rate": []}
i = 0
for point in range(POINTS):
    for _ in range(STEPS_BETWEEN):
        params.train()
        words, targets = get_batch(source, i, args)
        _, hidden = train_step(Objective(params), optimizer, words, targets, hidden, args)
        i += len(words)
    losses = [valid(params), after_last_window(24 / 70), after_last_window(67 / 70)]
    for column, loss in zip(columns.values(), losses):
        column.append(loss)
    print(f"point {point}: " + ", ".join(f"{math.exp(loss):.2f}" for loss in losses), flush=True)
for name, losses in columns.items():
    print(
        f"{name}: valid ppl {math.exp(statistics.mean(losses)):.2f} (geometric mean), "
        f"standard deviation {100 * statistics.stdev(losses):.2f}%"
    )
