"""The validation perplexity of the mean of several weights of one run.

    PYTHONPATH=. python records/fast/mean.py PTB.pt data/penn STATE ...

STATE: copies of PTB.pt.state, made at the end of epochs.
"""

import sys

import torch

from checkpoint import build_params, read_checkpoint
from data import Corpus
from train import evaluate
from utils import perplexity


def main(checkpoint, data, *states):
    params = build_params(read_checkpoint(checkpoint))
    weights = [torch.load(path, weights_only=True)["model"] for path in states]
    params[0].load_state_dict({
        name: torch.stack([state[name] for state in weights]).mean(0) for name in weights[0]
    })
    loss = evaluate(params, Corpus(data).valid, 10, 2000)
    print(f"mean of {' '.join(states)}: valid ppl {perplexity(loss):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
