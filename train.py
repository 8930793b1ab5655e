"""Training: a step, an evaluation, schedules, and a complete run with NT-ASGD.

Everywhere, `params` is nn.ModuleList([model, criterion]): a split softmax has weights too.
"""

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
from checkpoint import read_checkpoint, read_state
from cuda_graphs import GraphedFunction
from data import LEVELS, InputError, batchify, exact_windows, get_batch, unigram_loss
from model import DROPOUTS, NOTES, WINDOW, activation_regularization, training_settings
from splitcross import SplitCrossEntropyLoss, default_splits
from utils import (
    Losses, Preempted, environment, float32_products, get_generators, is_out_of_memory, json_line,
    log, log_parts, log_word_perplexity, loss_columns, map_hidden, perplexity, repackage_hidden,
    set_generators, warn,
)
from weight_drop import WeightDrop

EVAL_BATCH_SIZE, TEST_BATCH_SIZE = 10, 1  # as in the reference
MAX_EXCESS = 25  # by which a window may exceed bptt: five standard deviations
REGULARIZERS = (*DROPOUTS, "alpha", "beta")
TRAPEZOID = (0, 0.08, 0.48, 0.92, 1), (0.1, 1, 1, 0.1, 0)  # shares of the run, shares of the rate
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "adam": (torch.optim.Adam, {}),
    # The first beta is below torch's default. The second must average over many steps, because rare
    # words seldom have a gradient: 0.99 is worse (records/short).
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.998)}),
}
HIGH_LOSSES = 20  # consecutive batches with a loss above ln(vocabulary) + 1 that mean divergence
ROLLBACKS = 3
SAVING_SHARE = 0.01  # the largest share of the time spent on saving the training state


class Diverged(Exception):
    """Training has diverged; the message says where and how."""


# ------------------------------------------------------------ one step


def random_seq_len(bptt):
    """The length of the next window (section 4.1 of Merity et al. 2017, 1708.02182), at least 5.

    Drawn from N(bptt, 5) with probability 0.95, else from N(bptt / 2, 5), so that each epoch splits
    the text at different places. Capped at bptt + MAX_EXCESS to bound memory.
    """
    mean = bptt if np.random.random() < 0.95 else bptt / 2
    return min(max(5, int(np.random.normal(mean, 5))), bptt + MAX_EXCESS)


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
    """The training objective as one module, so that model and criterion are replicated together."""

    def __init__(self, params):
        super().__init__()
        self.params = params

    def clip_groups(self):
        """Lists of parameters; the gradient norm is clipped per list."""
        return [list(self.parameters())]

    def forward(self, data, targets, hidden, alpha, beta):
        """data [L, B], targets [L*B] -> (loss + AR + TAR, the loss only, in nats, hidden)."""
        model, criterion = self.params
        output, hidden, raw_outputs, outputs = model(data, hidden, return_h=True)
        loss = criterion(model.decoder.weight, model.decoder.bias, output, targets)
        penalty = activation_regularization(raw_outputs[-1], outputs[-1], alpha, beta)
        return loss + penalty, loss.detach(), hidden


def make_objective(params, args):
    """The objective of the model in `params`."""
    return BiObjective(params, args.objective) if is_bilm(params) else Objective(params)


def compute_gradients(objective, data, targets, hidden, args, **more):
    """Adds the gradients of one window to the parameters' `grad`; see train_step.

    Returns (loss in nats without AR and TAR, a tensor on the device; new hidden state, detached).
    """
    total, loss, hidden = objective(data, targets, hidden, args.alpha, args.beta, **more)
    total.backward()
    return loss, repackage_hidden(hidden)


def make_compute(params, args):
    """How train_step computes the gradients: from CUDA graphs, if `args.cuda_graphs`."""
    if not args.cuda_graphs:
        return compute_gradients
    if params[1].splits:
        raise InputError(
            "--cuda-graphs: not for more than 75,000 words, whose softmax is split; leave the flag "
            "out"
        )
    return GraphedFunction(compute_gradients, REGULARIZERS)


