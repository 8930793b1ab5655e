"""Fine-tunes a model that main.py trained: SGD averaged from its first step.

    python finetune.py --data sample --epochs 10 --save sample.pt
    python finetune.py --resume sample.pt

Takes the flags of main.py. Those that are not given, the architecture among them, are as the
model was trained; dropouts, weight drop, AR and TAR as they were at the end of a ramp. Stops when
the validation loss meets the trigger; see train.nonmonotone. Exit codes as main.py's.
"""

from argparse import Namespace

import parallel
from bidirectional import score
from data import InputError
from files import keep
from flags import ARCHITECTURE, complete, make_parser, plain, run, spelled, take_architecture
from preemption import Preemption
from resume import STATE, check_corpus, inherit, is_over, read_state
from run import alone, copy_model, finish, new_params, prepare, saved_params, set_aside
from schedule import REGULARIZERS, strengths
from train import RATES, loss_columns
from trainer import Trainer
from utils import log, log_parts, read_checkpoint

COMMAND = "finetune.py"
INHERITED = (
    "data", "lr", "bias_lr", "clip", "batch_size", "bptt", "dropout", "dropouth", "dropouti",
    "dropoute", "wdrop", "alpha", "beta", "wdecay", "nonmono", "objective",
)
# The rate as it is given, the regularizers as a ramp left them, to the end.
PLAIN = {"when": [], "schedule": "constant", "regularization_ramp": None}


def finetune(corpus, args, origin, preemption, path=None, state=None):
    """Fine-tunes the model at `args.save` for at most `args.epochs` epochs; returns exit status.

    With `state`, read from beside `path`, it goes on from there. `origin` is as in Trainer.
    """
    if args.regularization_ramp:  # they stay at what it came to
        vars(args).update(strengths(args, 1.0))
    if args.optimizer != "sgd" and not state:  # whose rates are not for SGD
        vars(args).update(dict.fromkeys(RATES), optimizer="sgd")
        args = complete(args, {})
        # The state of this phase holds the rates that it has: a resumed run compares with them.
        command, flags = origin
        origin = command, {**flags, **{flag: getattr(args, flag) for flag in RATES}}
    args.optimizer = "sgd"
    vars(args).update(PLAIN)
    if state:
        params = new_params(corpus, args)
        trainer = Trainer(params, corpus, args, origin, preemption.check, finetuning=True)
        trainer.resume(state, path)
        return finish(trainer)
    params = saved_params(args.save, corpus, args)
    # A run that was cut short can still go on from the copy.
    before = read_state(args.save)
    extensions = [STATE] if before and not is_over(before) else []
    base = parallel.on_first(keep, args.save, ".base", *extensions)
    log(f"Fine-tuning {args.save}; its base model stays at {base}")
    loss, parts = score(params, corpus.valid, args, preemption.check)
    log(f"| base model | {loss_columns(loss, 'valid ')}")
    log_parts(parts)
    settled = (spelled(flag, getattr(args, flag)) for flag in (*RATES, *REGULARIZERS))
    log(f"With SGD: {' '.join(settled)}")
    return finish(
        Trainer(params, corpus, args, origin, preemption.check, finetuning=True, best=loss)
    )


def parse_args(argv=None):
    """The flags of finetune.py as a Namespace, complete. Exits with 2, or raises InputError."""
    parser = make_parser(__doc__.splitlines()[0], inherited=(*INHERITED, *ARCHITECTURE))
    given = parser.parse_args(argv)
    path = getattr(given, "resume", "") or getattr(given, "save", "")
    if not path:
        raise InputError("--save: name the checkpoint that main.py wrote")
    if hasattr(given, "resume") and (state := read_state(path, COMMAND)):
        inherited = inherit(given, state, path, parser.defaults)
    else:
        checkpoint = read_checkpoint(path)
        trained = checkpoint["flags"]
        inherited = {flag: trained[flag] for flag in INHERITED if flag in trained}
        if trained.get("regularization_ramp"):
            inherited |= strengths(Namespace(**trained), 1.0)
        if trained.get("optimizer", "sgd") != "sgd":
            inherited |= dict.fromkeys(RATES)  # that optimizer's are not for SGD
        inherited |= {"save": path, **take_architecture(given, checkpoint, path)}
    args = complete(given, parser.defaults | inherited)
    vars(args).update(PLAIN, optimizer="sgd")
    return args


def main(argv=None):
    """Fine-tunes the checkpoint that `--save` names, and tests it; returns the exit status."""
    args = parse_args(argv)
    with alone(args, COMMAND), Preemption() as preemption:
        path, state = args.resume, None
        if path and (state := read_state(path, COMMAND)):
            args.resume = state["flags"]["resume"]
        corpus = prepare(args)
        if state:
            check_corpus(state, corpus, args, path)
        elif path:
            log(f"Warm start from the weights of {path}: it has no training state to go on from")
        if path and path != args.save:
            parallel.on_first(set_aside, args.save)
            parallel.on_first(copy_model, path, args.save)
        return finetune(corpus, args, (COMMAND, plain(args)), preemption, path, state)


if __name__ == "__main__":
    run(main)
