"""Times the cache against plain evaluation, and generation against a loop over nn.LSTM.

    PYTHONPATH=. python records/use/speed.py PTB.pt data/penn

What is compared is interleaved, so that a noisy machine disturbs both alike; medians are printed.
`--random` makes an untrained model of the published size instead of reading a checkpoint.
"""

import sys
import time
from statistics import median

import torch
from torch import nn

from cpu_kernels import keep_freed_memory
from data import Corpus
from dynamic_evaluation import read
from language_model import LanguageModel
from model import RNNModel
from pointer import evaluate_cache
from splitcross import SplitCrossEntropyLoss
from train import evaluate
from checkpoint import build_params, read_checkpoint


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def plain_loop(params, words):
    """The loop of the reference's generate.py, over the layers' own nn.LSTM."""
    model, _ = params
    hidden, word = model.init_hidden(1), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(words):
            output, hidden = model(word, hidden)
            weights = model.decoder(output).squeeze().exp()
            word.fill_(torch.multinomial(weights, 1)[0])


def main(path, data, part=20_000, times=5, words=200):
    keep_freed_memory()
    corpus = Corpus(data)
    if path == "--random":
        model = RNNModel("LSTM", len(corpus.dictionary), 400, 1150, 3, tie_weights=True)
        params = nn.ModuleList([model, SplitCrossEntropyLoss(400)])
    else:
        params = build_params(read_checkpoint(path))
    params.eval()
    ids = corpus.valid[: part + 1]
    ways = {
        "evaluation": lambda: evaluate(params, ids, 1, 2000),
        "cache": lambda: evaluate_cache(read(params, ids, 2000), 1.0, 0.1, 500),
    }
    taken = {name: [] for name in ways}
    for i in range(times + 1):
        for name, way in ways.items():
            elapsed = seconds(way)
            if i:  # the first round warms up
                taken[name].append(elapsed)
    base, cached = median(taken["evaluation"]), median(taken["cache"])
    print(f"{part} words of valid at batch 1: evaluation {base:.2f} s, with a cache of 500 "
          f"{cached:.2f} s: {cached / base:.2f} times as long")
    ours, plain = [], []
    lm = LanguageModel(params, corpus.dictionary)
    for _ in range(times):
        ours.append(words / seconds(lambda: list(lm.generate(words=words, seed=1))))
        plain.append(words / seconds(lambda: plain_loop(params, words)))
    print(f"generation: {median(ours):.0f} words/s, a loop over nn.LSTM {median(plain):.0f}: "
          f"{median(ours) / median(plain):.1f} times as fast")


if __name__ == "__main__":
    main(*sys.argv[1:])