def train_step(
    objective, optimizer, data, targets, hidden, args, lr_share=1.0, compute=compute_gradients,
    **more,
):
    """One step of truncated BPTT on `data` [L, B] and `targets` [L*B].

    The learning rate of a group is its `lr` (see Trainer.set_rates) times `lr_share`, that of the
    schedule, times L / bptt, so that a short window weighs less than a long one. `compute` is from
    make_compute, and `more` is passed to the objective, see Trainer.window.

    Returns (loss, hidden) as `compute_gradients` does.
    """
    optimizer.zero_grad(set_to_none=not args.cuda_graphs)  # graphs always write to the same memory
    loss, hidden = compute(objective, data, targets, hidden, args, **more)
    if args.clip:
        for group in getattr(objective, "module", objective).clip_groups():  # DDP has a `module`
            clip_grad_norm_(group, args.clip)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate * lr_share * len(data) / args.bptt
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    return loss, hidden


def make_optimizer(params, args):
    """SGD, Adam or AdamW over the parameters of model and criterion.

    The second of its two groups holds the biases below the decoder (recurrent layers, attention,
    combiner). Their learning rate is `args.bias_lr` times `args.lr`.
    """
    kind, settings = OPTIMIZERS[args.optimizer]
    biases = [
        p for name, p in params[0].named_parameters() if "bias" in name and name != "decoder.bias"
    ]
    bias_set = set(biases)
    others = [p for p in params.parameters() if p not in bias_set]
    groups = [{"params": others}, {"params": biases, "lr": args.lr * args.bias_lr}]
    fused = others[0].device.type in ("cpu", "cuda")  # one pass over weights and gradients
    return kind(groups, lr=args.lr, weight_decay=args.wdecay, fused=fused, **settings)


# ------------------------------------------------------------ averaging and its trigger


class Average:
    """The plain mean of the weights over all steps since its creation, in `mean`.

    Polyak and Juditsky 1992; section 3 of Merity et al. 2017 (1708.02182). The count is kept on the
    host, so that no step waits for the device.
    """

    def __init__(self, params):
        self.mean = deepcopy(params).requires_grad_(False)
        for module in self.mean.modules():
            if isinstance(module, nn.RNNBase):  # cuDNN warns if copied weights are not contiguous
                module.flatten_parameters()
        self.count = 0

    def update(self, params):
        """Adds the weights of `params` to the mean."""
        mean, weights = list(self.mean.parameters()), list(params.parameters())
        with torch.no_grad():
            get_swa_multi_avg_fn()(mean, weights, self.count)  # mean += (w - mean) / (count + 1)
        self.count += 1

    def state_dict(self):
        return {"count": self.count, "params": self.mean.state_dict()}

    def load_state_dict(self, state):
        self.count = state["count"]
        self.mean.load_state_dict(state["params"])


def is_nonmonotone(valid_losses, loss, nonmono):
    """The trigger of NT-ASGD: whether `loss` exceeds the minimum of all but the last n losses.

    `valid_losses` are those of the earlier epochs; n is `nonmono`. The paper's Algorithm 1 prints
    the minimum of the last n; the published code has this range, which its authors confirmed.
    """
    before = valid_losses[: max(0, len(valid_losses) - nonmono)]
    return loss > min(before, default=math.inf)


# ------------------------------------------------------------ one evaluation


