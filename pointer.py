"""Evaluates a trained model with a continuous cache, by dynamic evaluation, or with both.

    python pointer.py --data data/penn --save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500
    python pointer.py --data data/penn --save PTB.pt --tune
    python pointer.py --data data/penn --save PTB.pt --dynamic

The cache is that of Grave, Joulin and Usunier 2016 (1612.04426): a word that followed a state like
the present one is likely to come again. Nothing is trained; nothing is written.
"""

import math
import time
from contextlib import closing
from itertools import product as grid

import torch
from tqdm import tqdm

from data import Corpus, InputError
from dynamic_evaluation import RULES, Rule, read_dynamically, root_mean_square
from flags import Parser, coefficient, count, number, rate, run, steps
from checkpoint import check_vocabulary
from utils import loss_columns
from trained import add_flags, trained
from utils import log

LONGEST = 65_535  # the steps of a window that cuDNN takes
CHUNK = 256  # words whose attention over the cache is computed at once
THETAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
WINDOWS = (50, 100, 200, 500, 1000, 2000, 3785)
# Of dynamic evaluation with segments of 5 words; both grow with the segment.
RATES = {"rms": (3e-5, 5e-5, 7e-5, 1e-4, 2e-4), "sgd": (0.003, 0.01, 0.03, 0.1)}
DECAYS = {"rms": (1e-3, 2e-3, 5e-3), "sgd": (0.0, 1e-3, 5e-3)}


class Cache:
    """The last `window` pairs (state, the word that followed it), of one text.

    A state h_t gives the word w the probability

        p_cache(w) = sum_i a_i [w_i = w],   a = softmax(theta h_t . h_i)

    over the pairs (h_i, w_i) with t - window <= i < t: all words read so far, and no other.
    """

    def __init__(self, window):
        self.window = window
        self.states = self.words = None

    def attend(self, states, words):
        """Adds the pairs of `states` [T, E] and the `words` [T] after them, and looks them up.

        Returns h_t . h_i and w_i, both [T, window], the newest pair last, of the pairs that were
        there before each state; where there are fewer, the word is -1.
        """
        window = self.window
        if self.states is None:
            self.states = states.new_zeros(window, states.size(1))
            self.words = words.new_full((window,), -1)
        all_states, all_words = torch.cat([self.states, states]), torch.cat([self.words, words])
        products = states @ all_states[:-1].t()  # [T, window + T - 1]
        # Row t has its pairs in columns t to t + window - 1: a band, read as a matrix.
        products = products.as_strided((len(states), window), (products.size(1) + 1, 1))
        cached = all_words[:-1].unfold(0, window, 1)  # [T, window]
        self.states, self.words = all_states[-window:], all_words[-window:]
        return products, cached


def cache_weights(products, cached, theta):
    """a [T, window] of what `Cache.attend` returns; 0 where there is no pair."""
    scores = (theta * products).masked_fill(cached < 0, -math.inf)
    return scores.softmax(1).nan_to_num(0.0)  # NaN where there is none at all


def cache_distribution(weights, cached, ntoken):
    """p_cache over the vocabulary, [T, ntoken]; all zero where the cache is empty."""
    distribution = weights.new_zeros(len(weights), ntoken)
    return distribution.scatter_add_(1, cached.clamp(min=0), weights)


def cache_probability(weights, cached, words):
    """p_cache of one word for each state: words [T] -> [T]."""
    return (weights * (cached == words.unsqueeze(1))).sum(1)


def log_mixture(logprob, p_cache, lambdasm, exists):
    """log((1 - lambda) p_model + lambda p_cache); log p_model where the cache is empty.

    `logprob` is log p_model; `exists`, broadcast over it, says where there is a cache.
    """
    share = math.log(lambdasm) if lambdasm else -math.inf
    mixed = torch.logaddexp(logprob + math.log1p(-lambdasm), p_cache.log() + share)
    return torch.where(exists, mixed, logprob)


@torch.no_grad()
def read(params, ids, bptt):
    """Reads `ids` [N] in windows of `bptt` words; what it yields is as `read_dynamically`'s."""
    model, criterion = params
    params.eval()
    device = model.encoder.weight.device
    hidden, bptt = model.init_hidden(1), min(bptt, LONGEST)
    for start in range(0, len(ids) - 1, bptt):
        words = ids[start : start + bptt + 1].to(device)
        output, hidden = model(words[:-1].unsqueeze(1), hidden)
        weight, bias = model.decoder.weight, model.decoder.bias
        yield output, words[1:], criterion.target_logprob(weight, bias, output, words[1:])


def in_chunks(pieces, size=CHUNK):
    """Joins and cuts what `read` or `read_dynamically` yields to pieces of `size` words."""
    waiting, length = [], 0
    for piece in pieces:
        waiting.append(piece)
        length += len(piece[1])
        if length >= size:
            joined = [torch.cat(parts) for parts in zip(*waiting)]
            whole = length - length % size
            yield from zip(*(part[:whole].split(size) for part in joined))
            waiting, length = [[part[whole:] for part in joined]], length - whole
    if length:
        yield [torch.cat(parts) for parts in zip(*waiting)]


