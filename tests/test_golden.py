"""Golden trajectories: whole runs of main.py against a restatement in float64.

The restatement follows Merity et al. 2017 (1708.02182) and imports nothing from the project. The
two share the initial weights and, with dropout, the masks that the run drew; the restatement
applies them itself. Every training and validation loss and the test loss must agree.
"""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import locked_dropout
import main
import model
import train
import weight_drop

TOLERANCE = 1e-5  # relative: float32 against float64 over some 150 steps
DROPOUTS = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")
COMMON = {
    "emsize": 10, "nhid": 14, "batch_size": 4, "bptt": 12, "clip": 0.25, "wdecay": 1e-4,
    "alpha": 0.3, "beta": 0.6, "seed": 1,
}
CASES = {
    # In epoch 3 the loss is above the best so far, but not above the best of all but the last.
    "LSTM": {
        **COMMON, "nlayers": 2, "lr": 22.0, "epochs": 6, "nonmono": 1,
        **dict.fromkeys(DROPOUTS, 0.0),
    },
    "GRU": {
        **COMMON, "nlayers": 3, "lr": 3.0, "epochs": 7, "nonmono": 0, "dropout": 0.3,
        "dropouth": 0.2, "dropouti": 0.25, "dropoute": 0.1, "wdrop": 0.4,
    },
}


# ---------------------------------------------------------------- the restatement


def read_corpus(folder):
    """The three splits as lists of ids, in order of first occurrence; each line ends in <eos>."""
    ids, splits = {}, {}
    for split in ("train", "valid", "test"):
        lines = (folder / f"{split}.txt").read_text().splitlines()
        words = [word for line in lines for word in [*line.split(), "<eos>"]]
        splits[split] = [ids.setdefault(word, len(ids)) for word in words]
    return splits


def lstm_step(from_x, state, w_hh, b_hh):
    """from_x is W x + b of all gates, [B, 4 H] here and [B, 3 H] in a GRU."""
    h, c = state
    i, f, g, o = (from_x + h @ w_hh.T + b_hh).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return h, (h, c)


