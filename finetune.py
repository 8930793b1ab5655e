"""Fine-tunes a model that main.py trained: SGD averaged from its first step.

    python finetune.py --data sample --epochs 10 --save sample.pt

Takes the flags of main.py. Those that are not given, the architecture among them, are as the
model was trained. Stops when the validation loss meets the trigger; see train.nonmonotone.
"""

import itertools
from pathlib import Path

from data import InputError
from flags import ARCHITECTURE, complete, make_parser, run, take_architecture
from train import (
    EVAL_BATCH_SIZE, evaluate, fit, loss_columns, prepare, report_test, saved_params,
)
from utils import log, read_checkpoint, write_atomically

INHERITED = (
    "data", "lr", "clip", "batch_size", "bptt", "dropout", "dropouth", "dropouti", "dropoute",
    "wdrop", "alpha", "beta", "wdecay", "nonmono",
)


def keep_base(path):
    """Copies the checkpoint at `path` to `path`.base, or .base2, ... where that is taken.

    Returns the copy's path; an existing copy of the same content serves.
    """
    content = Path(path).read_bytes()
    for suffix in itertools.chain([""], itertools.count(2)):
        copy = Path(f"{path}.base{suffix}")
        if not copy.exists():
            write_atomically(copy, content)
            return copy
        if copy.read_bytes() == content:
            return copy


def finetune(corpus, args):
    """Fine-tunes the model at `args.save` for at most `args.epochs` epochs; returns exit status."""
    if args.optimizer == "adam":  # its rate is not one for SGD
        args.lr, args.optimizer = None, "sgd"
        args = complete(args, {})
    args.when = []
    params = saved_params(args.save, corpus, args)
    log(f"Fine-tuning {args.save}; its base model stays at {keep_base(args.save)}")
    base = evaluate(params, corpus.valid, EVAL_BATCH_SIZE, args.bptt)
    log(f"| base model | {loss_columns(base, 'valid ')}")
    interrupted, _ = fit(params, corpus, args, best=base, finetuning=True)
    report_test(corpus, args)
    return 130 if interrupted else 0


def parse_args(argv=None):
    """The flags of finetune.py as a Namespace, complete. Exits with 2, or raises InputError."""
    parser = make_parser(__doc__.splitlines()[0], inherited=(*INHERITED, *ARCHITECTURE))
    given = parser.parse_args(argv)
    if not hasattr(given, "save"):
        raise InputError("--save: name the checkpoint that main.py wrote")
    checkpoint = read_checkpoint(given.save)
    trained = checkpoint["flags"]
    inherited = {flag: trained[flag] for flag in INHERITED if flag in trained}
    if trained.get("optimizer") == "adam":
        del inherited["lr"]  # not a rate for SGD
    inherited |= take_architecture(given, checkpoint, given.save)
    args = complete(given, parser.defaults | inherited)
    args.optimizer, args.when = "sgd", []
    return args


def main(argv=None):
    """Fine-tunes the checkpoint that `--save` names, and tests it; returns the exit status."""
    args = parse_args(argv)
    return finetune(prepare(args), args)


if __name__ == "__main__":
    run(main)