@torch.no_grad()
def evaluate_cache(pieces, theta, lambdasm, window):
    """The mean loss in nats with the cache, and without it.

    `pieces`: (states [L, E], words [L], log-probabilities [L]) of one text, in order.
    """
    cache = Cache(window)
    with_cache, without = [], []
    for states, words, logprob in in_chunks(pieces):
        products, cached = cache.attend(states, words)
        weights = cache_weights(products, cached, theta)
        p_cache = cache_probability(weights, cached, words)
        with_cache.append(log_mixture(logprob, p_cache, lambdasm, cached[:, -1] >= 0))
        without.append(logprob)
    return tuple(-torch.cat(logs).cpu().double().mean().item() for logs in (with_cache, without))


@torch.no_grad()
def tune_cache(pieces, thetas, windows):
    """The best (loss in nats, theta, lambda, window) on one text, by one pass over its states.

    For each theta and window the best lambda is found exactly: the mean log-likelihood is concave
    in it.
    """
    cache = Cache(max(windows))
    logprobs, p_caches = [], {pair: [] for pair in grid(thetas, windows)}
    for states, words, logprob in in_chunks(pieces):
        products, cached = cache.attend(states, words)
        logprobs.append(logprob)
        for theta, window in p_caches:
            weights = cache_weights(products[:, -window:], cached[:, -window:], theta)
            p_cache = cache_probability(weights, cached[:, -window:], words)
            p_caches[theta, window].append(p_cache)
    logprob = torch.cat(logprobs).cpu().double()
    exists = torch.arange(len(logprob)) > 0
    found = []
    for (theta, window), parts in p_caches.items():
        p_cache = torch.cat(parts).cpu().double()
        lambdasm = best_lambda(logprob.exp()[exists], p_cache[exists])
        loss = -log_mixture(logprob, p_cache, lambdasm, exists).mean().item()
        found.append((loss, theta, lambdasm, window))
    return min(found)


def best_lambda(p_model, p_cache, steps=30):
    """The lambda in [0, 1) that maximizes the mean of log((1 - lambda) p_model + lambda p_cache).

    Where its derivative, which falls, passes through zero; by bisection. Both [N], float64.
    """
    low, high = 0.0, 1.0
    difference = p_cache - p_model
    for _ in range(steps):
        middle = (low + high) / 2
        slope = (difference / (p_model + middle * difference)).mean().item()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return low


class Reader:
    """Reads a text in the way that the flags ask for, with weights that move or stay."""

    def __init__(self, params, corpus, args):
        self.params, self.args = params, args
        self.words = 0  # how many the last reading came to
        self.statistics = None
        if args.dynamic == "rms":
            log("Measuring the gradients on the training split")
            self.statistics = root_mean_square(params, corpus.train, args.statistics)

    def __call__(self, ids, lr=None, decay=None, seconds=math.inf):
        """Yields (states [L, E], words [L], log-probabilities [L]) of `ids` [N], in order.

        Of as many words as `seconds` allow, and of the first ones in any case.
        """
        args = self.args
        if args.dynamic:
            lr, decay = args.lr if lr is None else lr, args.decay if decay is None else decay
            rule = Rule(self.params, args.dynamic, lr, decay, args.epsilon, self.statistics)
            pieces = read_dynamically(self.params, ids, args.segment, rule)
        else:
            pieces = read(self.params, ids, args.bptt)
        self.words, end = 0, time.monotonic() + seconds
        bar = tqdm(total=len(ids) - 1, disable=None, leave=False, unit=" words")
        with bar, closing(pieces):  # which puts the weights back
            for piece in pieces:
                self.words += len(piece[1])
                yield piece
                bar.update(len(piece[1]))
                if time.monotonic() > end:
                    break


def mean_loss(pieces):
    """The mean loss in nats of what a reader yields, without a cache."""
    return -torch.cat([logprob for _, _, logprob in pieces]).cpu().double().mean().item()