@torch.no_grad()
@float32_products()
def evaluate(params, ids, batch_size, bptt, check=None):
    """Mean negative log-likelihood, in nats, of all tokens of `ids` [N] but the first.

    Each token is predicted exactly once, in float32. The text is read in `batch_size` columns that
    start from a zero state, in windows of `bptt` that carry the hidden state; only biLSTM's result
    depends on the window. The ranks share the columns. `check` is called after each window.
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


def evaluate_model(params, ids, args, check=None, batch_size=EVAL_BATCH_SIZE):
    """The loss in nats on `ids` [N], without AR and TAR, and {name: loss} of its parts, if any.

    See `evaluate`. Reads long windows, except for biLSTM.
    """
    window = args.bptt
    if params[0].rnn_type != "biLSTM":
        window = max(window, WINDOW // batch_size)
    if not is_bilm(params):
        return evaluate(params, ids, batch_size, window, check), {}
    parts = evaluate_directions(params, ids, batch_size, window, check)
    chosen = OBJECTIVES[args.objective]
    return sum(parts[name] for name in chosen) / len(chosen), parts


# ------------------------------------------------------------ schedules


def scheduled_share(schedule, progress):
    """The learning rate at `progress`, in [0, 1], as a share of its maximum, --lr.

    constant: 1. trapezoid: straight lines between the points of TRAPEZOID.
    """
    return 1.0 if schedule == "constant" else float(np.interp(progress, *TRAPEZOID))


def regularizers_at(epochs, args):
    """{flag: value} of dropouts, weight drop, AR and TAR after `epochs` epochs of a ramp.

    Their strength rises from SHARE to 1 over the ramp's EPOCHS. It is constant within an epoch, so
    that CUDA graphs stay valid.
    """
    start, ramp_epochs = args.regularization_ramp
    strength = start + (1 - start) * min(1.0, math.floor(epochs) / ramp_epochs)
    return {name: strength * getattr(args, name) for name in REGULARIZERS}


def apply_schedules(epochs, args, model):
    """The flags of a step after `epochs` epochs, and its share of the learning rate.

    With a ramp, also sets the dropout rates of `model`, an RNNModel.
    """
    lr_share = scheduled_share(args.schedule, epochs / args.epochs)
    if not args.regularization_ramp:
        return args, lr_share
    settings = regularizers_at(epochs, args)
    # Each WeightDrop has a rate of its own; model.wdrop was read when the layers were made.
    for name in DROPOUTS:
        setattr(model, name, settings[name])
    for module in model.modules():
        if isinstance(module, WeightDrop):
            module.dropout = settings["wdrop"]
    return Namespace(**{**vars(args), **settings}), lr_share


# ------------------------------------------------------------ a run


def roll_columns(text, offsets):
    """Rotates each column of `text` [rows, B] so that it starts at its offset in `offsets` [B].

    With new random offsets in each epoch this is partial shuffle (Press 2019, 1903.04167).
    """
    rows = torch.arange(len(text), device=text.device).unsqueeze(1)
    return text.gather(0, (rows + offsets) % len(text))


class Trainer:
    """A run of NT-ASGD that can be interrupted at any batch and resumed exactly.

    SGD runs until the validation loss meets the trigger. From then on the mean of the weights since
    the trigger is evaluated and saved, while SGD continues from its own weights. With `finetuning`,
    averaging starts at the first step, and the trigger ends the run. Adam and AdamW run without
    averaging.

    A model is saved only if its validation loss is below `best`. The training state is saved beside
    it at the start, after an epoch, and every `args.checkpoint_minutes`, unless that would take
    more than SAVING_SHARE of the time.

    `run` is the checkpoint.Run that writes the files and checks for signals.
    """

    # The trainer's attributes that the training state holds as plain data.
    PROGRESS = (
        "finetuning", "epoch", "row", "valid_losses", "best", "records", "done",
        "rollbacks", "rate_divisor", "offsets", "changes",
    )

    def __init__(self, params, corpus, args, run, finetuning=False, best=math.inf):
        self.params, self.corpus, self.args, self.run = params, corpus, args, run
        self.finetuning = finetuning
        self.columns = distributed.columns(args.batch_size)  # this rank's
        # biLM also reads the reversed text.
        texts = [corpus.train, corpus.train.flip(0)] if is_bilm(params) else [corpus.train]
        texts = [batchify(ids, args.batch_size)[:, self.columns] for ids in texts]
        self.texts = [text.to(args.device).contiguous() for text in texts]  # each [rows, columns]
        self.rows = len(self.texts[0])
        self.set_offsets(None)
        self.objective = distributed.replicate(make_objective(params, args))
        self.optimizer = make_optimizer(params, args)
        self.compute = make_compute(params, args)
        self.average = Average(params) if finetuning else None
        self.epoch, self.row = 1, 0  # the current epoch; where its next window starts
        self.hidden, self.losses = None, Losses()
        self.valid_losses, self.best, self.records = [], best, ""
        self.done = False  # whether the trigger has ended fine-tuning
        self.changes = []  # made at a resume; they keep the run from being bit-identical
        self.high_loss_streak, self.rollbacks = 0, 0
        self.rate_divisor = 1  # of the learning rate, raised by --when and by rollbacks
        self.loss_limit = math.log(len(corpus.dictionary)) + 1
        self.saved = False  # whether the training state on disk is from this run, with these flags
        self.saved_at, self.saving_seconds = time.perf_counter(), 0.0
        self.start_clock(0.0)
        log(f"Model total parameters: {sum(p.numel() for p in params.parameters())}")

    def set_offsets(self, offsets):
        """Sets the row at which this epoch starts to read each column; None means 0 for all."""
        self.offsets, self.streams = offsets, self.texts
        if offsets is not None:
            local = torch.tensor(offsets[self.columns], device=self.args.device)
            self.streams = [roll_columns(text, local) for text in self.texts]

    def start_clock(self, seconds):
        self.seconds_before, self.started = seconds, time.perf_counter()

    def seconds(self):
        """The time spent in this epoch, including the time before an interruption."""
        return self.seconds_before + time.perf_counter() - self.started

    def is_over(self):
        return self.done or self.epoch > self.args.epochs

    def epochs_read(self):
        """The number of epochs so far, with the fraction of the current one."""
        return self.epoch - 1 + self.row / (self.rows - 1)

    def position(self):
        """The position in the run, for messages."""
        phase = " of fine-tuning" if self.finetuning else ""
        return f"epoch {self.epoch}{phase}, batch {len(self.losses.on_host)}"

    # -------------------------------------------------------- the loop

    def fit(self):
        """Trains for `args.epochs` epochs, or until fine-tuning meets the trigger.

        Raises InputError when training cannot recover from divergence or memory runs out, and
        Preempted after a signal, once the state is saved.
        """
        try:
            if self.is_over():
                self.save_state()  # with the flags of this resume
            elif self.args.device.type == "cuda":
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
            started = (self.epoch, self.row) != (1, 0)
            if not (is_out_of_memory(error) and started):
                raise
            raise InputError(
                f"device {self.args.device} is out of memory at {self.position()}; "
                f"{self.run.resume_command} --bptt {max(1, self.args.bptt * 3 // 4)} resumes from "
                "the last saved state with shorter windows"
            ) from None

    def train_epoch(self):
        """Trains on the rest of the text. Raises Diverged, or Preempted."""
        args = self.args
        self.params.train()
        if self.row == 0:
            self.hidden = self.params[0].init_hidden(self.texts[0].size(1))
            offsets = None
            if args.partial_shuffle:
                offsets = np.random.randint(self.rows, size=args.batch_size).tolist()
            self.set_offsets(offsets)
        monitor = EpochMonitor(self)
        with monitor.bar:
            while self.row < self.rows - 1:
                settings, lr_share = apply_schedules(self.epochs_read(), args, self.params[0])
                data, targets, more = self.window(self.row, random_seq_len(args.bptt))
                loss, self.hidden = train_step(
                    self.objective, self.optimizer, data, targets, self.hidden, settings,
                    lr_share, self.compute, **more,
                )
                if self.average is not None:
                    self.average.update(self.params)
                self.row += len(data)
                self.losses.add(distributed.mean(loss), len(data) * args.batch_size)
                monitor.after_batch(len(data), lr_share)
                if self.run.check_signals(self.is_due(60 * args.checkpoint_minutes)):
                    self.save_state()
        self.check_losses()

    def end_epoch(self):
        """Evaluates, saves a new best model, checks the trigger, and starts the next epoch."""
        args, train_loss, train_seconds = self.args, self.losses.mean(), self.seconds()
        lr = self.optimizer.param_groups[0]["lr"]
        evaluated = self.params if self.average is None else self.average.mean
        loss, parts = evaluate_model(evaluated, self.corpus.valid, args, self.run.check_signals)
        log(
            f"{'-' * 89}\n| end of epoch {self.epoch:3d} | time: {self.seconds():5.2f}s "
            f"| {loss_columns(loss, 'valid ')}"
        )
        log_word_perplexity(loss, self.corpus.valid[1:], self.corpus.dictionary, "valid ")
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
        """Starts averaging or, in fine-tuning, ends the run: validation has stopped improving."""
        if self.finetuning:
            log("Done: the validation loss has stopped improving")
            self.done = True
        elif self.average is None and self.args.optimizer == "sgd":
            log("Switching to averaged SGD (NT-ASGD)")
            self.average = Average(self.params)

    def window(self, row, seq_len):
        """Words [L, B] and targets [L*B] from `row` on, and the objective's other arguments."""
        batches = [get_batch(text, row, self.args, seq_len=seq_len) for text in self.streams]
        more = {"backward": batches[1], "is_first_window": row == 0} if batches[1:] else {}
        return *batches[0], more

    def try_longest_window(self):
        """Computes and discards the gradients of the longest possible window.

        If memory is too small, this fails now instead of hours into the run, except for what CUDA
        graphs need in addition. Weights and random generators do not change.
        """
        args = self.args
        self.params.train()
        data, targets, more = self.window(0, min(args.bptt + MAX_EXCESS, self.rows - 1))
        with torch.random.fork_rng([args.device] if data.is_cuda else []):
            hidden = self.params[0].init_hidden(data.size(1))
            total, *_ = self.objective(data, targets, hidden, args.alpha, args.beta, **more)
            total.backward()
        self.optimizer.zero_grad()

    # -------------------------------------------------------- files

    def save_model(self, params, loss):
        """Saves `params` if `loss` is the lowest so far, and after the epochs of --when."""
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
        self.records += json_line(record) + "\n"
        self.run.save_records(self.records, self.finetuning)

    def state_dict(self):
        """The training state without weights, flags and corpus, which `Run.save_state` adds."""
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
        """Restores `state`, except for flags that have changed since."""
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
        self.high_loss_streak = 0
        if args.lr != state["flags"]["lr"]:
            self.rate_divisor = 1  # a new rate is taken as it is
        self.set_rates()
        self.losses = Losses(state["losses"])
        self.start_clock(state["seconds"])
        set_generators(state["generators"], args.device)
        self.hidden = map_hidden(
            lambda h: h[:, self.columns].to(args.device, copy=True).contiguous(), state["hidden"]
        )

    def set_rates(self):
        """Sets the optimizer's learning rates and weight decay from the flags."""
        for group, factor in zip(self.optimizer.param_groups, (1.0, self.args.bias_lr)):
            group["lr"] = self.args.lr * factor / self.rate_divisor
            group["weight_decay"] = self.args.wdecay

    def resume(self, state, changed):
        """Resumes from `state`, the training state of `args.resume`, and logs that.

        `changed` lists the changes that keep the run from being bit-identical to an uninterrupted
        one. Raises InputError when the checkpoint is unusable.
        """
        self.load_state_dict(state)
        log(f"Resuming the run of {self.args.resume} at {self.position()}")
        changed = changed + self.check_best_model(state, changed)
        self.changes = list(dict.fromkeys(self.changes + changed))
        if self.records:  # the file may be ahead of the state, or end in a part of a line
            self.run.save_records(self.records, self.finetuning)
        if self.changes:
            changes = "; ".join(self.changes)
            log(f"Note: no longer bit-identical to an uninterrupted run: {changes}")
        else:
            log("The resumed run is bit-identical to an uninterrupted run")
        if self.done:
            log("The run is finished: the validation loss has stopped improving")
        elif self.is_over():
            flag = "--finetune" if self.finetuning and "finetune" in self.run.flags else "--epochs"
            log(f"The run is finished; a higher {flag} extends it")

    def check_best_model(self, state, changed):
        """Compares the best model on disk with that of `state`; returns [], or [what is missing].

        If the run has `changed`, its next models are compared with the one on disk, which can be
        newer than the state.
        """
        path = self.args.save
        if os.path.exists(path):
            checkpoint = read_checkpoint(path)
            # Fine-tuning may have begun with a model of another text or objective.
            comparable = checkpoint["corpus"]["sha256"] == state["corpus"]["sha256"] and all(
                checkpoint["flags"][flag] == state["flags"][flag] for flag in ("objective", "unk")
            )
            if changed and comparable:
                self.best = min(self.best, checkpoint["valid_loss"])
            for key in ("architecture", "vocabulary"):
                if checkpoint[key] != state[key]:
                    raise InputError(
                        f"{path}: its {key} does not match the training state beside it; restore "
                        "the right file, or remove the state to start from the weights only"
                    )
            return []
        if self.best == math.inf:
            return []
        if self.is_over():
            raise InputError(
                f"{path}: the model of this finished run is missing; restore it, or train for more "
                "epochs"
            )
        missing = f"{path} (valid loss {self.best:.2f}) is missing"
        warn(f"Warning: {missing}; the next epoch's model replaces it")
        self.best = math.inf
        return [missing]

    def save_state(self):
        """Writes the state and all pending files; returns whether that succeeded.

        Writes nothing while losses are too high, except for the first state and the last. Raises
        Diverged, and writes nothing, unless all losses and weights are finite.
        """
        start = time.perf_counter()
        self.check_losses()
        if self.saved and not self.may_save() and not self.is_over():
            warn("Warning: the loss of the newest batches is too high; this state is not saved")
            return False
        if not all(p.isfinite().all() for p in self.params.parameters()):
            raise Diverged("a weight is no longer finite")
        succeeded = self.run.save_state(self.params, self.corpus, self.state_dict())
        self.saved = self.saved or succeeded
        self.saved_at = time.perf_counter()
        self.saving_seconds = self.saved_at - start
        return succeeded

    def is_due(self, seconds=0.0):
        """Whether to save again: the state on disk is `seconds` old, and losses are not too high.

        It must also be so old that saving takes at most SAVING_SHARE of the time. True only on the
        first rank, whose clock decides for all.
        """
        since = time.perf_counter() - self.saved_at
        due = since >= max(seconds, self.saving_seconds / SAVING_SHARE)
        return due and self.may_save() and distributed.is_first()

    def may_save(self):
        """Whether to save a state now: no loss is too high, or --on-divergence is continue."""
        return self.high_loss_streak == 0 or self.args.on_divergence == "continue"

    def save_at_exit(self, stop):
        """Saves the state at a signal, and logs how to resume."""
        log("-" * 89 + f"\nExiting from training early ({stop}) at {self.position()}")
        try:
            succeeded = self.save_state()
        except Diverged as error:
            warn(f"Warning: {error}; this state is not saved")
            succeeded = False
        if succeeded:
            log(f"The state is saved; {self.run.resume_command} resumes from here")
        elif self.saved:
            warn(f"{self.run.resume_command} resumes from the last saved state")

    # -------------------------------------------------------- divergence

    def check_losses(self, ahead=0):
        """Checks the losses that have arrived; raises Diverged. See Losses.read for `ahead`."""
        for loss in self.losses.read(ahead):
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at batch {len(self.losses.on_host)}")
            self.high_loss_streak = self.high_loss_streak + 1 if loss > self.loss_limit else 0
        if self.high_loss_streak >= HIGH_LOSSES and self.args.on_divergence != "continue":
            raise Diverged(
                f"the loss was above ln(vocabulary) + 1 = {self.loss_limit:.2f} in "
                f"{self.high_loss_streak} batches in a row, up to batch "
                f"{len(self.losses.on_host)}"
            )

    def recover(self, error):
        """Restores the state on disk with half the learning rate, or raises InputError."""
        args, lr = self.args, self.optimizer.param_groups[0]["lr"]
        problem = f"epoch {self.epoch}, lr {lr:g}: {error}"
        state = read_state(args.save) if self.saved else None
        if args.on_divergence == "rollback" and state and self.rollbacks < ROLLBACKS:
            best, rollbacks = self.best, self.rollbacks + 1
            self.load_state_dict(state)
            # self.rollbacks is now the state's; repeat the halvings since it was written.
            self.rate_divisor *= 2 ** (rollbacks - self.rollbacks)
            self.set_rates()
            self.best, self.rollbacks = best, rollbacks
            log(
                f"Divergence: {problem}\nGoing back to {self.position()} with learning rate "
                f"{self.optimizer.param_groups[0]['lr']:g} ({rollbacks} of {ROLLBACKS} times)"
            )
            return
        kept, resumed = "no model was saved", "no training state was saved"
        if self.best < math.inf:
            kept = f"{args.save} keeps the best model so far"
        if state:
            resumed = (
                f"{self.run.resume_command} --lr {lr / 2:g} resumes from the last good state "
                f"(epoch {state['epoch']}, batch {len(state['losses'])})"
            )
        advice = "try a lower --lr" + ("" if args.clip else " or --clip 0.25")
        raise InputError(f"{problem}; {advice}; {kept}; {resumed}")


