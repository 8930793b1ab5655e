"""Evaluates a trained model with a continuous cache, by dynamic evaluation, or with both.

    python pointer.py --data data/penn --save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500
    python pointer.py --data data/penn --save PTB.pt --tune
    python pointer.py --data data/penn --save PTB.pt --dynamic

The cache (Grave, Joulin and Usunier 2016, 1612.04426) gives more probability to a word that
followed a state like the present one. Nothing is trained, and no file is written.

`pieces` are the parts of a text in order, each (states [L, E], words [L] that follow them, their
log-probabilities in nats [L]): what dynamic_evaluation.read yields.
"""

import math
import time
from contextlib import closing
from itertools import product

import torch
from tqdm import tqdm

from checkpoint import check_corpus
from data import Corpus
from dynamic_evaluation import Rule, read, root_mean_square
from flags import (
    Parser, add_device_flags, coefficient, count, load_for_use, number, rate, run_command, steps,
)
from utils import log, loss_columns

LONGEST = 65_535  # time steps that cuDNN takes at once
CHUNK = 256  # words whose attention over the cache is computed at once
# What --tune tries. The rates and decays fit segments of 5 words; both grow with the segment.
THETAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
WINDOWS = (50, 100, 200, 500, 1000, 2000, 3785)
RATES = {"rms": (3e-5, 5e-5, 7e-5, 1e-4, 2e-4), "sgd": (0.003, 0.01, 0.03, 0.1)}
DECAYS = {"rms": (1e-3, 2e-3, 5e-3), "sgd": (0.0, 1e-3, 5e-3)}
DEFAULTS = {"rms": (5e-5, 2e-3), "sgd": (0.01, 1e-3), None: (None, None)}  # --lr, --decay


def join(pieces):
    """A text's (states [N, E], words [N], log-probabilities [N] in float64, on the CPU)."""
    states, words, logprobs = map(torch.cat, zip(*pieces))
    return states, words, logprobs.cpu().double()  # MPS has no float64


def cache_probability(states, words, theta, window):
    """p_cache of each of `words` [N] after `states` [N, E]: [N], float64, on the CPU.

    A state h_t gives the word w the probability

        p_cache(w) = sum_i a_i [w_i = w],   a = softmax(theta h_t . h_i)

    over the pairs (h_i, w_i) with t - window <= i < t: only words that were read before. It is 0
    for the first word, which has no cache.
    """
    places = torch.arange(len(words), device=words.device)
    found = []
    for start in range(0, len(words), CHUNK):
        stop = min(start + CHUNK, len(words))
        now, past = slice(start, stop), slice(max(0, start - window), stop - 1)
        age = places[now, None] - places[past]  # [T, P]
        scores = theta * (states[now] @ states[past].t())
        scores = scores.masked_fill((age < 1) | (age > window), -math.inf)
        weights = scores.softmax(1).nan_to_num(0.0)  # NaN without any pair
        found.append((weights * (words[now, None] == words[past])).sum(1))
    return torch.cat(found).cpu().double()


def mixture_loss(logprob, p_cache, lambdasm):
    """Mean -log((1 - lambda) p_model + lambda p_cache), where `logprob` [N] is log p_model.

    The first word, which has no cache, counts with p_model.
    """
    mixed = torch.logaddexp(logprob + math.log1p(-lambdasm), (lambdasm * p_cache).log())
    mixed[0] = logprob[0]
    return -mixed.mean().item()


def mean_loss(pieces):
    """The mean loss in nats without a cache."""
    return -torch.cat([logprob for *_, logprob in pieces]).cpu().double().mean().item()


def evaluate_cache(pieces, theta, lambdasm, window):
    """Returns (mean loss in nats with the cache, without it). Holds all states of the text."""
    states, words, logprob = join(pieces)
    p_cache = cache_probability(states, words, theta, window)
    return mixture_loss(logprob, p_cache, lambdasm), -logprob.mean().item()


def tune_cache(pieces, thetas, windows):
    """Finds the best (mean loss in nats, theta, lambda, window) on one text."""
    states, words, logprob = join(pieces)
    found = []
    for theta, window in product(thetas, windows):
        p_cache = cache_probability(states, words, theta, window)
        lambdasm = best_lambda(logprob[1:].exp(), p_cache[1:])
        found.append((mixture_loss(logprob, p_cache, lambdasm), theta, lambdasm, window))
    return min(found)


def best_lambda(p_model, p_cache):
    """The lambda in [0, 1) that maximizes the mean of log((1 - lambda) p_model + lambda p_cache).

    That mean is concave in lambda, so bisection finds where its derivative passes through zero.
    Both [N], float64.
    """
    low, high = 0.0, 1.0
    difference = p_cache - p_model
    for _ in range(30):  # to 1e-9
        middle = (low + high) / 2
        slope = (difference / (p_model + middle * difference)).mean().item()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return low


