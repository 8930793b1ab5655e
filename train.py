"""Training: one step, one evaluation, schedules, and NT-ASGD over the epochs of a run."""

import json
import math
import os
import signal
import sys
import time
from argparse import Namespace
from copy import deepcopy

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_swa_multi_avg_fn
from tqdm import tqdm

import distributed
from bidirectional import OBJECTIVES, BiObjective, evaluate_directions, is_bilm, make_model
from checkpoint import read_checkpoint, read_state, training_settings
from data import InputError, batchify, exact_windows, get_batch, unigram_loss
from model import DROPOUTS, NOTES, activation_regularization
from splitcross import SplitCrossEntropyLoss, default_splits
from utils import (
    Losses, Preempted, environment, float32_products, get_generators, is_out_of_memory, log,
    log_parts, loss_columns, map_hidden, perplexity, repackage_hidden, set_generators, warn,
)
from weight_drop import WeightDrop

EVAL_BATCH_SIZE, TEST_BATCH_SIZE = 10, 1  # as in the reference
EVAL_TOKENS = 2000  # in a window of an evaluation: long windows keep a GPU busy
LONGER = 25  # the most by which a window exceeds bptt: five standard deviations
REGULARIZERS = (*DROPOUTS, "alpha", "beta")
UP = 0.1  # the share of a run over which one cycle's rate rises
FIRST, LAST = 1 / 25, 1 / 250_000  # one cycle's first and last rate, as shares of its highest
TRAPEZOID = (0, 0.08, 0.48, 0.92, 1), (0.1, 1, 1, 0.1, 0)  # shares of the run, and of the rate then
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.99)}),  # they forget sooner than by default
}
OPTIMIZER_FLAGS = ("lr", "bias_lr", "wdecay")
HIGH_LOSSES = 20  # batches in a row with a loss above ln(vocabulary) + 1: the run has diverged
ROLLBACKS = 3
SAVING_SHARE = 0.01  # of the time that saving the state may take


class Diverged(Exception):
    """Training has left the region where it can learn; the message says where and how."""


# ------------------------------------------------------------ one step


def random_seq_len(bptt):
    """The length of the next window (section 4.1 of Merity et al. 2017, 1708.02182), at least 5.

    N(bptt, 5) with probability 0.95, else N(bptt / 2, 5): the windows' borders fall elsewhere in
    each epoch. Capped at LONGER above bptt, so that memory is bounded.
    """
    mean = bptt if np.random.random() < 0.95 else bptt / 2
    return min(max(5, int(np.random.normal(mean, 5))), bptt + LONGER)


def new_params(corpus, args):
    """A new nn.ModuleList([model, criterion]) for the corpus, on `args.device`."""
    ntoken = len(corpus.dictionary)
    model = make_model(
        args.model, ntoken, args.emsize, args.nhid, args.nlayers, tie_weights=True,
        attention=args.attention, attention_window=args.attention_window, **training_settings(args),
    )
    criterion = SplitCrossEntropyLoss(args.emsize, default_splits(ntoken))
    return nn.ModuleList([model, criterion]).to(args.device)


class Objective(nn.Module):
    """What a step minimizes, as one module that can be replicated, criterion included.

    `params` is nn.ModuleList([model, criterion]).
    """

    def __init__(self, params):
        super().__init__()
        self.params = params

    def groups(self):
        """Lists of the parameters that learn together, whose gradient is clipped as one."""
        return [list(self.parameters())]

    def forward(self, data, targets, hidden, alpha, beta):
        """data [L, B], targets [L*B] -> (loss + AR + TAR, the loss in nats alone, hidden)."""
        model, criterion = self.params
        output, hidden, raw_outputs, outputs = model(data, hidden, return_h=True)
        loss = criterion(model.decoder.weight, model.decoder.bias, output, targets)
        penalty = activation_regularization(raw_outputs[-1], outputs[-1], alpha, beta)
        return loss + penalty, loss.detach(), hidden


def make_objective(params, args):
    """The objective of the model in `params`."""
    return BiObjective(params, args.objective) if is_bilm(params) else Objective(params)


