"""Evaluates a trained model with a continuous cache, with dynamic evaluation, or with both.

    python pointer.py --data data/penn --save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500
    python pointer.py --data data/penn --save PTB.pt --tune
    python pointer.py --data data/penn --save PTB.pt --dynamic

The cache (Grave, Joulin and Usunier 2016, 1612.04426) raises the probability of words that followed
states similar to the current one. The checkpoint is not changed.

`pieces` are the consecutive parts of a text from dynamic_evaluation.read, each (states [L, E], the
next words [L], their log-probabilities in nats [L]).
"""

import math
import time
from argparse import Namespace
from contextlib import closing
from itertools import product

import torch
from torch import nn
from tqdm import tqdm

from bidirectional import is_bilm
from checkpoint import read_checkpoint
from data import Corpus, InputError
from dynamic_evaluation import Rule, read, root_mean_square
from evaluate import load_for_use
from flags import (
    Parser, add_model_flags, coefficient, count, fraction, number, run_command, window_length,
)
from utils import log, loss_columns, note_explicit_eos, read_with_vocabulary

CHUNK = 256  # words per computation of the attention over the cache
# The values that --tune tries. Rates and decays are for segments of 5 words, and scale with them.
THETAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
WINDOWS = (50, 100, 200, 500, 1000, 2000, 3785)
RATES = {"rms": (3e-5, 5e-5, 7e-5, 1e-4, 2e-4), "sgd": (0.003, 0.01, 0.03, 0.1)}
DECAYS = {"rms": (1e-3, 2e-3, 5e-3), "sgd": (0.0, 1e-3, 5e-3)}
DYNAMIC_FLAGS = ("lr", "decay", "epsilon", "segment", "statistics", "tune_words")
DEFAULTS = {"rms": {"lr": 5e-5, "decay": 2e-3}, "sgd": {"lr": 0.01, "decay": 1e-3}}


def cache_probabilities(pieces, thetas, windows):
    """Reads a text; returns (log p_model of its words, {(theta, window): p_cache of its words}).

    All are [N], in float64, on the CPU. At the state h_t a word w has the probability

        p_cache(w) = sum_i a_i [w_i = w],   a = softmax(theta h_t . h_i)

    over the pairs (h_i, w_i) with t - window <= i < t, that is, over words already read; w_i is the
    word after the state h_i, the paper's x_{i+1}. It is 0 for the first word, which has no cache.
    """
    states, words, logprob = map(torch.cat, zip(*pieces))
    places = torch.arange(len(words), device=words.device)
    p_caches = {setting: [] for setting in product(thetas, windows)}
    for start, window in product(range(0, len(words), CHUNK), windows):
        now = slice(start, start + CHUNK)
        cached = slice(max(0, start - window), start + CHUNK - 1)  # the pairs that any word can use
        age = places[now, None] - places[cached]  # [words, pairs]
        outside = (age < 1) | (age > window)
        products = states[now] @ states[cached].t()
        is_word = words[now, None] == words[cached]
        for theta in thetas:
            scores = (theta * products).masked_fill(outside, -math.inf)
            weights = scores.softmax(1).nan_to_num(0.0)  # NaN if no pair is in the window
            p_caches[theta, window].append((weights * is_word).sum(1))
    return join([logprob]), {setting: join(parts) for setting, parts in p_caches.items()}


def join(parts):
    """Concatenates tensors [L] to [N], in float64 on the CPU: MPS has no float64."""
    return torch.cat(parts).cpu().double()


def mixture_loss(logprob, p_cache, lambdasm):
    """Mean -log((1 - lambda) p_model + lambda p_cache), where `logprob` [N] is log p_model.

    The first word has no cache and uses p_model.
    """
    mixed = torch.logaddexp(logprob + math.log1p(-lambdasm), (lambdasm * p_cache).log())
    mixed[0] = logprob[0]
    return -mixed.mean().item()


def mean_loss(pieces):
    """The mean loss in nats without a cache."""
    return -join([logprob for *_, logprob in pieces]).mean().item()


def evaluate_cache(pieces, theta, lambdasm, window):
    """Returns (mean loss in nats with the cache, without it)."""
    logprob, p_caches = cache_probabilities(pieces, [theta], [window])
    return mixture_loss(logprob, p_caches[theta, window], lambdasm), -logprob.mean().item()


def tune_cache(pieces, thetas, windows):
    """Finds the best (mean loss in nats, theta, lambda, window) on one text."""
    logprob, p_caches = cache_probabilities(pieces, thetas, windows)
    results = []
    for (theta, window), p_cache in p_caches.items():
        lambdasm = best_lambda(logprob[1:].exp(), p_cache[1:])
        results.append((mixture_loss(logprob, p_cache, lambdasm), theta, lambdasm, window))
    return min(results)


def best_lambda(p_model, p_cache):
    """The lambda in [0, 1) that maximizes the mean of log((1 - lambda) p_model + lambda p_cache).

    The mean is concave in lambda, so bisection finds the zero of its derivative. Both inputs are
    [N], in float64.
    """
    low, high = 0.0, 1.0
    difference = p_cache - p_model
    for _ in range(30):  # to 1e-9
        middle = (low + high) / 2
        slope = (difference / (p_model + middle * difference)).mean().item()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return low