class Reader:
    """Reads texts with weights that are fixed or, with --dynamic, follow the text."""

    def __init__(self, params, corpus, args):
        self.params, self.args = params, args
        self.words = 0  # read of the last text
        self.root_mean_square = None
        if args.dynamic == "rms":
            log("Measuring the gradients on the training split")
            self.root_mean_square = root_mean_square(params, corpus.train, args.statistics)

    def __call__(self, ids, lr, decay, seconds=math.inf):
        """Reads `ids` [N], or at least one piece and as much as `seconds` allow; yields pieces."""
        args, rule = self.args, None
        if args.dynamic:
            rule = Rule(self.params, lr, decay, args.epsilon, self.root_mean_square)
        pieces = read(self.params, ids, args.segment if rule else min(args.bptt, LONGEST), rule)
        self.words, end = 0, time.monotonic() + seconds
        bar = tqdm(total=len(ids) - 1, disable=None, leave=False, unit=" words")
        with bar, closing(pieces):  # closing restores the weights
            for piece in pieces:
                self.words += len(piece[1])
                yield piece
                bar.update(len(piece[1]))
                if time.monotonic() > end:
                    break


def tune(reader, ids, args):
    """Sets the flags to the best found on the text `ids`, and logs them.

    First the rate and the decay of dynamic evaluation, on the first `args.tune_words` words, then
    the cache's theta, lambda and window. The flags' own values are tried as well.
    """
    if args.dynamic:
        part, factor = ids[: args.tune_words + 1], args.segment / 5
        rates = {args.lr, *(factor * lr for lr in RATES[args.dynamic])}
        decays = {args.decay, *(factor * decay for decay in DECAYS[args.dynamic])}
        tried = []
        for lr, decay in product(sorted(rates), sorted(decays)):
            loss = mean_loss(reader(part, lr, decay))
            log(f"| lr {lr:7.2g} | decay {decay:7.2g} | {loss_columns(loss, 'valid ')}")
            tried.append((loss if math.isfinite(loss) else math.inf, lr, decay))
        _, args.lr, args.decay = min(tried)
        log(f"Best on {len(part) - 1:,} words of valid: --lr {args.lr:g} --decay {args.decay:g}")
    if args.lambdasm:
        pieces = reader(ids, args.lr, args.decay)
        _, args.theta, args.lambdasm, args.window = tune_cache(
            pieces, {args.theta, *THETAS}, {args.window, *WINDOWS}
        )
        log(
            f"Best on valid: --theta {args.theta:g} --lambdasm {args.lambdasm:.4f} "
            f"--window {args.window}" + " (the cache does not help)" * (not args.lambdasm)
        )


def report(reader, ids, split, args):
    """Logs a split's loss by the model alone and as the flags ask; returns the last columns."""
    pieces = reader(ids, args.lr, args.decay, args.seconds)
    if args.lambdasm:
        with_cache, loss = evaluate_cache(pieces, args.theta, args.lambdasm, args.window)
    else:
        loss = mean_loss(pieces)
    losses = {"model alone": loss}
    if args.dynamic:
        fixed = read(reader.params, ids[: reader.words + 1], min(args.bptt, LONGEST))
        losses = {"model alone": mean_loss(fixed), "dynamic": loss}
    if args.lambdasm:
        losses["dynamic and cache" if args.dynamic else "with cache"] = with_cache
    cut = f" | {reader.words:,} of {len(ids) - 1:,} tokens" if args.seconds < math.inf else ""
    for name, value in losses.items():
        columns = loss_columns(value, f"{split} ") + cut
        log(f"| {name} | {columns}")
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
    add("--dynamic", choices=list(RATES), nargs="?", const="rms",
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
    add("--seconds", type=number(float, 0, open_low=True), default=math.inf, metavar="N",
        help="stop reading a split after N seconds, and report on what was read (default: read "
             "all; so does --tune)")
    add("--bptt", type=count, default=2000, help="words read at once (default: 2000)")
    add_device_flags(parser)
    args = parser.parse_args(argv)
    lr, decay = DEFAULTS[args.dynamic]
    args.lr = lr if args.lr is None else args.lr
    args.decay = decay if args.decay is None else args.decay
    return args


def main(argv=None):
    args = parse_args(argv)
    params, dictionary = load_for_use(args.save, args)
    corpus = Corpus(args.data)
    check_corpus(dictionary.idx2word, corpus, args, args.save)
    reader = Reader(params, corpus, args)
    if args.tune:
        tune(reader, corpus.valid, args)
    for split in args.split:
        columns = report(reader, getattr(corpus, split), split, args)
    rule = "=" * 89
    log(f"{rule}\n| End of training | {columns}\n{rule}")
    return 2 if log.failed else 0


if __name__ == "__main__":
    run_command(main)
