"""The search for GRU's rates: two epochs of a reduced model, with changes that are not flags.

    python records/gru/sweep.py lr=20 recurrent=0.5 biases=0.01 unigram=1

Penn Treebank (data/penn), emsize 200, nhid 400, three layers, batch 20, bptt 70, dropouts as
published, seed 141. Every 50 batches it prints the mean loss, the mean gradient norm before
clipping, and the root mean square of the layers' last states. SETTINGS says what can be given.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bidirectional import make_model
from data import Corpus, batchify, get_batch, unigram_frequencies
from splitcross import SplitCrossEntropyLoss
from train import Objective, evaluate, random_seq_len
from utils import repackage_hidden

SETTINGS = {
    "lstm": 0,  # 1: an LSTM instead
    "lr": 10,  # the learning rate of all weights but those below
    "recurrent": 1,  # the rate of the recurrent layers' weights, as a share of lr
    "top": 1,  # a further factor of the last layer's rate, and a factor of its gradient
    "biases": 1,  # the rate of the recurrent layers' biases, as a share of lr
    "later": 0,  # if not 0, replaces `biases` from batch `at` on
    "at": 400,
    "slower": 1,  # a factor of all rates from the batch `at` on
    "grow": 0,  # if not 0, what `recurrent` has grown to at batch 600, from batch 300 on
    # Factors of gradients before clipping; a small one leaves more of the norm to the others:
    "all_before": 1,  # of the recurrent layers'
    "biases_before": 1,  # of their biases'
    "hidden_before": 1,  # of weight_hh's
    # Initial values:
    "scale": 1,  # a factor of the recurrent layers' weights and biases
    "inputs": 1,  # a further factor of weight_ih
    "update": 0,  # the bias of the update gates, which keep the state where it is large
    "chrono": 0,  # if not 0, that bias is log(u), u uniform in [1, chrono] (1804.11188)
    "unigram": 0,  # 1: the decoder's bias is at the words' log frequencies
    "alpha": 2,  # AR's strength
    "beta": 1,  # TAR's
    "adam": 0,  # 1: Adam instead of SGD
    "steps": math.inf,  # end after so many
    "epochs": 2,
}
CLIP, BPTT, BATCH, EMSIZE, NHID, SEED = 0.25, 70, 20, 200, 400, 141


def main(argv):
    s = {**SETTINGS, **{name: float(value) for name, value in (word.split("=") for word in argv)}}
    assert set(s) == set(SETTINGS), f"there are {', '.join(SETTINGS)}"
    assert not (s["lstm"] and (s["update"] or s["chrono"])), "an LSTM has no update gate"
    corpus = Corpus("data/penn")
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    kind = "LSTM" if s["lstm"] else "GRU"
    ntoken = len(corpus.dictionary)
    model = make_model(kind, ntoken, EMSIZE, NHID, 3, 0.4, 0.25, 0.4, 0.1, 0.5, True)
    params = nn.ModuleList([model, SplitCrossEntropyLoss(EMSIZE, [])])
    named = [(name, p) for name, p in model.named_parameters() if name.startswith("rnns")]
    last = f"rnns.{len(model.rnns) - 1}."
    recurrent = [p for _, p in named]
    biases = [p for name, p in named if "bias" in name]
    hidden = [p for name, p in named if "weight_hh" in name]
    tops = [p for name, p in named if name.startswith(last)]
    others = [p for p in params.parameters() if all(p is not q for q in recurrent)]
    with torch.no_grad():
        for weight in recurrent:
            weight.mul_(s["scale"])
        for name, weight in named:
            if "weight_ih" in name:
                weight.mul_(s["inputs"])
            if "bias_ih" in name:
                gates = weight.chunk(3)[1]
                gates += s["update"]
                if s["chrono"]:
                    gates += torch.empty_like(gates).uniform_(1, s["chrono"]).log()
        if s["unigram"]:
            model.decoder.bias.copy_(unigram_frequencies(corpus.train, ntoken).log())
    groups = [{"params": others}]
    for weight in recurrent:
        share = s["top"] if any(weight is p for p in tops) else 1
        is_bias = any(weight is p for p in biases)
        groups.append({"params": [weight], "share": share, "is_bias": is_bias})
    optimizer_type = torch.optim.Adam if s["adam"] else torch.optim.SGD
    optimizer = optimizer_type(groups, lr=s["lr"], weight_decay=1.2e-6)
    source, valid = batchify(corpus.train, BATCH), corpus.valid
    objective, state, row, epoch = Objective(params), model.init_hidden(BATCH), 0, 0
    losses, norms, begun, step = [], [], time.time(), 0
    params.train()
    while epoch < s["epochs"] and step != s["steps"]:
        data, targets = get_batch(source, row, None, seq_len=random_seq_len(BPTT))
        row += len(data)
        state = repackage_hidden(state)
        optimizer.zero_grad()
        total, loss, state = objective(data, targets, state, s["alpha"], s["beta"])
        total.backward()
        for factor, weights in (
            (s["all_before"], recurrent), (s["top"], tops), (s["biases_before"], biases),
            (s["hidden_before"], hidden),
        ):
            for weight in weights:
                weight.grad.mul_(factor)
        norms.append(nn.utils.clip_grad_norm_(params.parameters(), CLIP).item())
        losses.append(loss.item())
        share = s["recurrent"]
        if s["grow"]:
            share += (s["grow"] - share) * min(1, max(0, step - 300) / 300)
        slow = s["later"] if s["later"] and step >= s["at"] else s["biases"]
        for group in optimizer.param_groups:
            group["lr"] = s["lr"] * len(data) / BPTT * (s["slower"] if step >= s["at"] else 1)
            if "share" in group:
                group["lr"] *= group["share"] * (slow if group["is_bias"] else share)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            first = [part[0] if isinstance(part, tuple) else part for part in state]
            sizes = ", ".join(f"{part.detach().pow(2).mean().sqrt():.3f}" for part in first)
            means = f"loss {np.mean(losses[-50:]):.3f}, norm {np.mean(norms[-50:]):.2f}"
            print(f"batch {step}: {means}, states {sizes}, {time.time() - begun:.0f} s", flush=True)
        if row >= len(source) - 1 or step == s["steps"]:
            params.eval()
            loss = evaluate(params, valid, 10, BPTT)
            print(f"after {step} batches: validation perplexity {math.exp(loss):.2f}", flush=True)
            params.train()
            row, epoch, state = 0, epoch + 1, model.init_hidden(BATCH)


if __name__ == "__main__":
    main(sys.argv[1:])