class Reader:
    """Reads texts with the trained weights or, with --dynamic, with adapting weights."""

    def __init__(self, params, corpus, args):
        self.params, self.args = params, args
        self.words = 0  # number of words read of the last text
        self.root_mean_square = None
        if args.dynamic == "rms":
            log("Measuring the gradients on the training split")
            self.root_mean_square = root_mean_square(params, corpus.train, args.statistics)

    def __call__(self, ids, lr, decay, seconds=math.inf):
        """Yields the pieces of `ids` [N] until `seconds` have passed, but at least one piece."""
        args, rule, length = self.args, None, self.args.bptt
        if args.dynamic:
            rule = Rule(self.params, lr, decay, args.epsilon, self.root_mean_square)
            length = args.segment
        pieces = read(self.params, ids, length, rule)
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
    """Sets the flags to the best values on the text `ids`, and logs them.

    Searches first the rate and the decay of dynamic evaluation, on the first `args.tune_words`
    words, then the cache's theta, lambda and window. Also tries the values of the flags.
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
        log(f"Best on valid: --theta {args.theta:g} --lambdasm {args.lambdasm:.4f} "
            f"--window {args.window}")


def report_split(reader, ids, split, args):
    """Logs a split's loss with the model alone and with the flags; returns the last columns."""
    pieces = reader(ids, args.lr, args.decay, args.seconds)
    if args.lambdasm:
        with_cache, loss = evaluate_cache(pieces, args.theta, args.lambdasm, args.window)
    else:
        loss = mean_loss(pieces)
    losses = {"model alone": loss}
    if args.dynamic:
        fixed = read(reader.params, ids[: reader.words + 1], args.bptt)
        losses = {"model alone": mean_loss(fixed), "dynamic": loss}
        if not loss < losses["model alone"] + 1:
            raise InputError(f"--lr {args.lr:g}: the adapting weights diverged; try a lower --lr")
    if args.lambdasm:
        losses["dynamic and cache" if args.dynamic else "with cache"] = with_cache
    coverage = f" | {reader.words:,} of {len(ids) - 1:,} tokens" if args.seconds < math.inf else ""
    for name, value in losses.items():
        columns = loss_columns(value, f"{split} ") + coverage
        log(f"| {name} | {columns}")
    return columns


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add
    add("--data", None, "folder with train.txt, valid.txt and test.txt, or 'sample' (default: "
        "as in training)")
    add("--save", None, "the trained model", required=True, metavar="CHECKPOINT")
    add("--window", 500, "pairs in the cache", type=count)
    add("--theta", 1.0, "how strongly the cache favours similar states: low values flatten the "
        "weights, high values sharpen them", type=coefficient)
    add("--lambdasm", 0.1, "the cache's share of the mixture; 0 disables the cache", type=fraction)
    add("--dynamic", None, "dynamic evaluation, with the rule rms (if no rule is given) or sgd",
        choices=list(RATES), nargs="?", const="rms")
    add("--lr", None, "learning rate of dynamic evaluation (default: 5e-5 with rms, 0.01 with sgd)",
        type=coefficient)
    add("--decay", None, "decay of dynamic evaluation (default: 0.002 with rms, 0.001 with sgd)",
        type=fraction)
    add("--epsilon", 2e-5, "constant that the rule rms adds to the root mean square of a gradient",
        type=number(float, 0, open_low=True))
    add("--segment", 5, "words between the steps of dynamic evaluation", type=window_length)
    add("--statistics", None, "windows of training text, 100 times 5 words each, on which the rule "
        "rms measures gradients (default: all)", type=count, metavar="N")
    add("--tune", False, "first search for the best theta, lambda and window on the validation "
        "split, and with --dynamic before that for the best --lr and --decay", action="store_true")
    add("--tune-words", 20_000, "words of the validation split on which --tune tries each --lr and "
        "--decay", type=count, metavar="N")
    add("--split", ["valid", "test"], "splits to evaluate", choices=["valid", "test"], nargs="+")
    add("--seconds", math.inf, "stop reading a split after N seconds and report the loss so far "
        "(default: no limit; does not apply to --tune)", type=number(float, 0, open_low=True),
        metavar="N")
    add("--bptt", 2000, "words read at once without dynamic evaluation", type=window_length)
    add_model_flags(parser)
    given = vars(parser.parse_args(argv))
    args = Namespace(**{**parser.defaults, **DEFAULTS.get(given.get("dynamic"), {}), **given})
    unused = {None: DYNAMIC_FLAGS, "sgd": ("epsilon", "statistics")}.get(args.dynamic, ())
    for flag in unused:
        if flag in given:
            needed = "--dynamic rms" if args.dynamic else "--dynamic"
            parser.error(f"--{flag.replace('_', '-')}: has no effect without {needed}")
    if args.tune and not (args.lambdasm or args.dynamic):
        parser.error("--tune: has no effect with --lambdasm 0 and without --dynamic")
    if "tune_words" in given and not args.tune:
        parser.error("--tune-words: has no effect without --tune")
    return args


def main(argv=None):
    args = parse_args(argv)
    lm = load_for_use(args.save, args)
    params = lm.params
    if is_bilm(params):
        params = nn.ModuleList([params[0].forward_half(), params[1]])
    trained = read_checkpoint(args.save)
    corpus = Corpus(args.data or trained["flags"]["data"], lm.vocabulary.level)
    if not args.data and corpus.digest != trained["corpus"]["sha256"]:
        log(f"Note: {corpus.name} is not the text that {args.save} was trained on")
    note_explicit_eos(corpus.explicit_eos)
    read_with_vocabulary(corpus, lm.vocabulary, args.save)
    reader = Reader(params, corpus, args)
    if args.tune:
        tune(reader, corpus.valid, args)
    for split in args.split:
        columns = report_split(reader, getattr(corpus, split), split, args)
    rule = "=" * 89
    log(f"{rule}\n| End of training | {columns}\n{rule}")
    return 2 if log.failed else 0


if __name__ == "__main__":
    run_command(main)