def tune(reader, ids, args):
    """Sets the flags to what does best on the text `ids`; logs what was tried and what was best.

    The rate and the decay of dynamic evaluation on the first `args.tune_words` words, then the
    cache's theta, lambda and window. What the flags had before is among what is tried.
    """
    if args.dynamic:
        part, factor = ids[: args.tune_words + 1], args.segment / 5
        rates = sorted({args.lr, *(factor * lr for lr in RATES[args.dynamic])})
        decays = sorted({args.decay, *(factor * decay for decay in DECAYS[args.dynamic])})
        tried = []
        for lr, decay in grid(rates, decays):
            loss = mean_loss(reader(part, lr, decay))
            log(f"| lr {lr:7.2g} | decay {decay:7.2g} | {loss_columns(loss, 'valid ')}")
            tried.append((loss if math.isfinite(loss) else math.inf, lr, decay))
        _, args.lr, args.decay = min(tried)
        log(f"Best on {len(part) - 1:,} words of valid: --lr {args.lr:g} --decay {args.decay:g}")
    if args.lambdasm:
        thetas = sorted({args.theta, *THETAS})
        windows = sorted({min(window, len(ids)) for window in (args.window, *WINDOWS)})
        _, args.theta, args.lambdasm, args.window = tune_cache(reader(ids), thetas, windows)
        log(
            f"Best on valid: --theta {args.theta:g} --lambdasm {args.lambdasm:.4f} "
            f"--window {args.window}" + " (the cache does not help)" * (not args.lambdasm)
        )


def report(reader, ids, split, args):
    """Logs the loss of one split by the model alone and in the ways that were asked for.

    Returns the columns of the last of them.
    """
    window = min(args.window, len(ids))  # the same, in less memory
    pieces = reader(ids, seconds=args.seconds or math.inf)
    loss, without = evaluate_cache(pieces, args.theta, args.lambdasm, window)
    found = {"dynamic" if args.dynamic else "model alone": without}
    if args.dynamic:
        read_alone = read(reader.params, ids[: reader.words + 1], args.bptt)
        found = {"model alone": mean_loss(read_alone), **found}
    if args.lambdasm:
        found["dynamic and cache" if args.dynamic else "with cache"] = loss
    part = f" | {reader.words:,} of {len(ids) - 1:,} tokens" if args.seconds else ""
    for name, value in found.items():
        columns = loss_columns(value, f"{split} ") + part
        log(f"| {name} | {columns}")
    if args.dynamic and not without < math.log(len(reader.params[0].decoder.bias)) + 1:
        raise InputError(f"--lr {args.lr:g}: dynamic evaluation has diverged; lower it")
    return columns


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", default="data/penn",
        help="the corpus that the model was trained on (default: data/penn)")
    add("--save", required=True, metavar="CHECKPOINT", help="the trained model")
    add("--window", type=count, default=500, help="pairs in the cache (default: 500)")
    add("--theta", type=coefficient, default=1.0,
        help="how much the likeness of states counts (default: 1)")
    add("--lambdasm", type=rate, default=0.1,
        help="the cache's share of the mixture, 0 for no cache (default: 0.1)")
    add("--dynamic", choices=RULES, nargs="?", const="rms",
        help="dynamic evaluation, by the rule rms (if none is named) or sgd")
    add("--lr", type=coefficient, help="its learning rate (default: 5e-5 with rms, 0.01 with sgd)")
    add("--decay", type=rate, help="its decay (default: 0.002 with rms, 0.001 with sgd)")
    add("--epsilon", type=number(float, 0, open_low=True), default=2e-5,
        help="what rms adds to the root mean square of a gradient (default: 2e-5)")
    add("--segment", type=steps, default=5, help="words between its steps (default: 5)")
    add("--statistics", type=count, metavar="N",
        help="windows of training text, 100 times 5 words, on which rms measures gradients "
             "(default: all)")
    add("--tune", action="store_true",
        help="first search theta, lambda and the window (and before them the rate and the decay "
             "of dynamic evaluation) on the validation split")
    add("--tune-words", type=count, default=20_000, metavar="N",
        help="words of the validation split that each rate and decay are tried on "
             "(default: 20000)")
    add("--split", choices=["valid", "test"], nargs="+", default=["valid", "test"],
        help="what to evaluate (default: both)")
    add("--seconds", type=number(float, 0, open_low=True), metavar="N",
        help="stop reading a split after N seconds, and report on what was read (default: read "
             "all; so does --tune)")
    add("--bptt", type=count, default=2000, help="words read at once (default: 2000)")
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.tune and not (args.lambdasm or args.dynamic):
        parser.error("--lambdasm 0: there is nothing to tune; leave it out")
    defaults = {"rms": (5e-5, 2e-3), "sgd": (0.01, 1e-3)}.get(args.dynamic, (None, None))
    for flag, default in zip(("lr", "decay"), defaults):
        if getattr(args, flag) is None:
            setattr(args, flag, default)
        elif not args.dynamic:
            parser.error(f"--{flag}: belongs to --dynamic; give that too")
    return args


def main(argv=None):
    args = parse_args(argv)
    params, dictionary = trained(args.save, args)
    corpus = Corpus(args.data)
    check_vocabulary(dictionary.idx2word, corpus, args.data, args.save)
    reader = Reader(params, corpus, args)
    if args.tune:
        tune(reader, corpus.valid, args)
    for split in args.split:
        columns = report(reader, getattr(corpus, split), split, args)
    rule = "=" * 89
    log(f"{rule}\n| End of training | {columns}\n{rule}")
    return 2 if log.failed else 0


if __name__ == "__main__":
    run(main)