def train_and_test(trainer):
    """Trains to the end, or until a signal, and tests the best model; returns the exit status.

    Raises InputError if a file still cannot be written at the end.
    """
    run, status = trainer.run, 0
    try:
        trainer.fit()
        report_test(trainer, run.check_signals)
    except Preempted as stop:
        status = 128 + stop.number
        if stop.number != signal.SIGINT:
            if trainer.is_over():
                log(f"The test was interrupted ({stop}); {run.resume_command} tests the model")
            return status
        report_test(trainer)  # the next signal ends the process at once
    run.retry()
    # All ranks wait here: finetune reads these files.
    if lost := distributed.broadcast(", ".join(run.pending)):
        has_state = trainer.saved or trainer.args.resume
        again = f"run {run.resume_command}" if has_state else "train again"
        raise InputError(
            f"{lost}: could not be written; free disk space, or make the folder writable, then "
            f"{again}"
        )
    return status


def report_test(trainer, check=None):
    """Logs the test loss of the saved best model, and that of a unigram model for comparison."""
    corpus, args = trainer.corpus, trainer.args
    if trainer.best == math.inf:
        log("No epoch was finished, so there is no model to test")
        return
    params = trainer.run.best_model(corpus, args)
    loss, parts = evaluate_model(params, corpus.test, args, check, TEST_BATCH_SIZE)
    rule = "=" * 89
    log(f"{rule}\n| End of training | {loss_columns(loss, 'test ')}")
    log_word_perplexity(loss, corpus.test[1:], corpus.dictionary, "test ")
    log_parts(parts)
    log(rule)
    if args.model in NOTES:
        log(f"Note: {NOTES[args.model]}")
    unigram = perplexity(unigram_loss(corpus.train, corpus.test, len(corpus.dictionary)))
    tokens = LEVELS[corpus.dictionary.level]
    log(f"For comparison: {tokens} frequencies alone (a unigram model) give test ppl {unigram:.2f}")