def gru_step(from_x, state, w_hh, b_hh):
    (h,) = state
    x_r, x_z, x_n = from_x.chunk(3, 1)
    h_r, h_z, h_n = (h @ w_hh.T + b_hh).chunk(3, 1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    h = (1 - z) * torch.tanh(x_n + r * h_n) + z * h
    return h, (h,)


class Restatement:
    """AWD-LSTM in plain float64 operations; `weights` is [embedding, decoder bias, *layers].

    Each layer has four weights: input matrix, recurrent matrix, input bias, recurrent bias.
    `masks` is an iterator over (kind, mask) in the order of use.
    """

    def __init__(self, kind, case, weights, masks):
        self.step, self.states = {"LSTM": (lstm_step, 2), "GRU": (gru_step, 1)}[kind]
        self.weights = [weight.double().requires_grad_() for weight in weights]
        self.case, self.masks = case, masks

    def zero_state(self, columns):
        sizes = [w_hh.shape[1] for w_hh in self.weights[3::4]]
        return [tuple(torch.zeros(columns, size).double() for _ in range(self.states))
                for size in sizes]

    def drop(self, kind, x, rate):
        """x times the next mask, which must be of this kind, shape and rate."""
        if not rate:
            return x
        found, mask = next(self.masks, (None, None))
        assert found == kind
        assert mask.shape == ((len(x), 1) if kind == "word" else x.shape[-2:])
        survivors = mask[mask != 0]
        torch.testing.assert_close(survivors, torch.full_like(survivors, 1 / (1 - rate)),
                                   rtol=1e-4, atol=0.0)  # weight drop rounds its rate
        return x * mask

    def forward(self, weights, words, state, training):
        """words [T, B] -> logits [T * B, V], state, raw and dropped output [T, B, E]."""
        embedding, decoder_bias, *layers = weights
        rates = {rate: getattr(self.case, rate) * training for rate in DROPOUTS}
        x = self.drop("word", embedding, rates["dropoute"])[words]
        x = self.drop("feature", x, rates["dropouti"])
        new = []
        for w_ih, w_hh, b_ih, b_hh in zip(*(layers[i::4] for i in range(4))):
            w_hh = self.drop("weight", w_hh, rates["wdrop"])
            outputs, s = [], state[len(new)]
            for from_x in x @ w_ih.T + b_ih:
                h, s = self.step(from_x, s, w_hh, b_hh)
                outputs.append(h)
            new.append(s)
            raw = torch.stack(outputs)
            is_last = len(new) == self.case.nlayers
            x = self.drop("feature", raw, rates["dropout" if is_last else "dropouth"])
        return x.flatten(0, 1) @ embedding.T + decoder_bias, new, raw, x


def cross_entropy(logits, targets):
    """Of each target, in nats."""
    top = logits.max(1, keepdim=True).values
    normalizer = top.squeeze(1) + (logits - top).exp().sum(1).log()
    return normalizer - logits[torch.arange(len(targets)), targets]


def evaluate(net, weights, ids, columns):
    """The mean loss of all tokens but the first, read in columns that start from a zero state."""
    ids, losses = torch.tensor(ids), []
    for places in np.array_split(np.arange(len(ids) - 1), columns):
        with torch.no_grad():
            logits, *_ = net.forward(weights, ids[places][:, None], net.zero_state(1), False)
        losses += cross_entropy(logits, ids[places + 1]).tolist()
    return math.fsum(losses) / len(losses)


def window_length(random, bptt):
    """Section 4.1: N(bptt, 5) with probability 0.95, else N(bptt / 2, 5); 5 to bptt + 25."""
    mean = bptt if random.random_sample() < 0.95 else bptt / 2
    return min(max(int(random.normal(mean, 5)), 5), bptt + 25)


def train_epoch(net, source, random, case, average):
    """One epoch of SGD, whose iterates are added to the list `average` unless that is None."""
    row, losses, state = 0, [], net.zero_state(case.batch_size)
    while row < len(source) - 1:
        length = min(window_length(random, case.bptt), len(source) - 1 - row)
        words, targets = source[row : row + length], source[row + 1 : row + length + 1].flatten()
        state = [tuple(s.detach() for s in layer) for layer in state]
        logits, state, raw, dropped = net.forward(net.weights, words, state, True)
        loss = cross_entropy(logits, targets).mean()
        penalty = case.alpha * (dropped**2).mean()
        if length > 1:
            penalty = penalty + case.beta * ((raw[1:] - raw[:-1]) ** 2).mean()
        gradients = torch.autograd.grad(loss + penalty, net.weights)
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients))
        shrink = min(1.0, case.clip / (norm + 1e-6))
        rate = case.lr * length / case.bptt
        with torch.no_grad():
            for weight, gradient in zip(net.weights, gradients):
                weight -= rate * (shrink * gradient + case.wdecay * weight)
        if average is not None:
            average.append([weight.detach().clone() for weight in net.weights])
        losses += [loss.item()] * (length * case.batch_size)
        row += length
    return math.fsum(losses) / len(losses)


def trajectory(kind, case, folder, weights, masks):
    """[(training loss, validation loss, whether averaged) of each epoch], the test loss."""
    splits = read_corpus(folder)
    net = Restatement(kind, case, weights, masks)
    random = np.random.RandomState(case.seed)
    rows = len(splits["train"]) // case.batch_size
    source = torch.tensor(splits["train"][: rows * case.batch_size]).view(case.batch_size, rows).T
    epochs, logs, average, best = [], [], None, None
    for _ in range(case.epochs):
        train_loss = train_epoch(net, source, random, case, average)
        evaluated = [weight.detach().clone() for weight in net.weights]
        if average:
            evaluated = [sum(iterates) / len(iterates) for iterates in zip(*average)]
        loss = evaluate(net, evaluated, splits["valid"], 10)
        epochs.append((train_loss, loss, average is not None))
        if not logs or loss < min(logs):
            best = evaluated
        before = logs[: len(logs) - case.nonmono] if len(logs) > case.nonmono else []
        if average is None and before and loss > min(before):
            average = []
        logs.append(loss)
    return epochs, evaluate(net, best, splits["test"], 1)


# ---------------------------------------------------------------- the run, and what it shares


