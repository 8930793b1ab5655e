"""NT-ASGD over the epochs of a run, saved so that it can always go on."""

import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
import schedule
from bidirectional import is_bilm, make_objective, score
from data import InputError, batchify, get_batch
from files import Saver, is_out_of_memory, pack
from hidden import copy_hidden, join_hidden, own_hidden, shapes
from preemption import Preempted
from resume import (
    KIND, STATE, VERSION, are_comparable, changes, check_groups, environment, get_generators,
    how_to_resume, making_sense, read_state, set_generators,
)
from train import (
    LONGER, RATES, Average, Losses, change_rates, loss_columns, make_optimizer, nonmonotone,
    perplexity, random_seq_len, train_step,
)
from utils import (
    FINETUNE_RECORDS, RECORDS, describe, log, log_parts, pack_checkpoint, read_checkpoint, warn,
)

ABOVE = 20  # batches in a row with a loss above ln(vocabulary) + 1: the run has diverged
ROLLBACKS = 3
COST = 0.01  # the share of the time that saving the state may take


class Diverged(Exception):
    """Training has left the region where it can learn; the message says where and how."""


class Trainer:
    """A run of NT-ASGD that can end at any batch and go on as if it had not.

    SGD runs until the validation loss meets the trigger; from then on the plain mean of the
    iterates since is what is evaluated and saved, while SGD goes on from its own. With
    `finetuning` the mean is kept from the first step, and the trigger ends the run. Only a model
    with a validation loss below `best` is saved, at `args.save`; the training state beside it, at
    the start, at the end of an epoch and every `args.checkpoint_minutes`.

    `params` is nn.ModuleList([model, criterion]), `args` the flags of this phase of the run.
    `origin` is (the command's file name, its flags as plain data): what resumes the run. `check`
    is called after each batch, with whether this rank wants to save: it returns whether any does,
    and may raise Preempted.
    """

    # What the state holds of the trainer itself, plain data.
    PROGRESS = (
        "finetuning",  # the phase
        "epoch",  # the one that is running, from 1
        "row",  # of the text, where its next window starts
        "logs",  # the validation losses of the epochs before
        "best",  # the lowest of them that was saved
        "records",  # the JSON lines so far
        "done",  # whether the trigger has ended fine-tuning
        "above",  # the number of batches in a row with too high a loss
        "rollbacks",  # how often the run went back after a divergence
    )

    def __init__(
        self, params, corpus, args, origin, check, finetuning=False, best=math.inf, records=""
    ):
        self.params, self.corpus, self.args, self.origin = params, corpus, args, origin
        self.finetuning, self.best, self.records, self.check = finetuning, best, records, check
        mine = parallel.columns(args.batch_size)
        self.source = batchify(corpus.train, args.batch_size)[:, mine].to(args.device).contiguous()
        self.reversed = None  # the text from its end
        if is_bilm(params):
            self.reversed = batchify(corpus.train.flip(0), args.batch_size)
            self.reversed = self.reversed[:, mine].to(args.device).contiguous()
        self.objective = parallel.replicate(make_objective(params, args))
        self.optimizer = make_optimizer(params, args)
        self.averaged = Average(params) if finetuning else None
        self.epoch, self.row, self.hidden, self.losses = 1, 0, None, Losses()
        self.logs, self.done, self.above, self.rollbacks = [], False, 0, 0
        self.ceiling = math.log(len(corpus.dictionary)) + 1
        self.saver = Saver(warn)
        self.saved = False  # whether the state on disk is one that this run can go back to
        self.changed = False  # whether flags have changed since
        self.saved_at, self.cost = time.perf_counter(), 0.0
        self.start_clock(0.0)

    # ------------------------------------------------------------ the state

    def state_dict(self):
        """All that `load_state_dict` needs to go on from here: tensors and plain data."""
        command, flags = self.origin
        return {
            **describe(self.params, self.corpus, flags),
            **{name: getattr(self, name) for name in self.PROGRESS},
            "command": command,
            "environment": environment(self.args.device),
            "losses": self.losses.on_host,
            "seconds": self.seconds(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hidden": join_hidden(parallel.everyones(copy_hidden(self.hidden, "cpu"))),
            "generators": get_generators(self.args.device),
        }

    def load_state_dict(self, state):
        """Goes back to `state`, but for the flags that have changed since. Raises InputError."""
        args, flags = self.args, self.origin[1]
        model, criterion = self.params
        with making_sense(args.save):
            model.load_state_dict(state["model"])
            criterion.load_state_dict(state["criterion"])
            self.averaged = None
            if state["averaged"] is not None:
                self.averaged = Average(self.params)
                self.averaged.load_state_dict(state["averaged"])
            check_groups(state, self.optimizer, args.save)
            self.optimizer.load_state_dict(state["optimizer"])
            change_rates(self.optimizer, args, {f for f in RATES if flags[f] != state["flags"][f]})
            for name in self.PROGRESS:
                setattr(self, name, state[name])
            self.logs = [float(loss) for loss in self.logs]
            self.hidden = copy_hidden(state["hidden"], args.device)
            self.losses = Losses()
            self.losses.on_host = [(float(loss), int(tokens)) for loss, tokens in state["losses"]]
            self.start_clock(state["seconds"])
            set_generators(state["generators"], args.device)
            begun = model.init_hidden(args.batch_size) if self.row else None
            if not (
                self.epoch > 0 and 0 <= self.row < len(self.source)
                and shapes(self.hidden) == shapes(begun)
                and bool(self.row) == bool(self.losses.on_host)
            ):
                raise ValueError("no position in an epoch")
            self.hidden = own_hidden(self.hidden, parallel.columns(args.batch_size))

    def save_state(self):
        """Writes the state. Returns whether that, and all that waited to be written, succeeded.

        Never one whose losses and weights are not all finite: raises Diverged instead.
        """
        start = time.perf_counter()
        self.watch()
        if not all(p.isfinite().all() for p in self.params.parameters()):
            raise Diverged("a weight is no longer finite")
        # Not before the checkpoint it speaks of: on disk the state is never the newer one.
        succeeded = self.saver.retry()
        state = self.state_dict()  # of all ranks
        if succeeded and parallel.is_first():
            path = f"{self.args.save}{STATE}"
            succeeded = self.saver.write(path, pack(KIND, VERSION, state))
            self.saver.pending.pop(path, None)  # the next chance has a newer one
        if succeeded := parallel.first(succeeded):
            self.saved, self.changed = True, False
        self.saved_at = time.perf_counter()
        self.cost = self.saved_at - start
        return succeeded

    def is_due(self, seconds=0.0):
        """Whether the state of `seconds` ago or more is to be replaced, and may be.

        Only on the first rank, whose clock counts.
        """
        since = time.perf_counter() - self.saved_at
        good = self.above == 0 or self.args.on_divergence == "continue"
        return parallel.is_first() and good and since >= max(seconds, self.cost / COST)

    def start_clock(self, seconds):
        self.before, self.started = seconds, time.perf_counter()

    def seconds(self):
        """The time spent in this epoch, that before an interruption included."""
        return self.before + time.perf_counter() - self.started

    # ------------------------------------------------------------ the run

    def fit(self):
        """Trains until `args.epochs` epochs are done, or fine-tuning has met the trigger.

        Raises InputError when training diverges for good, and Preempted when `check` does, after
        saving the state.
        """
        try:
            if self.source.is_cuda and not self.is_over():
                self.try_longest_window()
            while not self.is_over():
                try:
                    if self.changed or not self.saved:
                        self.save_state()
                    self.train_epoch()
                    self.end_epoch()
                    if parallel.first(self.is_due()) or self.is_over():
                        self.save_state()
                except Diverged as error:
                    self.recover(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or (self.epoch, self.row) == (1, 0):
                raise
            again = how_to_resume(self.origin[0], self.args.save)
            raise InputError(
                f"device {self.args.device} is out of memory at {self.position()}; {again} --bptt "
                f"{max(1, self.args.bptt * 3 // 4)} goes on from the last saved state in shorter "
                "windows"
            ) from None
        except Preempted as stop:
            log("-" * 89 + f"\nExiting from training early ({stop}) at {self.position()}")
            try:
                succeeded = self.save_state()
            except Diverged as error:
                warn(f"Warning: {error}; this state is not saved")
                succeeded = False
            again = how_to_resume(self.origin[0], self.args.save)
            if succeeded:
                log(f"The state is saved; {again} goes on from here")
            elif self.saved:
                warn(f"{again} goes on from the last state that was saved")
            raise

    def try_longest_window(self):
        """Computes the gradients of the longest window there can be, and forgets them.

        So what windows need of memory runs out now, not hours into the run. Neither weights nor
        random numbers change.
        """
        args, source = self.args, self.source
        self.params.train()
        seq_len = min(args.bptt + LONGER, len(source) - 1)
        data, targets = get_batch(source, 0, args, seq_len=seq_len)
        hidden = self.params[0].init_hidden(source.size(1))
        devices = [args.device] if source.is_cuda else []
        with torch.random.fork_rng(devices):
            total, *_ = self.objective(
                data, targets, hidden, args.alpha, args.beta, **self.backward_batch(0, len(data))
            )
            total.backward()
        self.optimizer.zero_grad()

    def is_over(self):
        return self.done or self.epoch > self.args.epochs

    def progress(self):
        """The share of the run's epochs that has been read."""
        return (self.epoch - 1 + self.row / (len(self.source) - 1)) / self.args.epochs

    def train_epoch(self):
        """What is left of a pass over the text. Raises Diverged, or what `check` raises."""
        args, source, losses = self.args, self.source, self.losses
        self.params.train()
        if self.hidden is None:
            self.hidden = self.params[0].init_hidden(source.size(1))
        total = (len(source) - 1) * args.batch_size
        # On the CPU a loss is there at once. Elsewhere the newest is left on its way, so that the
        # host can queue the next step while this one runs.
        ahead = 0 if source.device.type == "cpu" else 1
        batch = timed = len(losses.on_host)
        log_start = time.perf_counter()
        bar = tqdm(
            desc=f"epoch {self.epoch}", total=total, initial=self.row * args.batch_size,
            unit=" tokens", unit_scale=True, leave=False, file=sys.stderr,
            disable=not (sys.stderr.isatty() and parallel.is_first()),
        )
        with bar:
            while self.row < len(source) - 1:
                seq_len = random_seq_len(args.bptt)
                data, targets = get_batch(source, self.row, args, seq_len=seq_len)
                now, share = schedule.at(self.progress(), args, self.params[0])
                loss, self.hidden = train_step(
                    self.objective, self.optimizer, data, targets, self.hidden, now, share,
                    **self.backward_batch(self.row, len(data)),
                )
                if self.averaged is not None:
                    self.averaged.update(self.params)
                losses.add(parallel.mean(loss), len(data) * args.batch_size)
                batch += 1
                self.row += len(data)
                logging = batch % args.log_interval == 0
                self.watch(0 if logging else ahead)
                if not bar.disable and losses.on_host:
                    recent = losses.mean(last=(batch - 1) % args.log_interval + 1)
                    bar.set_postfix(ppl=f"{perplexity(recent):.2f}", refresh=False)
                    bar.update(len(data) * args.batch_size)
                if logging:
                    clock = time.perf_counter()
                    log(
                        f"| epoch {self.epoch:3d} | {batch:5d}/{len(source) // args.bptt:5d} "
                        f"batches | lr {self.optimizer.param_groups[0]['lr'] * share:05.5f} "
                        f"| ms/batch {(clock - log_start) * 1000 / (batch - timed):5.2f} "
                        f"| {loss_columns(losses.mean(last=args.log_interval))}"
                    )
                    timed, log_start = batch, clock
                if self.check(self.is_due(60 * args.checkpoint_minutes)):
                    self.save_state()
        self.watch()

    def backward_batch(self, row, seq_len):
        """What a bidirectional objective takes beside the window of `seq_len` at `row`."""
        if self.reversed is None:
            return {}
        window = get_batch(self.reversed, row, self.args, seq_len=seq_len)
        return {"backward": window, "begins": row == 0}

    def watch(self, ahead=0):
        """Looks at the losses that have arrived; raises Diverged. See Losses.read for `ahead`."""
        for loss in self.losses.read(ahead):
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at batch {len(self.losses.on_host)}")
            self.above = self.above + 1 if loss > self.ceiling else 0
        if self.above >= ABOVE and self.args.on_divergence != "continue":
            raise Diverged(
                f"the loss was above ln(vocabulary) + 1 = {self.ceiling:.2f} in {self.above} "
                f"batches in a row, up to batch {len(self.losses.on_host)}"
            )

    def end_epoch(self):
        """Evaluates, saves the model where it is the best, and goes on to the next epoch."""
        args = self.args
        lr = self.optimizer.param_groups[0]["lr"]
        lr *= schedule.rate_share(args.schedule, self.progress())
        train_loss, train_seconds = self.losses.mean(), self.seconds()
        evaluated = self.params if self.averaged is None else self.averaged.params
        loss, parts = score(evaluated, self.corpus.valid, args, self.check)
        log(
            f"{'-' * 89}\n| end of epoch {self.epoch:3d} | time: {self.seconds():5.2f}s "
            f"| {loss_columns(loss, 'valid ')}"
        )
        log_parts(parts)
        log("-" * 89)
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss}")
        keep = [args.save] if loss < self.best else []
        if keep:
            self.best = loss
            what = "model" if self.averaged is None else "averaged weights"
            log(f"Saving {what} (new best validation)")
        if self.epoch in args.when:
            keep.append(f"{args.save}.e{self.epoch}")
            log(f"Saving model to {keep[-1]}; dividing the learning rate by 10")
            for group in self.optimizer.param_groups:
                group["lr"] /= 10
        if keep and parallel.is_first():
            checkpoint = pack_checkpoint(
                evaluated, self.corpus, self.origin[1], epoch=self.epoch, valid_loss=loss,
                averaged=self.averaged is not None, finetuned=self.finetuning,
            )
            for path in keep:
                self.saver.write(path, checkpoint)
        self.record(
            epoch=self.epoch, seconds=round(self.seconds(), 2),
            train_loss=train_loss, train_ppl=perplexity(train_loss),
            valid_loss=loss, valid_ppl=perplexity(loss),
            **{f"{name}_ppl": perplexity(part) for name, part in parts.items()},
            lr=lr, averaging=self.averaged is not None,
            tokens_per_s=round(sum(n for _, n in self.losses.on_host) / train_seconds, 1),
        )
        if nonmonotone(self.logs, loss, args.nonmono):
            if self.finetuning:
                log("Done: validation has stopped improving")
                self.done = True
            elif self.averaged is None and args.optimizer == "sgd":
                log("Switching to averaged SGD (NT-ASGD)")
                self.averaged = Average(self.params)
        self.logs.append(loss)
        self.epoch, self.row, self.hidden, self.losses = self.epoch + 1, 0, None, Losses()
        self.start_clock(0.0)

    def record(self, **record):
        """Adds one epoch's JSON line to the file beside the checkpoint."""
        # JSON has no infinity: a perplexity past the largest float becomes null.
        record = {k: None if v == math.inf else v for k, v in record.items()}
        self.records += json.dumps(record) + "\n"
        suffix = FINETUNE_RECORDS if self.finetuning else RECORDS
        if parallel.is_first():
            self.saver.write(f"{self.args.save}{suffix}", self.records.encode())

    def recover(self, error):
        """After a divergence: back to the state on disk with half the rate, or InputError."""
        args = self.args
        lr = self.optimizer.param_groups[0]["lr"]
        what = f"epoch {self.epoch}, lr {lr:g}: {error}"
        parallel.on_first(self.saver.retry)  # the others read after it
        state = None
        if self.saved:
            try:
                state = read_state(args.save)
            except InputError as unusable:
                warn(f"Warning: {unusable}")
        if args.on_divergence == "rollback" and state and self.rollbacks < ROLLBACKS:
            best, rollbacks = self.best, self.rollbacks + 1
            self.load_state_dict(state)
            self.best = best  # what has been saved since is still the best
            for group in self.optimizer.param_groups:
                group["lr"] /= 2 ** (rollbacks - self.rollbacks)
            self.rollbacks = rollbacks
            log(
                f"Divergence: {what}\nGoing back to {self.position()} with learning rate "
                f"{self.optimizer.param_groups[0]['lr']:g} ({rollbacks} of {ROLLBACKS} times)"
            )
            return
        advice = "try a lower --lr" + ("" if args.clip else " or --clip 0.25")
        kept = "no model was saved"
        if self.best < math.inf:
            kept = f"{args.save} keeps the best model so far"
        again = "no state was saved to go on from"
        if state:
            again = (
                f"{how_to_resume(self.origin[0], args.save)} --lr {lr / 2:g} goes on from the last "
                f"good state (epoch {state['epoch']}, batch {len(state['losses'])})"
            )
        raise InputError(f"{what}; {advice}; {kept}; {again}")

    def position(self):
        """Where the run is, in words."""
        phase = " of fine-tuning" if self.finetuning else ""
        return f"epoch {self.epoch}{phase}, batch {len(self.losses.on_host)}"

    def resume(self, state, path):
        """Goes on from `state`, read from beside the checkpoint at `path`.

        Logs that, and whether bit for bit. Raises InputError when state or checkpoint is unusable.
        """
        settings = self.origin[1]
        self.load_state_dict(state)
        self.saved = path == self.args.save
        self.changed = parallel.first(state["flags"] != settings)  # the device is each rank's own
        log(f"Resuming the run of {self.args.save} at {self.position()}")
        with making_sense(path):
            changed = parallel.first(changes(state, settings, self.args.device))
        changed += self.meet_checkpoint(state, bool(changed))
        if changed:
            log(f"Note: no longer bit-identical to a run never interrupted: {'; '.join(changed)}")
        else:
            log("It goes on bit-identical to a run never interrupted")
        if self.done:
            log("It has come to its end: validation has stopped improving")
        elif self.is_over():
            more = "--finetune" if self.finetuning and "finetune" in settings else "--epochs"
            log(f"It has come to its end; {more} asks for more")

    def meet_checkpoint(self, state, changed):
        """Compares `state` with the best model on disk; returns what keeps them from fitting."""
        path = self.args.save
        if self.best == math.inf:
            return []
        if not Path(path).exists():
            if self.is_over():
                raise InputError(
                    f"{path}: the model of this finished run is gone; put it back, or ask for more "
                    "epochs"
                )
            missing = f"{path} (valid loss {self.best:.2f}) is gone"
            warn(f"Warning: {missing}; the model of the next epoch takes its place")
            self.best = math.inf
            return [missing]
        checkpoint = read_checkpoint(path)
        for key in ("architecture", "vocabulary"):
            with making_sense(path):
                differs = checkpoint[key] != state[key]
            if differs:
                raise InputError(
                    f"{path}{STATE}: is not of the run that made {path}: another {key}; put the "
                    "right one there, or remove it to start from the weights alone"
                )
        loss = checkpoint["valid_loss"]
        if not are_comparable(checkpoint, state, self.args.objective):
            # What this run began from, whose loss says nothing here; or it was replaced.
            mine = f"{path} is of another text or objective, not this run's best model"
            return [mine] if self.best in self.logs else []
        if loss > self.best + 1e-3:  # a later epoch's is lower
            return [f"{path} (valid loss {loss:.3f}) is not this run's best ({self.best:.3f})"]
        if changed:  # it can be of a later epoch than the state
            self.best = min(self.best, loss)
        return []