class EpochMonitor:
    """Follows an epoch: checks the losses that arrive, moves the progress bar, logs lines."""

    def __init__(self, trainer):
        self.trainer = trainer
        args = trainer.args
        # A CPU's loss is available at once. On a GPU the newest loss is not waited for, so that the
        # host can queue the next step while this one runs.
        self.ahead = 0 if args.device.type == "cpu" else 1
        self.batches = self.logged = len(trainer.losses.on_host)
        self.since = time.perf_counter()
        self.bar = tqdm(
            desc=f"epoch {trainer.epoch}", total=(trainer.rows - 1) * args.batch_size,
            initial=trainer.row * args.batch_size, unit=" tokens", unit_scale=True, leave=False,
            file=sys.stderr, disable=not (sys.stderr.isatty() and distributed.is_first()),
        )

    def after_batch(self, seq_len, lr_share):
        """Reads the losses that have arrived, and reports them. Raises Diverged."""
        trainer, args = self.trainer, self.trainer.args
        self.batches += 1
        is_time = self.batches % args.log_interval == 0
        trainer.check_losses(0 if is_time else self.ahead)
        if not self.bar.disable and trainer.losses.on_host:
            recent = trainer.losses.mean(last=(self.batches - 1) % args.log_interval + 1)
            self.bar.set_postfix(ppl=f"{perplexity(recent):.2f}", refresh=False)
        self.bar.update(seq_len * args.batch_size)
        if is_time:
            now = time.perf_counter()
            log(
                f"| epoch {trainer.epoch:3d} | {self.batches:5d}/"
                f"{trainer.rows // args.bptt:5d} batches "
                f"| lr {trainer.optimizer.param_groups[0]['lr'] * lr_share:05.5f} "
                f"| ms/batch {(now - self.since) * 1000 / (self.batches - self.logged):5.2f} "
                f"| {loss_columns(trainer.losses.mean(last=args.log_interval))}"
            )
            self.logged, self.since = self.batches, now