def train_step(objective, optimizer, data, targets, hidden, args, rate_share=1.0, **more):
    """One step of truncated BPTT on `data` [L, B] and `targets` [L*B].

    The learning rate of this step is the optimizer's times `rate_share`, what a schedule leaves of
    it, times L / bptt, so that short windows do not weigh as much as long ones. The objective gets
    `more` as well. Returns the loss in nats without AR and TAR, a tensor that stays on its device,
    and the new hidden state.
    """
    hidden = repackage_hidden(hidden)
    optimizer.zero_grad()
    total, loss, hidden = objective(data, targets, hidden, args.alpha, args.beta, **more)
    total.backward()
    if args.clip:
        for parameters in getattr(objective, "module", objective).groups():  # of its replica
            clip_grad_norm_(parameters, args.clip)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate * rate_share * len(data) / args.bptt
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    return loss, hidden


def make_optimizer(params, args):
    """SGD, Adam or AdamW over the parameters of model and criterion alike.

    The last of its two groups is the biases below the decoder (of recurrent layers, attention and
    combiner), whose rate is `args.bias_lr` times `args.lr`.
    """
    kind, settings = OPTIMIZERS[args.optimizer]
    biases = [
        p for name, p in params[0].named_parameters() if "bias" in name and name != "decoder.bias"
    ]
    known = set(biases)
    others = [p for p in params.parameters() if p not in known]
    groups = [{"params": others}, {"params": biases, "lr": args.lr * args.bias_lr}]
    fused = others[0].device.type in ("cpu", "cuda")  # one pass over weights and gradients
    return kind(groups, lr=args.lr, weight_decay=args.wdecay, fused=fused, **settings)


class Average:
    """The plain mean of the weights after every step since it was made, in `params`.

    Polyak and Juditsky 1992; section 3 of Merity et al. 2017 (1708.02182). The count stays on the
    host, so that no step waits for the device.
    """

    def __init__(self, params):
        self.params = deepcopy(params).requires_grad_(False)
        self.params.zero_grad()  # the gradients were copied too
        for module in self.params.modules():
            if isinstance(module, nn.RNNBase):  # a copy's weights lie apart, which cuDNN warns of
                module.flatten_parameters()
        self.count = 0

    def update(self, params):
        """Takes the weights of `params` into the mean."""
        mean, weights = list(self.params.parameters()), list(params.parameters())
        with torch.no_grad():
            get_swa_multi_avg_fn()(mean, weights, self.count)
        self.count += 1

    def state_dict(self):
        return {"count": self.count, "params": self.params.state_dict()}

    def load_state_dict(self, state):
        self.count = state["count"]
        self.params.load_state_dict(state["params"])


def is_nonmonotone(valid_losses, loss, nonmono):
    """The trigger of NT-ASGD: is `loss` worse than the best of `valid_losses` but the last n?

    `valid_losses` are the earlier epochs'. The paper's Algorithm 1 misprints the range; this is the
    published code's, which its authors confirmed.
    """
    return len(valid_losses) > nonmono and loss > min(valid_losses[: len(valid_losses) - nonmono])


# ------------------------------------------------------------ one evaluation


@torch.no_grad()
@float32_products()
def evaluate(params, ids, batch_size, bptt, check=None):
    """Mean negative log-likelihood, in nats, of the N - 1 tokens of `ids` [N] that follow another.

    Each is predicted exactly once, by float32 products. Read in `batch_size` columns, whose first
    state is zero, in windows of `bptt` that carry the state along; the window changes the result of
    biLSTM alone. The ranks share the columns. `check` is called after each window.
    """
    model, criterion = params
    params.eval()
    weight, bias = model.decoder.weight, model.decoder.bias
    columns = distributed.columns(batch_size)
    hidden = model.init_hidden(columns.stop - columns.start)
    losses = Losses()
    for data, targets, count in exact_windows(ids.to(weight.device), batch_size, bptt, columns):
        if count:
            output, hidden = model(data, hidden)
            losses.add(criterion(weight, bias, output[:count], targets.flatten()[:count]), count)
        if check is not None:
            check()
    return losses.mean_of_all_ranks()


