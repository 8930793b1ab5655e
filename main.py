"""Trains a weight-dropped recurrent language model with NT-ASGD, then tests the best one.

    python main.py --data sample --emsize 200 --nhid 400 --epochs 10 --save sample.pt

Published AWD-LSTM commands run unchanged. Exit code 0; 2 for bad input or a loss that is not
finite; 130 after Ctrl-C, with the best model so far tested all the same.
"""

import math
from argparse import Namespace
from pathlib import Path

from finetune import finetune
from flags import complete, make_parser, number, run, take_architecture
from train import (
    EVAL_BATCH_SIZE, evaluate, fit, log_size, new_params, prepare, report_test, saved_params,
)
from utils import log, read_checkpoint


def parse_args(argv=None):
    """The flags of main.py as a Namespace, complete. Exits with 2, or raises InputError."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add("--resume", "", "start from the weights of this checkpoint, with the flags given")
    parser.add("--optimizer", "sgd", "sgd (with NT-ASGD) or adam", choices=["sgd", "adam"])
    parser.add(
        "--when", [-1], "epochs after which the learning rate is divided by 10", nargs="+", type=int
    )
    parser.add(
        "--finetune", 0, "then fine-tune for at most N epochs", type=number(int, 0), metavar="N"
    )
    given = parser.parse_args(argv)
    defaults = parser.defaults
    if getattr(given, "resume", ""):
        defaults |= take_architecture(given, read_checkpoint(given.resume), given.resume)
    args = complete(given, defaults)
    if args.resume and Path(args.resume).resolve() == Path(args.save).resolve():
        args.resume = args.save  # two spellings of one file
    return args


def main(argv=None):
    """Trains, tests, and fine-tunes where that is asked for; returns the exit status."""
    args = parse_args(argv)
    corpus = prepare(args)
    best = math.inf
    onto_itself = args.resume == args.save
    if Path(args.save).exists() and not onto_itself:
        log(f"Note: {args.save} exists; the model of the first epoch will replace it")
    if args.resume:
        params = saved_params(args.resume, corpus, args)
        log(f"Warm start from the weights of {args.resume}")
        if onto_itself:
            # The file is only replaced by something better than what it holds.
            best = evaluate(params, corpus.valid, EVAL_BATCH_SIZE, args.bptt)
    else:
        params = new_params(corpus, args)
    log_size(params)
    interrupted, saved = fit(params, corpus, args, best)
    if saved or onto_itself:
        report_test(corpus, args)
    else:
        log("No epoch was finished, so there is no model to test")
    if interrupted:
        return 130
    if args.finetune:
        return finetune(corpus, Namespace(**{**vars(args), "epochs": args.finetune}))
    return 0


if __name__ == "__main__":
    run(main)
