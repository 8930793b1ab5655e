"""The validation perplexity of a model whose logits are multiplied by a constant.

    PYTHONPATH=. python records/fast/temperature.py PTB.pt data/penn
"""

import sys

import torch
from torch.nn import functional as F

from checkpoint import load
from data import Corpus, batchify
from utils import perplexity


@torch.inference_mode()
def main(checkpoint, data):
    model, _ = load(checkpoint)
    text = batchify(Corpus(data).valid.long(), 10)
    losses = dict.fromkeys((0.85, 0.9, 0.93, 0.95, 1.0, 1.05), 0.0)
    hidden, read = model.init_hidden(10), 0
    while read < len(text) - 1:
        window = text[read : read + 501]
        output, hidden = model(window[:-1], hidden)
        logits, targets = model.decoder(output), window[1:].flatten()
        for scale in losses:
            losses[scale] += F.cross_entropy(logits * scale, targets, reduction="sum").item()
        read += len(window) - 1
    for scale, loss in losses.items():
        print(f"logits times {scale:.2f}: valid ppl {perplexity(loss / read / 10):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
