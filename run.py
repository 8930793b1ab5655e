"""How a run begins and how it ends: what main.py and finetune.py share."""

import contextlib
import math
import random
import signal
from pathlib import Path

import numpy as np
import torch
from torch import nn

import parallel
from cpu_kernels import use_expandable_segments
from bidirectional import make_model, score
from data import SPLITS, Corpus, InputError, unigram_loss
from files import exclusive, keep, write_atomically
from flags import plain
from model import NOTES, RATES
from preemption import Preempted
from resume import STATE, describe_device, how_to_resume, is_finished, read_state
from splitcross import SplitCrossEntropyLoss, default_splits
from train import TEST_BATCH_SIZE, loss_columns, perplexity, set_products
from utils import build, check_writable, log, log_parts, read_checkpoint


@contextlib.contextmanager
def alone(args, command):
    """While this is held, the run is the only one at `args.save`, and its ranks are connected.

    Raises InputError unless all that the run may write can be written, and RankLost.
    """
    with contextlib.ExitStack() as held:
        if parallel.is_first():
            # What the run resumes is read, and looked at, later.
            mine = [] if args.resume == args.save else [args.save]
            check_writable(args.save, [*mine, *(f"{args.save}.e{epoch}" for epoch in args.when)])
            held.enter_context(exclusive(args.save))
        held.enter_context(
            parallel.group(args.device, lambda: how_to_resume(command, args.save))
        )
        args.save = parallel.first(args.save)  # one made from the time differs
        yield


def set_aside(path):
    """Keeps what an unfinished run has saved at `path` under another name, for a run that begins.

    Not that of a run of less than a minute and an epoch.
    """
    state = read_state(path)
    if state and not is_finished(state) and (state["logs"] or state["seconds"] > 60):
        copy = keep(path, ".unfinished", STATE)
        again = how_to_resume(state["command"], copy)
        log(f"Note: {path} is of an unfinished run, which is kept: {again} continues it")


def copy_model(path, save):
    """Copies the checkpoint at `path`, where there is one, to `save`; InputError if that exists."""
    if path == save:
        return
    if Path(save).exists():
        raise InputError(
            f"--save {save}: exists; --resume {save} goes on from it, or name another"
        )
    if Path(path).exists():
        read_checkpoint(path)
        write_atomically(save, Path(path).read_bytes())


def prepare(args):
    """Seeds the generators, reads the corpus, logs what will run.

    Returns the Corpus. Raises InputError, before anything is written, for what cannot work.
    """
    corpus = Corpus(args.data)
    if len(corpus.train) // args.batch_size < 2:
        raise InputError(
            f"--batch_size {args.batch_size}: the training split has {len(corpus.train)} tokens, "
            f"too few for {args.batch_size} columns of 2; lower it"
        )
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed + parallel.rank())  # other masks for other columns
    set_up_device(args)
    sizes = ", ".join(f"{split} {len(getattr(corpus, split)):,}" for split in SPLITS)
    log(f"Corpus {corpus.name}: tokens {sizes}; {len(corpus.dictionary):,} words")
    log(f"Corpus sha256: {corpus.digest}")
    ranks = f", {parallel.size()} processes" if parallel.size() > 1 else ""
    log(
        f"PyTorch {torch.__version__}, device {describe_device(args.device)}, "
        f"{torch.get_num_threads()} threads{ranks}"
    )
    log(f"Args: {plain(args)}")
    if args.model in NOTES:
        log(f"Note: {NOTES[args.model]}")
    return corpus


def set_up_device(args):
    """Makes `args.device` the current one, with products as `args.precision` says."""
    if args.device.type == "cuda":
        if args.device.index is not None:
            torch.cuda.set_device(args.device)
        use_expandable_segments()
    set_products(args.precision)


def new_params(corpus, args):
    """A new nn.ModuleList([model, criterion]) for the corpus, on `args.device`."""
    ntoken = len(corpus.dictionary)
    model = make_model(
        args.model, ntoken, args.emsize, args.nhid, args.nlayers, args.dropout, args.dropouth,
        args.dropouti, args.dropoute, args.wdrop, tie_weights=True, bf16=args.precision == "bf16",
        attention=args.attention, attention_window=args.attention_window,
    )
    criterion = SplitCrossEntropyLoss(args.emsize, default_splits(ntoken))
    return nn.ModuleList([model, criterion]).to(args.device)


def saved_params(path, corpus, args, content=None):
    """nn.ModuleList([model, criterion]) from the checkpoint at `path`, with `args`' dropouts.

    `content`: its bytes, where they are not to be read from `path`. Raises InputError when it is
    unusable or its vocabulary is not the corpus's.
    """
    checkpoint = read_checkpoint(path, args.device, content)
    check_vocabulary(checkpoint["vocabulary"], corpus, args.data, path)
    rates = {rate: getattr(args, rate) for rate in RATES}
    return build(checkpoint, path, bf16=args.precision == "bf16", **rates)


def check_vocabulary(words, corpus, data, path):
    """Raises InputError unless the corpus from --data has the words of the model at `path`."""
    if words != corpus.dictionary.idx2word:
        raise InputError(
            f"--data {data}: its vocabulary is not that of {path}; name the corpus that the model "
            "was trained on"
        )


def log_size(params):
    """Logs the number of parameters, the tied matrix counted once."""
    log(f"Model total parameters: {sum(p.numel() for p in params.parameters())}")


def finish(trainer):
    """Trains to the end, or until a signal, and tests the best model; returns the exit status.

    Raises InputError when, at last, a file could not be written.
    """
    status, check = 0, trainer.check
    try:
        trainer.fit()
    except Preempted as stop:
        status = 128 + stop.number
        if stop.number != signal.SIGINT:
            return status
        check = None  # the next signal ends it at once
    parallel.on_first(trainer.saver.retry)
    if trainer.best < math.inf:
        report_test(trainer, check)
    else:
        log("No epoch was finished, so there is no model to test")
    parallel.on_first(trainer.saver.retry)
    if lost := ", ".join(parallel.first(list(trainer.saver.pending))):
        raise InputError(f"{lost}: could not be written until the end; make room and train again")
    return status


def report_test(trainer, check):
    """Logs the test loss of the best model, from its file, beside the unigram model's."""
    corpus, args = trainer.corpus, trainer.args
    # Where the disk is full it is still at hand.
    content = trainer.saver.pending.get(str(args.save))
    content = parallel.first(None if content is None else bytes(content))
    params = saved_params(args.save, corpus, args, content)
    loss, parts = score(params, corpus.test, args, check, TEST_BATCH_SIZE)
    rule = "=" * 89
    log(f"{rule}\n| End of training | {loss_columns(loss, 'test ')}")
    log_parts(parts)
    log(rule)
    if args.model in NOTES:
        log(f"Note: {NOTES[args.model]}")
    unigram = perplexity(unigram_loss(corpus.train, corpus.test, len(corpus.dictionary)))
    log(f"For comparison: word frequencies alone (a unigram model) give test ppl {unigram:.2f}")
