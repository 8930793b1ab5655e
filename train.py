"""The training loop: one step, one epoch, one evaluation, and NT-ASGD around them."""

import json
import math
import random
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from data import SPLITS, Corpus, InputError, batchify, batchify_exact, get_batch, unigram_loss
from flags import plain
from model import RNNModel
from splitcross import SplitCrossEntropyLoss, default_splits
from utils import (
    FINETUNE_RECORDS, RATES, RECORDS, build, check_writable, log, read_checkpoint, repackage_hidden,
    save_checkpoint,
)

EVAL_BATCH_SIZE, TEST_BATCH_SIZE = 10, 1  # as in the reference


def perplexity(loss):
    """exp of a loss in nats; inf where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def random_seq_len(bptt):
    """The length of the next window (section 4.1 of Merity et al. 2017, 1708.02182), at least 5.

    N(bptt, 5) with probability 0.95, else N(bptt / 2, 5): the windows' borders fall elsewhere in
    each epoch. Capped at five standard deviations above bptt (one draw in 3.5 million), so that
    memory is bounded.
    """
    mean = bptt if np.random.random() < 0.95 else bptt / 2
    return min(max(5, int(np.random.normal(mean, 5))), bptt + 25)


def activation_regularization(raw_output, output, alpha, beta):
    """AR + TAR of the last layer (Merity et al. 2017, 1708.01009), each a mean of squares.

    AR is alpha * mean(output^2), over the output after dropout; TAR is beta * mean((h_t+1 -
    h_t)^2), over the output before dropout. Both [T, B, H]; TAR is 0 where T is 1. The papers
    print norms; the published results were made with means of squares.
    """
    penalty = 0.0
    if alpha:
        penalty = penalty + alpha * output.pow(2).mean()
    if beta and len(raw_output) > 1:
        penalty = penalty + beta * (raw_output[1:] - raw_output[:-1]).pow(2).mean()
    return penalty


def train_step(params, optimizer, data, targets, hidden, args):
    """One step of truncated BPTT on `data` [L, B] and `targets` [L*B].

    `params` is nn.ModuleList([model, criterion]). The learning rate of this step is scaled by
    L / bptt, so that short windows do not weigh as much as long ones. Returns the loss in nats
    without AR and TAR, a tensor that stays on its device, and the new hidden state.
    """
    model, criterion = params
    hidden = repackage_hidden(hidden)
    optimizer.zero_grad()
    output, hidden, raw_outputs, outputs = model(data, hidden, return_h=True)
    raw_loss = criterion(model.decoder.weight, model.decoder.bias, output, targets)
    penalty = activation_regularization(raw_outputs[-1], outputs[-1], args.alpha, args.beta)
    (raw_loss + penalty).backward()
    if args.clip:
        clip_grad_norm_(params.parameters(), args.clip)
    group = optimizer.param_groups[0]
    lr = group["lr"]
    group["lr"] = lr * len(data) / args.bptt
    optimizer.step()
    group["lr"] = lr
    return raw_loss.detach(), hidden


class Losses:
    """The losses of a pass. They stay on their device until `read`, which makes the host wait."""

    def __init__(self):
        self.on_device, self.on_host = [], []  # (loss, tokens) pairs

    def add(self, loss, tokens):
        self.on_device.append((loss, tokens))

    def read(self):
        """Fetches what has been added."""
        if not self.on_device:
            return
        losses, tokens = zip(*self.on_device)
        self.on_device.clear()
        self.on_host.extend(zip(torch.stack(losses).tolist(), tokens))

    def check(self):
        """Raises FloatingPointError, naming the batch, when a loss that was read is not finite."""
        for batch, (loss, _) in enumerate(self.on_host, 1):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at batch {batch}")

    def mean(self, last=0):
        """The mean loss per token of the `last` batches read, or of all."""
        chosen = self.on_host[-last:]
        return math.fsum(loss * n for loss, n in chosen) / sum(n for _, n in chosen)


def train_epoch(params, optimizer, source, args, epoch, averaged=None):
    """One pass over `source` [T, B]. Returns (mean loss in nats per token, tokens per second).

    With `averaged`, an AveragedModel, each iterate enters its mean. Raises FloatingPointError
    when the loss is no longer finite.
    """
    params.train()
    hidden = params[0].init_hidden(source.size(1))
    losses, interval = Losses(), args.log_interval
    batch, i = 0, 0
    start = log_start = time.perf_counter()
    predictions = (len(source) - 1) * source.size(1)
    bar = tqdm(
        desc=f"epoch {epoch}", total=predictions, unit=" tokens", unit_scale=True, leave=False,
        file=sys.stderr, disable=not sys.stderr.isatty(),
    )
    with bar:
        while i < len(source) - 1:
            data, targets = get_batch(source, i, args, seq_len=random_seq_len(args.bptt))
            loss, hidden = train_step(params, optimizer, data, targets, hidden, args)
            if averaged is not None:
                averaged.update_parameters(params)
            losses.add(loss, data.numel())
            batch += 1
            i += len(data)
            bar.update(data.numel())
            # On the CPU reading costs nothing. A GPU has to be waited for: only for a log line.
            if source.device.type == "cpu" or batch % interval == 0:
                losses.read()
                recent = losses.mean(last=(batch - 1) % interval + 1)
                if not math.isfinite(recent):
                    break
                bar.set_postfix(ppl=f"{perplexity(recent):.2f}", refresh=False)
            if batch % interval == 0:
                now = time.perf_counter()
                log(
                    f"| epoch {epoch:3d} | {batch:5d}/{len(source) // args.bptt:5d} batches "
                    f"| lr {optimizer.param_groups[0]['lr']:05.5f} "
                    f"| ms/batch {(now - log_start) * 1000 / interval:5.2f} "
                    f"| {loss_columns(recent)}"
                )
                log_start = now
    losses.read()
    losses.check()
    return losses.mean(), predictions / (time.perf_counter() - start)


def loss_columns(loss, kind=""):
    """The columns of a log line: loss in nats, perplexity, bits per token."""
    return (
        f"{kind}loss {loss:5.2f} | {kind}ppl {perplexity(loss):8.2f} "
        f"| {kind}bpc {loss / math.log(2):8.3f}"
    )


@torch.no_grad()
def evaluate(params, ids, batch_size, bptt):
    """Mean negative log-likelihood, in nats, of the N - 1 tokens of `ids` [N] that follow another.

    Each is predicted exactly once. Read in `batch_size` columns, whose first state is zero, in
    windows of `bptt` that carry the state along: the window does not change the result (but for
    biLSTM's, whose backward direction reads no further than its window).
    """
    model, criterion = params
    params.eval()
    device = model.encoder.weight.device
    inputs, targets, n = batchify_exact(ids, batch_size)
    inputs, targets = inputs.to(device), targets.to(device)
    hidden = model.init_hidden(batch_size)
    losses = Losses()
    for i in range(0, len(inputs), bptt):
        output, hidden = model(inputs[i : i + bptt], hidden)
        # All but the end of the last window is predicted; what follows n is padding.
        count = min(len(output), n - i * batch_size)
        weight, bias = model.decoder.weight, model.decoder.bias
        window = targets[i : i + bptt].flatten()
        losses.add(criterion(weight, bias, output[:count], window[:count]), count)
    losses.read()
    return losses.mean()


def nonmonotone(logs, loss, nonmono):
    """The trigger of NT-ASGD: is `loss` worse than the best of `logs`, its last n left out?

    `logs` holds the validation losses of the earlier epochs. The paper's Algorithm 1 misprints
    the range; this is the published code's, which its authors confirmed.
    """
    return len(logs) > nonmono and loss > min(logs[: len(logs) - nonmono])


def fit(params, corpus, args, best=math.inf, finetuning=False):
    """Trains for at most `args.epochs` epochs with NT-ASGD, saving the best model at `args.save`.

    SGD runs until the validation loss meets the trigger; from then on the plain mean of the
    iterates since is what is evaluated and saved, while SGD goes on from its own. With
    `finetuning` the mean is kept from the first step, and the trigger ends the run. Ctrl-C ends
    it too. Only a model with a validation loss below `best` is saved.

    Returns (interrupted, saved): whether Ctrl-C ended it, whether it saved a model. Raises
    InputError when a loss is not finite.
    """
    source = batchify(corpus.train, args.batch_size, args)
    optimizer = make_optimizer(params, args)
    averaged = AveragedModel(params) if finetuning else None
    logs, saved = [], False  # validation losses of the epochs so far
    try:
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            lr = optimizer.param_groups[0]["lr"]
            train_loss, tokens_per_s = train_epoch(
                params, optimizer, source, args, epoch, averaged
            )
            evaluated = params if averaged is None else averaged.module
            loss = evaluate(evaluated, corpus.valid, EVAL_BATCH_SIZE, args.bptt)
            seconds = time.perf_counter() - start
            rule = "-" * 89
            columns = loss_columns(loss, "valid ")
            log(f"{rule}\n| end of epoch {epoch:3d} | time: {seconds:5.2f}s | {columns}\n{rule}")
            if not math.isfinite(loss):
                raise FloatingPointError(f"the validation loss is {loss}")
            progress = {
                "epoch": epoch, "valid_loss": loss, "averaged": averaged is not None,
                "finetuned": finetuning,
            }
            if loss < best:
                save_checkpoint(args.save, evaluated, corpus, plain(args), **progress)
                best, saved = loss, True
                what = "model" if averaged is None else "averaged weights"
                log(f"Saving {what} (new best validation)")
            write_record(
                args, finetuning,
                epoch=epoch, seconds=round(seconds, 2),
                train_loss=train_loss, train_ppl=perplexity(train_loss),
                valid_loss=loss, valid_ppl=perplexity(loss),
                lr=lr, averaging=averaged is not None, tokens_per_s=round(tokens_per_s, 1),
            )
            if nonmonotone(logs, loss, args.nonmono):
                if finetuning:
                    log("Done: validation has stopped improving")
                    break
                if averaged is None and args.optimizer == "sgd":
                    log("Switching to averaged SGD (NT-ASGD)")
                    averaged = AveragedModel(params)
            logs.append(loss)
            if epoch in args.when:
                save_checkpoint(
                    f"{args.save}.e{epoch}", evaluated, corpus, plain(args), **progress
                )
                log(f"Saving model to {args.save}.e{epoch}; dividing the learning rate by 10")
                optimizer.param_groups[0]["lr"] /= 10
    except FloatingPointError as error:
        advice = "try a lower --lr" + ("" if args.clip else " or --clip 0.25")
        kept = f"{args.save} keeps the best model so far" if saved else "no model was saved"
        raise InputError(f"epoch {epoch}, lr {lr:g}: {error}; {advice}; {kept}") from None
    except KeyboardInterrupt:
        log("-" * 89 + "\nExiting from training early")
        return True, saved
    return False, saved


def make_optimizer(params, args):
    """SGD or Adam over the parameters of model and criterion alike."""
    kind = torch.optim.Adam if args.optimizer == "adam" else torch.optim.SGD
    return kind(params.parameters(), lr=args.lr, weight_decay=args.wdecay)


def write_record(args, finetuning, **record):
    """Adds one epoch's JSON line to the file beside the checkpoint.

    Epoch 1 starts it anew, except in a run that resumes the very checkpoint it belongs to.
    """
    anew = record["epoch"] == 1 and (finetuning or args.resume != args.save)
    # JSON has no infinity: a perplexity past the largest float becomes null.
    record = {k: None if v == math.inf else v for k, v in record.items()}
    path = f"{args.save}{FINETUNE_RECORDS if finetuning else RECORDS}"
    with open(path, "w" if anew else "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def prepare(args):
    """Seeds the generators, checks `args.save`, reads the corpus, logs what will run.

    Returns the Corpus. Raises InputError, before anything is written, for what cannot work.
    """
    check_writable(args.save, [f"{args.save}.e{epoch}" for epoch in args.when])
    corpus = Corpus(args.data)
    if len(corpus.train) // args.batch_size < 2:
        raise InputError(
            f"--batch_size {args.batch_size}: the training split has {len(corpus.train)} tokens, "
            f"too few for {args.batch_size} columns of 2; lower it"
        )
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    sizes = ", ".join(f"{split} {len(getattr(corpus, split)):,}" for split in SPLITS)
    log(f"Corpus {corpus.name}: tokens {sizes}; {len(corpus.dictionary):,} words")
    log(f"Corpus sha256: {corpus.digest}")
    log(f"PyTorch {torch.__version__}, device {args.device}, {torch.get_num_threads()} threads")
    log(f"Args: {plain(args)}")
    if args.model == "biLSTM":
        log(
            "Note: biLSTM reads the word it predicts; its loss is no language model's (the "
            "report's model, kept as a replication)"
        )
    return corpus


def new_params(corpus, args):
    """A new nn.ModuleList([model, criterion]) for the corpus, on `args.device`."""
    ntoken = len(corpus.dictionary)
    model = RNNModel(
        args.model, ntoken, args.emsize, args.nhid, args.nlayers, args.dropout, args.dropouth,
        args.dropouti, args.dropoute, args.wdrop, tie_weights=True,
    )
    criterion = SplitCrossEntropyLoss(args.emsize, default_splits(ntoken))
    return nn.ModuleList([model, criterion]).to(args.device)


def saved_params(path, corpus, args):
    """nn.ModuleList([model, criterion]) from the checkpoint at `path`, with `args`' dropouts.

    Raises InputError when it is unusable or its vocabulary is not the corpus's.
    """
    checkpoint = read_checkpoint(path, args.device)
    if checkpoint["vocabulary"] != corpus.dictionary.idx2word:
        raise InputError(
            f"--data {args.data}: its vocabulary is not that of {path}; name the corpus that the "
            "model was trained on"
        )
    return build(checkpoint, path, **{rate: getattr(args, rate) for rate in RATES})


def log_size(params):
    """Logs the number of parameters, the tied matrix counted once."""
    log(f"Model total parameters: {sum(p.numel() for p in params.parameters())}")


def report_test(corpus, args):
    """Loads the best model from `args.save` and logs its test loss beside the unigram model's."""
    params = saved_params(args.save, corpus, args)
    loss = evaluate(params, corpus.test, TEST_BATCH_SIZE, args.bptt)
    rule = "=" * 89
    log(f"{rule}\n| End of training | {loss_columns(loss, 'test ')}\n{rule}")
    unigram = perplexity(unigram_loss(corpus.train, corpus.test, len(corpus.dictionary)))
    log(f"For comparison: word frequencies alone (a unigram model) give test ppl {unigram:.2f}")
