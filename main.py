"""Trains a weight-dropped recurrent language model with NT-ASGD, then tests the best one.

    python main.py --data sample --emsize 200 --nhid 400 --epochs 10 --save sample.pt
    python main.py --resume sample.pt

Published AWD-LSTM commands run unchanged. Exit code 0; 2 for bad input or a run that diverges; 130
after Ctrl-C, with the best model so far tested all the same, and 143 after SIGTERM.
"""

import math
from argparse import Namespace
from pathlib import Path

import parallel
import recipes
from bidirectional import score
from data import InputError, unigram
from finetune import finetune
from flags import complete, make_parser, number, plain, run, spelled, take_architecture
from preemption import Preemption
from resume import check_corpus, inherit, making_sense, read_state
from run import (
    alone, copy_model, finish, log_size, new_params, prepare, saved_params, set_aside,
)
from schedule import SCHEDULES, UP
from train import OPTIMIZERS
from trainer import Trainer
from utils import RECORDS, log, read_checkpoint

COMMAND = "main.py"


def parse_args(argv=None):
    """The flags of main.py as a Namespace, complete. Exits with 2, or raises InputError."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add(
        "--recipe", "published", "what sets the flags that are not given: published, or short, for "
        "a run of few --epochs", choices=list(recipes.RECIPES),
    )
    parser.add(
        "--optimizer", "sgd", "sgd (with NT-ASGD), adam, or adamw (decoupled weight decay, betas "
        "0.8 and 0.99)", choices=list(OPTIMIZERS),
    )
    parser.add(
        "--schedule", "constant", "the learning rate over the --epochs: constant, or onecycle, up "
        f"to --lr over a share of {UP:g}, then down to nothing", choices=SCHEDULES,
    )
    parser.add(
        "--regularization-ramp", None, "all dropouts, weight drop, AR and TAR begin at SHARE of "
        "their strength and come to the whole after PART of the --epochs (not at all with a PART "
        "above 1)", nargs=2, type=float, metavar=("SHARE", "PART"),
    )
    parser.add(
        "--when", [-1], "epochs after which the learning rate is divided by 10", nargs="+", type=int
    )
    parser.add(
        "--finetune", 0, "then fine-tune for at most N epochs", type=number(int, 0), metavar="N"
    )
    parser.add(
        "--decoder-bias", None, "where the decoder's bias begins: zeros or unigram, the words' log "
        "frequencies (default: zeros; with sgd unigram for biLM, with attention, and for GRU where "
        "--lr is not given)",
        choices=["zeros", "unigram"],
    )
    parser.defaults["by_recipe"] = []  # no flag, but kept with them; see recipes.follow
    given = parser.parse_args(argv)
    path, state, has_end = getattr(given, "resume", ""), None, hasattr(given, "epochs")
    if path and (state := read_state(path, COMMAND)):
        defaults = inherit(given, state, path, parser.defaults)
        has_end = has_end or defaults["epochs"] != parser.defaults["epochs"]
        with making_sense(path):
            defaults |= recipes.stretch(given, defaults)
    else:
        defaults = parser.defaults | recipes.follow(given)
    if path and not state:
        if hasattr(given, "decoder_bias"):
            raise InputError(f"--decoder-bias: the weights of {path} have one; leave it out")
        checkpoint = read_checkpoint(path)
        defaults |= take_architecture(given, checkpoint, path)
        defaults |= {
            "objective": checkpoint["flags"].get("objective", "lm"), "decoder_bias": None,
            "by_recipe": [flag for flag in defaults["by_recipe"] if flag != "decoder_bias"],
        }
    args = complete(given, defaults)
    check_schedule(given, has_end)
    if args.optimizer == "adamw" and args.lr * args.wdecay >= 1:
        lr, wdecay = (
            spelled(flag, getattr(args, flag))
            + f" (of --recipe {args.recipe})" * (flag in args.by_recipe)
            for flag in ("lr", "wdecay")
        )
        raise InputError(
            f"{wdecay}: with {lr} a step would take all of a weight away, or more; "
            "lower one of them"
        )
    if hasattr(given, "attention_window") and args.attention == "none":
        raise InputError(f"--attention-window {args.attention_window}: for --attention only")
    return args


def check_schedule(given, has_end):
    """Raises InputError for a schedule or a ramp over a run that has no end, or that is no ramp."""
    for flag in ("schedule", "regularization_ramp"):
        value = getattr(given, flag, "constant")
        if value != "constant" and not has_end:
            flags = spelled(flag, value)
            raise InputError(f"{flags}: goes over the --epochs of the run; name them")
    share, part = ramp = getattr(given, "regularization_ramp", (1, 1))
    if not (0 <= share <= 1 and 0 < part < 1e30):  # neither where one is NaN
        raise InputError(
            f"{spelled('regularization_ramp', ramp)}: SHARE must be a number in [0, 1], and PART "
            "one above 0"
        )


def main(argv=None):
    """Trains, tests, and fine-tunes where that is asked for; returns the exit status."""
    args = parse_args(argv)
    with alone(args, COMMAND), Preemption() as preemption:
        path, state = args.resume, None
        if path and (state := read_state(path, COMMAND)):
            args.resume = state["flags"]["resume"]  # the whole run's, not this part's
        corpus = prepare(args)
        origin = COMMAND, plain(args)
        tuning = Namespace(**{**vars(args), "epochs": args.finetune})
        if path != args.save:
            parallel.on_first(set_aside, args.save)
        if state:
            check_corpus(state, corpus, args, path)
            parallel.on_first(copy_model, path, args.save)
            if state["finetuning"]:
                return finetune(corpus, tuning, origin, preemption, path, state)
            trainer = Trainer(new_params(corpus, args), corpus, args, origin, preemption.check)
            log_size(trainer.params)
            trainer.resume(state, path)
        else:
            if described := recipes.describe(args):
                log(described)
            trainer = start(corpus, args, origin, preemption)
        status = finish(trainer)
        if status or not args.finetune:
            return status
        return finetune(corpus, tuning, origin, preemption)


def start(corpus, args, origin, preemption):
    """A Trainer that begins a run: with new weights, or with those of `args.resume`."""
    best, records = math.inf, ""
    if not args.resume:
        params = new_params(corpus, args)
        if args.decoder_bias == "unigram":
            model, criterion = params
            criterion.begin_at(unigram(corpus.train, len(corpus.dictionary)), model.decoder.bias)
    else:
        params = saved_params(args.resume, corpus, args)
        log(f"Warm start from the weights of {args.resume}: it has no training state to go on from")
    log_size(params)
    if args.resume == args.save:
        # The file is only replaced by something better than what it holds.
        best, _ = score(params, corpus.valid, args, preemption.check)
        if Path(f"{args.save}{RECORDS}").exists():
            records = Path(f"{args.save}{RECORDS}").read_text(encoding="utf-8")
    elif Path(args.save).exists():
        log(f"Note: {args.save} exists; the model of the first epoch will replace it")
    return Trainer(params, corpus, args, origin, preemption.check, best=best, records=records)


if __name__ == "__main__":
    run(main)