def write_corpus(folder):
    """400 words; the next word is one of five likely ones, or any. valid fills two windows."""
    generator = np.random.default_rng(11)
    frequency = 1 / np.arange(1, 401) ** 0.7
    frequency /= frequency.sum()
    following = generator.choice(400, size=(400, 5), p=frequency)
    for split, lines in (("train", 121), ("valid", 211), ("test", 15)):
        text = []
        for _ in range(lines):
            word, line = generator.choice(400, p=frequency), []
            for _ in range(generator.integers(6, 13)):
                line.append(f"w{word}")
                word = generator.choice(400, p=frequency)
                if generator.random() < 0.6:
                    word = following[int(line[-1][1:]), generator.integers(5)]
            text.append(" ".join(line))
        (folder / f"{split}.txt").write_text("\n".join(text) + "\n")


def spy_on_weights(monkeypatch):
    """A list that will hold the weights with which the run begins."""
    weights, fit = [], train.Trainer.fit

    def spying(trainer):
        model, _ = trainer.params
        initial = [model.encoder.weight, model.decoder.bias, *model.rnns.parameters()]
        weights.extend(weight.detach().clone() for weight in initial)
        fit(trainer)

    monkeypatch.setattr(train.Trainer, "fit", spying)
    return weights


def spy_on_masks(monkeypatch):
    """A list that will hold (kind, mask) for every dropout of the run, in order.

    A function that drew random numbers is called again with the same numbers, on ones: its result
    is the mask. The run itself is not changed.
    """
    masks = []

    def spy(target, name, kind, on_ones):
        original = getattr(target, name)

        def spying(*args, **kwargs):
            before = torch.get_rng_state()
            result = original(*args, **kwargs)
            after = torch.get_rng_state()
            if not torch.equal(before, after):
                torch.set_rng_state(before)
                with torch.no_grad():
                    masks.append((kind, on_ones(original, *args, **kwargs).double()))
                torch.set_rng_state(after)
            return result

        monkeypatch.setattr(target, name, spying)

    def of_weight(original, weight, *args, **kwargs):
        return original(torch.ones_like(weight), *args, **kwargs)

    def of_words(original, embed, words, *args, **kwargs):
        ones = torch.nn.Embedding.from_pretrained(torch.ones(embed.num_embeddings, 1))
        return original(ones, torch.arange(embed.num_embeddings), *args, **kwargs)

    def of_features(original, module, x, *args, **kwargs):
        mask = original(module, torch.ones_like(x), *args, **kwargs)
        return mask[0]  # one for all time steps

    spy(weight_drop, "drop_weight", "weight", of_weight)
    spy(model, "embedded_dropout", "word", of_words)
    spy(locked_dropout.LockedDropout, "forward", "feature", of_features)
    return masks


@pytest.mark.parametrize("kind", CASES)
def test_a_run_matches_the_restatement(kind, tmp_path, monkeypatch, capsys):
    folder, save = tmp_path / "corpus", tmp_path / "golden.pt"
    folder.mkdir()
    write_corpus(folder)
    weights, masks = spy_on_weights(monkeypatch), spy_on_masks(monkeypatch)
    flags = [f"--{flag}={value}" for flag, value in CASES[kind].items()]
    assert main.main([f"--data={folder}", f"--model={kind}", "--recipe=published", *flags,
                      f"--save={save}", "--device=cpu"]) == 0
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "golden.pt.jsonl").read_text().splitlines()]

    pending = iter(masks)
    case = SimpleNamespace(**CASES[kind])
    epochs, test_loss = trajectory(kind, case, folder, weights, pending)

    for record, (train_loss, valid_loss, averaging) in zip(records, epochs, strict=True):
        assert record["train_loss"] == pytest.approx(train_loss, rel=TOLERANCE)
        assert record["valid_loss"] == pytest.approx(valid_loss, rel=TOLERANCE)
        assert record["averaging"] == averaging
    # The log prints two decimals; the perplexity is high enough to resolve the loss to 1e-5.
    test_ppl = float(re.search(r"End of training \|.* test ppl +([\d.]+)", printed)[1])
    assert test_ppl == pytest.approx(math.exp(test_loss), abs=0.0051, rel=0)
    assert 0.0051 / test_ppl / test_loss < TOLERANCE
    assert next(pending, None) is None  # the run drops nothing more
    # The switch came neither at once nor at the end.
    assert 2 < [averaging for *_, averaging in epochs].index(True) < len(epochs) - 1
