"""Trains a weight-dropped recurrent language model with NT-ASGD and tests the best model.

    python main.py --data sample --nhid 300 --batch_size 10 --epochs 10 --save sample.pt
    python main.py --resume sample.pt

Published AWD-LSTM commands run unchanged. Exit codes: 0; 2 for bad input or divergence; 130 after
Ctrl-C, which still tests the best model so far; 143 after SIGTERM.
"""

import torch

from checkpoint import (
    copy_model, keep_older_run, open_run, read_checkpoint, reread_state, saved_params,
    state_to_resume,
)
from data import Dictionary, InputError, read_vectors, unigram_frequencies
from distributed import broadcast, is_first
from finetune import finetune, resume_trainer
from flags import (
    NEW_MODEL_FLAGS, RECIPES, check_unchanged, describe_recipe, flags_of_run, make_parser,
    model_flags, number, resolve_flags, run_command,
)
from train import OPTIMIZERS, Trainer, new_params, train_and_test
from utils import log, prepare

COMMAND = "main.py"


def make_main_parser():
    """A parser for the flags of make_parser and those that only main.py has."""
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add
    add("--recipe", None, "set of flags: published, gru, slow-biases, fast (for runs with a fixed "
        "number of epochs, 4 or more) or fast-gru (the same for GRU); a flag on the command line "
        "overrides only that flag (default: gru for GRU, slow-biases for biLM and with attention, "
        "else published)", choices=list(RECIPES))
    add("--optimizer", "sgd", "sgd (with NT-ASGD), adam, or adamw (decoupled weight decay, betas "
        "0.8 and 0.998)", choices=list(OPTIMIZERS))
    add("--schedule", "constant", "learning rate over the --epochs: constant or trapezoid (rises "
        "to --lr over the first 8%% of the run, constant until 48%%, then falls to 0)",
        choices=["constant", "trapezoid"])
    add("--regularization-ramp", None, "start all dropouts, weight drop, AR and TAR at SHARE of "
        "their strength, and raise them after each epoch, to full strength after EPOCHS epochs",
        nargs=2, type=float, metavar=("SHARE", "EPOCHS"))
    add("--when", [-1], "epochs after which the learning rate is divided by 10",
        nargs="+", type=int)
    add("--finetune", 0, "then fine-tune for at most N epochs", type=number(int, 0), metavar="N")
    add("--decoder-bias", "zeros", "initial decoder bias: zeros or unigram (the log frequencies of "
        "the words)", choices=["zeros", "unigram"])
    add("--embeddings", None, "initialize the embedding, and with it the tied decoder, of every "
        "word that has a vector in FILE (word2vec's or GloVe's text format, also gzipped)",
        metavar="FILE")
    return parser


def parse_args(argv=None):
    """Returns (the flags as a Namespace, the training state of --resume or None).

    Exits with 2, or raises InputError.
    """
    parser = make_main_parser()
    given = parser.parse_args(argv)
    path = getattr(given, "resume", "")
    state, saved = state_to_resume(path, COMMAND), {}
    if state:
        saved = flags_of_run(state, path)
        check_unchanged(given, saved, path)
        if state["finetuning"]:  # training is over: its length and schedules cannot change
            schedule = ("epochs", "when", "schedule", "regularization_ramp")
            check_unchanged(given, saved, path, schedule)
    elif path:
        checkpoint = read_checkpoint(path)
        saved = model_flags(checkpoint)
        check_unchanged(given, saved | dict.fromkeys(NEW_MODEL_FLAGS), path)
        saved |= {flag: checkpoint["flags"][flag] for flag in ("data", "objective", "unk")}
        saved |= {flag: parser.defaults[flag] for flag in NEW_MODEL_FLAGS}
    args = resolve_flags(given, parser.defaults, saved)
    has_no_length = "epochs" not in given and args.epochs == parser.defaults["epochs"]
    if has_no_length and args.schedule not in ("constant", saved.get("schedule")):
        flag = "schedule" if "schedule" in given else "recipe"
        raise InputError(f"--{flag} {getattr(args, flag)}: needs --epochs, the length of the run")
    if not state and (described := describe_recipe(args, given)):
        log(described)
    return args, state


def main(argv=None):
    """Trains, tests, and fine-tunes if requested; returns the exit status."""
    args, state = parse_args(argv)
    with open_run(args, COMMAND) as run:
        corpus = prepare(args)
        if state:
            state = reread_state(args, corpus, COMMAND)  # under the lock
            copy_model(args.resume, args.save)
        if not (state and state["finetuning"]):
            status = train_and_test(make_trainer(corpus, args, run, state))
            if status or not args.finetune:
                return status
            state = None
        return finetune(corpus, args, run, state)


def make_trainer(corpus, args, run, state):
    """A Trainer that resumes from `state` or, if it is None, starts a new run.

    A new run starts from new weights, or from the weights of `args.resume`.
    """
    if state:
        return resume_trainer(corpus, args, run, state)
    if args.resume:
        params = saved_params(args.resume, corpus, args)
        log(
            f"Warm start from the weights of {args.resume}: no run of {COMMAND} to resume; saving "
            f"to {args.save}"
        )
        broadcast(None)  # all ranks have read the weights, whose file may be renamed now
    else:
        # Refuses an --unk that is not in the vocabulary.
        corpus.dictionary = Dictionary(corpus.dictionary.idx2word, args.level, args.unk)
        params = new_params(corpus, args)
        model, criterion = params
        if args.decoder_bias == "unigram":
            frequencies = unigram_frequencies(corpus.train, len(corpus.dictionary))
            criterion.init_bias(frequencies, model.decoder.bias)
        if args.embeddings:
            load_pretrained_vectors(model.encoder.weight, corpus.dictionary, args)
    trainer = Trainer(params, corpus, args, run)
    if is_first():
        keep_older_run(args.save, args.when)
    return trainer


@torch.no_grad()
def load_pretrained_vectors(weight, dictionary, args):
    """Copies the vectors of --embeddings to the rows of the embedding `weight`; logs how many."""
    vectors = read_vectors(args.embeddings, dictionary.word2idx, args.emsize)
    if not vectors:
        raise InputError(f"--embeddings {args.embeddings}: has no word of {args.data}")
    for word, vector in vectors.items():
        weight[dictionary.word2idx[word]] = vector
    log(
        f"{len(vectors):,} of {len(dictionary):,} words start from the vectors in {args.embeddings}"
    )


if __name__ == "__main__":
    run_command(main)