def score(params, ids, args, check=None, batch_size=EVAL_BATCH_SIZE):
    """The loss in nats of `ids` [N] that training minimizes, and {name: loss} of its parts, if any.

    See `evaluate`. In long windows, but for biLSTM.
    """
    window = args.bptt
    if params[0].rnn_type != "biLSTM":
        window = max(window, EVAL_TOKENS // batch_size)
    if not is_bilm(params):
        return evaluate(params, ids, batch_size, window, check), {}
    parts = evaluate_directions(params, ids, batch_size, window, check)
    chosen = OBJECTIVES[args.objective]
    return sum(parts[name] for name in chosen) / len(chosen), parts


# ------------------------------------------------------------ schedules


def scheduled_share(schedule, progress):
    """The learning rate at `progress`, in [0, 1], as a share of the highest, which is --lr.

    onecycle (Smith and Topin 2017, 1708.07120): half a cosine wave from FIRST up to 1 over UP of
    the run, and another from there down to LAST. torch's OneCycleLR with pct_start=UP has the same
    waves, but counts steps, whose number random windows do not tell beforehand.

    trapezoid: straight lines between the points of TRAPEZOID.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "trapezoid":
        return float(np.interp(progress, *TRAPEZOID))
    if progress < UP:
        return half_cosine(FIRST, 1.0, progress / UP)
    return half_cosine(1.0, LAST, min(1.0, (progress - UP) / (1 - UP)))


def half_cosine(first, last, share):
    """Half a cosine wave from `first` to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def regularizers_at(epochs, args):
    """{flag: value} of dropouts, weight drop, AR and TAR after so many `epochs`, of a ramp.

    Their strength rises linearly from SHARE to 1 over the ramp's EPOCHS.
    """
    share, whole_after = args.regularization_ramp
    strength = min(1.0, share + (1 - share) * epochs / whole_after)
    return {name: strength * getattr(args, name) for name in REGULARIZERS}


def settings_at(epochs, args, model):
    """The flags of a step after so many `epochs`, and its share of the learning rate.

    With a ramp the dropout rates of `model`, an RNNModel, are set too.
    """
    share = scheduled_share(args.schedule, epochs / args.epochs)
    if not args.regularization_ramp:
        return args, share
    settings = regularizers_at(epochs, args)
    for name in DROPOUTS:
        setattr(model, name, settings[name])
    for module in model.modules():
        if isinstance(module, WeightDrop):
            module.dropout = settings["wdrop"]
    return Namespace(**{**vars(args), **settings}), share


# ------------------------------------------------------------ a run


def roll_columns(text, offsets):
    """`text` [rows, B] with each column read from its offset [B] on, then from its start.

    Partial shuffle (Press 2019, 1903.04167), when the offsets are drawn anew at each epoch.
    """
    rows = torch.arange(len(text), device=text.device).unsqueeze(1)
    return text.gather(0, (rows + offsets) % len(text))


class Trainer:
    """A run of NT-ASGD that can end at any batch and go on as if it had not.

    SGD runs until the validation loss meets the trigger; from then on the plain mean of the weights
    since is what is evaluated and saved, while SGD goes on from its own. With `finetuning` the mean
    is kept from the first step, and the trigger ends the run. Only a model with a validation loss
    below `best` is saved; beside it the training state, at the start, after an epoch and every
    `args.checkpoint_minutes`.

    `params` is nn.ModuleList([model, criterion]); `run` the checkpoint.Run that writes the files
    and knows of signals.
    """

    # What the training state holds of the trainer itself, as plain data.
    PROGRESS = (
        "finetuning", "epoch", "row", "valid_losses", "best", "records", "done",
        "high_loss_streak", "rollbacks", "rate_divisor", "offsets",
    )

    def __init__(self, params, corpus, args, run, finetuning=False, best=math.inf, records=""):
        self.params, self.corpus, self.args, self.run = params, corpus, args, run
        self.finetuning = finetuning
        # biLM reads the text from its end as well.
        texts = [corpus.train, corpus.train.flip(0)] if is_bilm(params) else [corpus.train]
        self.texts = [self.columns_of(ids) for ids in texts]  # each [rows, columns]
        self.rows = len(self.texts[0])
        self.set_offsets(None)
        self.objective = distributed.replicate(make_objective(params, args))
        self.optimizer = make_optimizer(params, args)
        self.average = Average(params) if finetuning else None
        self.epoch, self.row = 1, 0  # the epoch that is running; where its next window starts
        self.hidden, self.losses = None, Losses()
        self.valid_losses, self.best, self.records = [], best, records
        self.done = False  # whether the trigger has ended fine-tuning
        self.high_loss_streak, self.rollbacks = 0, 0
        self.rate_divisor = 1  # of the learning rate: what --when and rollbacks have made of it
        self.too_high = math.log(len(corpus.dictionary)) + 1
        self.saved = False  # whether the state on disk is one to go back to, with these flags
        self.saved_at, self.saving_seconds = time.perf_counter(), 0.0
        self.start_clock(0.0)

    def columns_of(self, ids):
        """This rank's columns of a text, on its device."""
        columns = distributed.columns(self.args.batch_size)
        return batchify(ids, self.args.batch_size)[:, columns].to(self.args.device).contiguous()

    def set_offsets(self, offsets):
        """Has this epoch read the columns from `offsets`, one for each of the batch; None for 0."""
        self.offsets, self.streams = offsets, self.texts
        if offsets is not None:
            mine = torch.tensor(offsets, device=self.args.device)
            mine = mine[distributed.columns(self.args.batch_size)]
            self.streams = [roll_columns(text, mine) for text in self.texts]

    def start_clock(self, seconds):
        self.seconds_before, self.started = seconds, time.perf_counter()

    def seconds(self):
        """The time spent in this epoch, that before an interruption included."""
        return self.seconds_before + time.perf_counter() - self.started

    def is_over(self):
        return self.done or self.epoch > self.args.epochs

    def epochs_read(self):
        """How often the text has been read, a number with a fraction."""
        return self.epoch - 1 + self.row / (self.rows - 1)

    def position(self):
        """Where the run is, in words."""
        phase = " of fine-tuning" if self.finetuning else ""
        return f"epoch {self.epoch}{phase}, batch {len(self.losses.on_host)}"

    # -------------------------------------------------------- the loop

    def fit(self):
        """Trains until `args.epochs` epochs are done, or fine-tuning has met the trigger.

        Raises InputError when training diverges for good or memory runs out, and Preempted after a
        signal, when the state is saved.
        """
        try:
            if self.args.device.type == "cuda" and not self.is_over():
                self.try_longest_window()
            while not self.is_over():
                try:
                    if not self.saved:
                        self.save_state()
                    self.train_epoch()
                    self.end_epoch()
                    if distributed.broadcast(self.is_due()) or self.is_over():
                        self.save_state()
                except Diverged as error:
                    self.recover(error)
        except Preempted as stop:
            self.save_at_exit(stop)
            raise
        except (MemoryError, RuntimeError) as error:
            begun = (self.epoch, self.row) != (1, 0)
            if not (is_out_of_memory(error) and begun):
                raise
            raise InputError(
                f"device {self.args.device} is out of memory at {self.position()}; "
                f"{self.run.resume_command} --bptt {max(1, self.args.bptt * 3 // 4)} goes on "
                "from the last saved state in shorter windows"
            ) from None

    def train_epoch(self):
        """What is left of a pass over the text. Raises Diverged, or Preempted."""
        args = self.args
        self.params.train()
        if self.row == 0:
            self.hidden = self.params[0].init_hidden(self.texts[0].size(1))
            if args.partial_shuffle:
                self.set_offsets(np.random.randint(self.rows, size=args.batch_size).tolist())
        with EpochLog(self) as epoch_log:
            while self.row < self.rows - 1:
                settings, share = settings_at(self.epochs_read(), args, self.params[0])
                data, targets, more = self.window(self.row, random_seq_len(args.bptt))
                loss, self.hidden = train_step(
                    self.objective, self.optimizer, data, targets, self.hidden, settings, share,
                    **more,
                )
                if self.average is not None:
                    self.average.update(self.params)
                self.row += len(data)
                self.losses.add(distributed.mean(loss), len(data) * args.batch_size)
                epoch_log.after_batch(len(data), share)
                if self.run.check(self.is_due(60 * args.checkpoint_minutes)):
                    self.save_state()
        self.check_losses()

    def end_epoch(self):
        """Evaluates, saves the model where it is the best, pulls the trigger, begins an epoch."""
        args, train_loss, train_seconds = self.args, self.losses.mean(), self.seconds()
        lr = self.optimizer.param_groups[0]["lr"]
        evaluated = self.params if self.average is None else self.average.params
        loss, parts = score(evaluated, self.corpus.valid, args, self.run.check)
        log(
            f"{'-' * 89}\n| end of epoch {self.epoch:3d} | time: {self.seconds():5.2f}s "
            f"| {loss_columns(loss, 'valid ')}"
        )
        log_parts(parts)
        log("-" * 89)
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss}")
        self.save_model(evaluated, loss)
        self.add_record(
            epoch=self.epoch, seconds=round(self.seconds(), 2),
            train_loss=train_loss, train_ppl=perplexity(train_loss),
            valid_loss=loss, valid_ppl=perplexity(loss),
            **{f"{name}_ppl": perplexity(part) for name, part in parts.items()},
            lr=lr * scheduled_share(args.schedule, self.epochs_read() / args.epochs),
            averaging=self.average is not None,
            tokens_per_s=round(sum(n for _, n in self.losses.on_host) / train_seconds, 1),
        )
        if self.epoch in args.when:
            log("Dividing the learning rate by 10")
            self.rate_divisor *= 10
            self.set_rates()
        if is_nonmonotone(self.valid_losses, loss, args.nonmono):
            self.trigger()
        self.valid_losses.append(loss)
        self.epoch, self.row, self.hidden, self.losses = self.epoch + 1, 0, None, Losses()
        self.start_clock(0.0)

    def trigger(self):
        """Validation has stopped improving: averaging begins; in fine-tuning, the run ends."""
        if self.finetuning:
            log("Done: validation has stopped improving")
            self.done = True
        elif self.average is None and self.args.optimizer == "sgd":
            log("Switching to averaged SGD (NT-ASGD)")
            self.average = Average(self.params)

    def window(self, row, seq_len):
        """Words [L, B] and targets [L*B] from `row` on, and what else the objective takes."""
        (data, targets), *backward = (
            get_batch(stream, row, self.args, seq_len=seq_len) for stream in self.streams
        )
        return data, targets, {"backward": backward[0], "begins": row == 0} if backward else {}

    def try_longest_window(self):
        """Computes the gradients of the longest window there can be, and forgets them.

        So what windows need of memory runs out now, not hours into the run. Neither weights nor
        random numbers change.
        """
        args = self.args
        self.params.train()
        data, targets, more = self.window(0, min(args.bptt + LONGER, self.rows - 1))
        with torch.random.fork_rng([args.device] if data.is_cuda else []):
            hidden = self.params[0].init_hidden(data.size(1))
            total, *_ = self.objective(data, targets, hidden, args.alpha, args.beta, **more)
            total.backward()
        self.optimizer.zero_grad()

    # -------------------------------------------------------- files

    def save_model(self, params, loss):
        """Saves `params` if `loss` is the lowest yet, and after the epochs of --when."""
        path, paths = self.args.save, []
        if loss < self.best:
            self.best, paths = loss, [path]
            what = "model" if self.average is None else "averaged weights"
            log(f"Saving {what} (new best validation)")
        if self.epoch in self.args.when:
            paths.append(f"{path}.e{self.epoch}")
            log(f"Saving model to {paths[-1]}")
        if paths:
            self.run.save_model(
                paths, params, self.corpus, epoch=self.epoch, valid_loss=loss,
                averaged=self.average is not None, finetuned=self.finetuning,
            )

    def add_record(self, **record):
        """Adds one epoch's JSON line to the file beside the checkpoint."""
        # JSON has no infinity: a perplexity past the largest float becomes null.
        record = {k: None if v == math.inf else v for k, v in record.items()}
        self.records += json.dumps(record) + "\n"
        self.run.save_records(self.records, self.finetuning)

    def state_dict(self):
        """All that `load_state_dict` needs to go on from here: tensors and plain data."""
        hidden = distributed.all_gather(map_hidden(lambda h: h.detach().cpu(), self.hidden))
        return {
            **{name: getattr(self, name) for name in self.PROGRESS},
            "environment": environment(self.args.device),
            "losses": self.losses.on_host,
            "seconds": self.seconds(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hidden": map_hidden(lambda *parts: torch.cat(parts, 1), *hidden),
            "generators": get_generators(self.args.device),
        }

    def load_state_dict(self, state):
        """Goes back to `state`, but for the flags that have changed since."""
        args = self.args
        self.params[0].load_state_dict(state["model"])
        self.params[1].load_state_dict(state["criterion"])
        self.average = None
        if state["average"] is not None:
            self.average = Average(self.params)
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in self.PROGRESS:
            setattr(self, name, state[name])
        self.set_offsets(self.offsets)
        if args.lr != state["flags"]["lr"]:
            self.rate_divisor = 1
        self.set_rates()
        self.losses = Losses(state["losses"])
        self.start_clock(state["seconds"])
        set_generators(state["generators"], args.device)
        columns = distributed.columns(args.batch_size)
        self.hidden = map_hidden(
            lambda h: h[:, columns].to(args.device, copy=True).contiguous(), state["hidden"]
        )

    def set_rates(self):
        """Gives the optimizer the learning rates and the weight decay that the flags name."""
        for group, share in zip(self.optimizer.param_groups, (1.0, self.args.bias_lr)):
            group["lr"] = self.args.lr * share / self.rate_divisor
            group["weight_decay"] = self.args.wdecay

    def resume(self, state, changed):
        """Goes on from `state`, read from beside `args.resume`, and logs that.

        `changed` lists what keeps it from going on bit-identical to a run never interrupted. Raises
        InputError when the checkpoint is unusable.
        """
        self.load_state_dict(state)
        log(f"Resuming the run of {self.args.save} at {self.position()}")
        if self.best < math.inf:
            changed = changed + self.compare_best_model(state)
        if changed:
            log(f"Note: no longer bit-identical to a run never interrupted: {'; '.join(changed)}")
        else:
            log("It goes on bit-identical to a run never interrupted")
        if self.done:
            log("It has come to its end: validation has stopped improving")
        elif self.is_over():
            more = "--finetune" if self.finetuning and "finetune" in self.run.flags else "--epochs"
            log(f"It has come to its end; {more} asks for more")

    def compare_best_model(self, state):
        """What keeps the best model on disk from being that of `state`: [] if nothing."""
        path = self.args.save
        if os.path.exists(path):
            checkpoint = read_checkpoint(path)
            for key in ("architecture", "vocabulary"):
                if checkpoint[key] != state[key]:
                    raise InputError(
                        f"{path}: its {key} is not that of the training state beside it; put the "
                        "right file there, or remove the state to start from the weights alone"
                    )
            return []
        if self.is_over():
            raise InputError(
                f"{path}: the model of this finished run is gone; put it back, or ask for more "
                "epochs"
            )
        missing = f"{path} (valid loss {self.best:.2f}) is gone"
        warn(f"Warning: {missing}; the model of the next epoch takes its place")
        self.best = math.inf
        return [missing]

    def save_state(self):
        """Writes the state; returns whether that, and all that waited to be written, succeeded.

        Never one whose losses and weights are not all finite: raises Diverged instead.
        """
        start = time.perf_counter()
        self.check_losses()
        if not all(p.isfinite().all() for p in self.params.parameters()):
            raise Diverged("a weight is no longer finite")
        succeeded = self.run.save_state(self.params, self.corpus, self.state_dict())
        self.saved = self.saved or succeeded
        self.saved_at = time.perf_counter()
        self.saving_seconds = self.saved_at - start
        return succeeded

    def is_due(self, seconds=0.0):
        """Whether a state that is `seconds` old is to be replaced; by the first rank's clock."""
        since = time.perf_counter() - self.saved_at
        good = self.high_loss_streak == 0 or self.args.on_divergence == "continue"
        due = good and since >= max(seconds, self.saving_seconds / SAVING_SHARE)
        return due and distributed.is_first()

    def save_at_exit(self, stop):
        """Saves the state when a signal ends the run, and says what goes on from there."""
        log("-" * 89 + f"\nExiting from training early ({stop}) at {self.position()}")
        try:
            succeeded = self.save_state()
        except Diverged as error:
            warn(f"Warning: {error}; this state is not saved")
            succeeded = False
        if succeeded:
            log(f"The state is saved; {self.run.resume_command} goes on from here")
        elif self.saved:
            warn(f"{self.run.resume_command} goes on from the last state that was saved")

    # -------------------------------------------------------- divergence

    def check_losses(self, ahead=0):
        """Looks at the losses that have arrived; raises Diverged. See Losses.read for `ahead`."""
        for loss in self.losses.read(ahead):
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at batch {len(self.losses.on_host)}")
            self.high_loss_streak = self.high_loss_streak + 1 if loss > self.too_high else 0
        if self.high_loss_streak >= HIGH_LOSSES and self.args.on_divergence != "continue":
            raise Diverged(
                f"the loss was above ln(vocabulary) + 1 = {self.too_high:.2f} in "
                f"{self.high_loss_streak} batches in a row, up to batch "
                f"{len(self.losses.on_host)}"
            )

    def recover(self, error):
        """After a divergence: back to the state on disk with half the rate, or InputError."""
        args, lr = self.args, self.optimizer.param_groups[0]["lr"]
        what = f"epoch {self.epoch}, lr {lr:g}: {error}"
        state = read_state(args.save) if self.saved else None
        if args.on_divergence == "rollback" and state and self.rollbacks < ROLLBACKS:
            best, rollbacks = self.best, self.rollbacks + 1
            self.load_state_dict(state)
            self.rate_divisor *= 2 ** (rollbacks - self.rollbacks)
            self.set_rates()
            self.best, self.rollbacks = best, rollbacks
            log(
                f"Divergence: {what}\nGoing back to {self.position()} with learning rate "
                f"{self.optimizer.param_groups[0]['lr']:g} ({rollbacks} of {ROLLBACKS} times)"
            )
            return
        kept = f"{args.save} keeps the best model so far" if self.best < math.inf else (
            "no model was saved"
        )
        again = "no state was saved to go on from"
        if state:
            again = (
                f"{self.run.resume_command} --lr {lr / 2:g} goes on from the last good state "
                f"(epoch {state['epoch']}, batch {len(state['losses'])})"
            )
        advice = "try a lower --lr" + ("" if args.clip else " or --clip 0.25")
        raise InputError(f"{what}; {advice}; {kept}; {again}")


def train_and_test(trainer):
    """Trains to the end, or until a signal, and tests the best model; returns the exit status.

    Raises InputError when, at last, a file could not be written.
    """
    run, status, check = trainer.run, 0, trainer.run.check
    try:
        trainer.fit()
    except Preempted as stop:
        status = 128 + stop.number
        if stop.number != signal.SIGINT:
            return status
        check = None  # the next signal ends it at once
    run.retry()
    if trainer.best < math.inf:
        report_test(trainer, check)
    else:
        log("No epoch was finished, so there is no model to test")
    run.retry()
    if lost := ", ".join(run.pending):
        raise InputError(f"{lost}: could not be written until the end; make room and train again")
    return status


def report_test(trainer, check):
    """Logs the test loss of the best model, from its file, beside the unigram model's."""
    corpus, args = trainer.corpus, trainer.args
    params = trainer.run.best_model(corpus, args)
    loss, parts = score(params, corpus.test, args, check, TEST_BATCH_SIZE)
    rule = "=" * 89
    log(f"{rule}\n| End of training | {loss_columns(loss, 'test ')}")
    log_parts(parts)
    log(rule)
    if args.model in NOTES:
        log(f"Note: {NOTES[args.model]}")
    unigram = perplexity(unigram_loss(corpus.train, corpus.test, len(corpus.dictionary)))
    log(f"For comparison: word frequencies alone (a unigram model) give test ppl {unigram:.2f}")


class EpochLog:
    """The progress bar of an epoch and its log line every --log-interval batches."""

    def __init__(self, trainer):
        self.trainer = trainer
        args = trainer.args
        # On a CPU a loss is there at once. Elsewhere the newest stays on its way, so that the host
        # can queue the next step while this one runs.
        self.ahead = 0 if args.device.type == "cpu" else 1
        self.batches = self.logged = len(trainer.losses.on_host)
        self.since = time.perf_counter()
        self.bar = tqdm(
            desc=f"epoch {trainer.epoch}", total=(trainer.rows - 1) * args.batch_size,
            initial=trainer.row * args.batch_size, unit=" tokens", unit_scale=True, leave=False,
            file=sys.stderr, disable=not (sys.stderr.isatty() and distributed.is_first()),
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def after_batch(self, rows, share):
        """Reads the losses that have arrived, and reports them. Raises Diverged."""
        trainer, args = self.trainer, self.trainer.args
        self.batches += 1
        is_time = self.batches % args.log_interval == 0
        trainer.check_losses(0 if is_time else self.ahead)
        if not self.bar.disable and trainer.losses.on_host:
            recent = trainer.losses.mean(last=(self.batches - 1) % args.log_interval + 1)
            self.bar.set_postfix(ppl=f"{perplexity(recent):.2f}", refresh=False)
            self.bar.update(rows * args.batch_size)
        if is_time:
            now = time.perf_counter()
            log(
                f"| epoch {trainer.epoch:3d} | {self.batches:5d}/"
                f"{trainer.rows // args.bptt:5d} batches "
                f"| lr {trainer.optimizer.param_groups[0]['lr'] * share:05.5f} "
                f"| ms/batch {(now - self.since) * 1000 / (self.batches - self.logged):5.2f} "
                f"| {loss_columns(trainer.losses.mean(last=args.log_interval))}"
            )
            self.logged, self.since = self.batches, now
