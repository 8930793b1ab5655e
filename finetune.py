"""Fine-tunes a model that main.py trained, with SGD averaged from the first step.

    python finetune.py --data sample --epochs 10 --save sample.pt
    python finetune.py --resume sample.pt

Shares most flags with main.py. Most of them, including the architecture, default to their values
in training; after a ramp, dropouts, weight drop, AR and TAR keep the strength of the model's epoch.
Stops when the validation loss meets the trigger, see train.is_nonmonotone. Exit codes are those of
main.py.
"""

from argparse import Namespace

from checkpoint import (
    build_params, continuation, copy_base, copy_model, open_run, read_checkpoint, read_state,
    reread_state, saved_params, state_to_resume,
)
from data import InputError
from distributed import broadcast, is_first
from flags import (
    ARCHITECTURE, OPTIMIZER_FLAGS, check_unchanged, differences, flags_of_run, format_flag,
    make_parser, model_flags, resolve_flags, run_command, sgd_rates,
)
from model import training_settings
from train import REGULARIZERS, Trainer, evaluate_model, regularizers_at, train_and_test
from utils import log, log_parts, loss_columns, prepare

COMMAND = "finetune.py"
RATES_AND_REGULARIZERS = (*OPTIMIZER_FLAGS, *REGULARIZERS)  # those that flags_after can change
INHERITED = (
    "data", "level", *RATES_AND_REGULARIZERS, "clip", "batch_size", "bptt", "nonmono", "objective",
    "partial_shuffle", "precision", "pad_to", "cuda_graphs", "unk",
)
DEFAULTS = {  # for --help
    **dict.fromkeys((*INHERITED, *ARCHITECTURE), "as in training"),
    **dict.fromkeys(OPTIMIZER_FLAGS, "as in training; after adam or adamw, SGD's"),
    **dict.fromkeys(REGULARIZERS, "as in training; after a ramp, as in the model's epoch"),
}


def finetune(corpus, args, run, state=None):
    """Fine-tunes the model at `args.save`; returns the exit status.

    `args` are the flags of main.py, with at most `finetune` epochs, or those of finetune.py.
    Resumes from `state`, if given.
    """
    args = finetuning_flags(args, state)
    if state:
        return train_and_test(resume_trainer(corpus, args, run, state))
    # A resumed run compares its flags with those of this phase.
    run.flags |= {flag: getattr(args, flag) for flag in RATES_AND_REGULARIZERS}
    params = saved_params(args.save, corpus, args)
    loss, parts = evaluate_model(params, corpus.valid, args, run.check_signals)
    base = broadcast(copy_base(args.save) if is_first() else None)
    # After main.py's own training the state is of this same run, which need not be continued.
    note = continuation(read_state(base), base) if run.command == COMMAND else ""
    log(f"Fine-tuning {args.save}; its base model stays at {base}{note}")
    log(f"| base model | {loss_columns(loss, 'valid ')}")
    log_parts(parts)
    flags = (format_flag(flag, getattr(args, flag)) for flag in RATES_AND_REGULARIZERS)
    log(f"With SGD: {' '.join(flags)}")
    return train_and_test(Trainer(params, corpus, args, run, finetuning=True, best=loss))


def resume_trainer(corpus, args, run, state):
    """The Trainer of a run, of either command, that continues from the training state `state`."""
    params = build_params(state, **training_settings(args)).to(args.device)
    trainer = Trainer(params, corpus, args, run, finetuning=state["finetuning"])
    trainer.resume(state, differences(state, run.flags, args.device))
    return trainer


def finetuning_flags(args, state):
    """The flags of fine-tuning: those of training, but SGD at a constant learning rate.

    A resumed run of main.py keeps the rates and regularizers with which it began to fine-tune. For
    finetune.py, parse_args has applied flags_after.
    """
    flags = vars(args)
    constant = {"epochs": flags.get("finetune", args.epochs), "optimizer": "sgd", "when": [],
                "schedule": "constant", "regularization_ramp": None}
    changed = {} if state else flags_after(flags, read_checkpoint(args.save)["epoch"])
    return Namespace(**{**flags, **constant, **changed})


def flags_after(training, epoch):
    """The flags that change after training; both `training` and the result are {flag: value}.

    After a ramp, the regularizers keep the strength that they had in `epoch`, the best model's.
    After Adam the rates are SGD's.
    """
    args, changed = Namespace(**training), {}
    if training.get("regularization_ramp"):
        changed |= regularizers_at(epoch - 1, args)
    if training.get("optimizer", "sgd") != "sgd":
        changed |= sgd_rates(args)
    return changed


def parse_args(argv=None):
    """Returns (the flags as a Namespace, the training state of --resume or None).

    Exits with 2, or raises InputError.
    """
    parser = make_parser(__doc__.splitlines()[0], inherited=DEFAULTS)
    given = parser.parse_args(argv)
    path = getattr(given, "resume", "") or getattr(given, "save", "")
    if not path:
        raise InputError("--save: name the checkpoint that main.py wrote")
    state = state_to_resume(path, COMMAND) if getattr(given, "resume", "") else None
    if state:
        saved = flags_of_run(state, path)
    else:
        checkpoint = read_checkpoint(path)
        trained = checkpoint["flags"]
        saved = {"save": path, **{flag: trained[flag] for flag in INHERITED}}
        saved |= model_flags(checkpoint)
        if not checkpoint["finetuned"]:
            saved |= flags_after(trained, checkpoint["epoch"])
    check_unchanged(given, saved if state else model_flags(checkpoint), path)
    return resolve_flags(given, parser.defaults, saved), state


def main(argv=None):
    """Fine-tunes the checkpoint that `--save` names, and tests it; returns the exit status."""
    args, state = parse_args(argv)
    args.when = []  # read by open_run; only main.py has the flag
    with open_run(args, COMMAND) as run:
        corpus = prepare(args)
        if state:
            state = reread_state(args, corpus, COMMAND)
        elif args.resume:
            log(f"Warm start from the weights of {args.resume}: no run of {COMMAND} to resume")
        if args.resume:
            copy_model(args.resume, args.save)
        return finetune(corpus, args, run, state)


if __name__ == "__main__":
    run_command(main)
