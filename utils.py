"""Model-independent helpers: log lines, losses, hidden states, precision, signals."""

import contextlib
import json
import math
import os
import signal
import sys
import threading
from collections import deque

import numpy as np
import torch
from tqdm import tqdm

import distributed
from cpu_kernels import use_expandable_segments
from data import (
    EOS, LEVELS, SPLITS, Corpus, InputError, batchify, count_words, get_batch, list_most_common,
)

__all__ = ["batchify", "get_batch", "repackage_hidden"]  # as in the reference

RECORDS, FINETUNE_RECORDS = ".jsonl", ".finetune.jsonl"  # after the path of the checkpoint

# ------------------------------------------------------------ log lines


def log(line):
    """Prints a line to standard output, above the progress bar, on the first rank.

    A full disk or a closed pipe does not end the run; lost lines are reported once.
    """
    if not distributed.is_first():
        return
    try:
        _print(line, sys.stdout)
    except OSError as error:
        if not log.failed:
            log.failed = True
            warn(f"Warning: cannot write to standard output ({error.strerror}); log lines are lost")


log.failed = False


def warn(line):
    """Prints a line to standard error, on the first rank."""
    if distributed.is_first():
        with contextlib.suppress(OSError):
            _print(line, sys.stderr)


def _print(line, file):
    tqdm.write(line, file=file)
    file.flush()


def perplexity(loss):
    """exp of a loss in nats; inf on overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def loss_columns(loss, prefix=""):
    """The columns of a log line: loss in nats, perplexity, bits per token."""
    return (
        f"{prefix}loss {loss:5.2f} | {prefix}ppl {perplexity(loss):8.2f} "
        f"| {prefix}bpc {loss / math.log(2):8.3f}"
    )


def log_parts(parts):
    """Logs a line for each {name: loss}."""
    for name, loss in parts.items():
        log(f"| {name:8s} | {loss_columns(loss)}")


def log_word_perplexity(loss, ids, dictionary, prefix=""):
    """Logs the perplexity per word that the mean loss of the characters `ids` [N] implies."""
    if dictionary.level == "char":
        words = count_words(ids, dictionary)
        implied = perplexity(loss * len(ids) / words)
        log(f"| per word | {prefix}ppl {implied:8.2f} | {words:,} words, including <eos>")


def warn_about_unknown(unknown, unk):
    """Lists the words that are not in the vocabulary, on stderr."""
    if unknown:
        warn(f"Warning: not in the vocabulary, read as {unk}: {list_most_common(unknown)}")


def json_line(record):
    """A dictionary as JSON, which has neither infinity nor NaN: they become null."""
    return json.dumps({
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }, ensure_ascii=False)


# ------------------------------------------------------------ files


def append_rest(path, content):
    """Appends the rest of `content` to the file at `path`, which holds its beginning.

    Returns whether it did. It does not if the file holds anything else: lines of another run, lines
    beyond a resumed state, or damage.
    """
    with contextlib.suppress(OSError), open(path, "r+b") as file:
        if content.startswith(before := file.read()):
            file.write(content[len(before) :])
            file.flush()
            os.fsync(file.fileno())
            return True
    return False


# ------------------------------------------------------------ losses


class Losses:
    """The losses of a pass, read without making the host wait for the current step."""

    def __init__(self, on_host=()):
        self.pending = deque()
        self.on_host = list(on_host)

    def add(self, loss, tokens):
        """Adds the mean loss of `tokens` tokens, a tensor, and starts its copy to the host."""
        arrived = None
        if loss.is_cuda:  # .item() would wait for everything queued since
            stream = torch.cuda.current_stream(loss.device)
            loss = loss.to("cpu", non_blocking=True)
            arrived = stream.record_event()
        self.pending.append((loss, arrived, tokens))

    def read(self, ahead=0):
        """Returns the losses, floats in nats, that no earlier call has returned.

        Waits for all except the newest `ahead` losses.
        """
        known = len(self.on_host)
        while len(self.pending) > ahead:
            loss, arrived, tokens = self.pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            self.on_host.append((loss.item(), tokens))
        return [loss for loss, _ in self.on_host[known:]]

    def mean(self, last=0):
        """The mean loss per token of the `last` batches read, or of all."""
        chosen = self.on_host[-last:]
        return math.fsum(loss * n for loss, n in chosen) / sum(n for _, n in chosen)

    def mean_of_all_ranks(self):
        """The mean loss per token over all ranks."""
        self.read()
        ranks = distributed.all_gather(self.on_host)
        return Losses([pair for pairs in ranks for pair in pairs]).mean()


# ------------------------------------------------------------ hidden states


def map_hidden(function, *states):
    """Applies `function` to the corresponding tensors of hidden states.

    A hidden state is a tensor, nested tuples or lists of tensors, or None; lists become tuples.
    """
    if states[0] is None:
        return None
    if isinstance(states[0], torch.Tensor):
        return function(*states)
    return tuple(map_hidden(function, *parts) for parts in zip(*states))


def repackage_hidden(h):
    """Detaches a hidden state, a tensor or nested tuples and lists of tensors, from its history."""
    return map_hidden(torch.Tensor.detach, h)


# ------------------------------------------------------------ devices and precision

# The settings for float32 matrix products on CUDA: torch.matmul and cuDNN's recurrent layers.
if hasattr(torch.backends.cudnn, "rnn"):  # torch 2.9 and later
    PRODUCTS = [
        (torch.backends.cuda.matmul, "fp32_precision"), (torch.backends.cudnn.rnn, "fp32_precision")
    ]
    FLOAT32, TF32 = "ieee", "tf32"
else:
    PRODUCTS = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    FLOAT32, TF32 = False, True


def set_products(precision):
    """Sets the precision of CUDA's matrix products: "fp32", "tf32" (10-bit mantissas) or "bf16".

    With bf16, products of float32 tensors stay in float32. cuDNN's setting must still allow TF32:
    "ieee" would keep its bf16 layers off the tensor cores.
    """
    for setting, lower in zip(PRODUCTS, [("tf32",), ("tf32", "bf16")]):
        setattr(*setting, TF32 if precision in lower else FLOAT32)


@contextlib.contextmanager
def float32_products():
    """Computes matrix products in float32, as for every reported perplexity."""
    before = [getattr(*setting) for setting in PRODUCTS]
    set_products("fp32")
    try:
        yield
    finally:
        for setting, value in zip(PRODUCTS, before):
            setattr(*setting, value)


def set_up_device(device, precision="fp32"):
    """Makes `device` the current device and sets the precision of its matrix products."""
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        use_expandable_segments(device)
    set_products(precision)


def describe_device(device):
    """The device's name; on CUDA with the card and cuDNN's version, which affect the last bits."""
    if device.type != "cuda":
        return str(device)
    card, cudnn = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    return f"{device} ({card}, cuDNN {cudnn})"


def is_out_of_memory(error):
    """Whether an exception means out of memory; torch raises several types."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("allocate memory", "out of memory", "ALLOC_FAILED"))
    )


def is_device_error(error):
    """Whether an exception comes from the device, not from a damaged file."""
    return is_out_of_memory(error) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("CUDA", "cuDNN", "CUDNN", "HIP", "MPS"))
    )


# ------------------------------------------------------------ the start of a run


def plain_flags(args):
    """The flags as plain data (strings, numbers, lists), for logs and checkpoints."""
    return {name: str(v) if isinstance(v, torch.device) else v for name, v in vars(args).items()}


def prepare(args):
    """Sets up the device, seeds the generators, logs the setup; returns the corpus.

    Raises InputError.
    """
    corpus = Corpus(args.data, args.level, cache=not args.no_cache)
    if len(corpus.train) // args.batch_size < 2:
        raise InputError(
            f"--batch_size {args.batch_size}: the training split has {len(corpus.train)} tokens, "
            f"too few for {args.batch_size} columns of 2 tokens; use a smaller batch"
        )
    np.random.seed(args.seed)  # draws the windows, which all ranks share
    torch.manual_seed(args.seed + distributed.rank())  # each rank draws its own dropout masks
    set_up_device(args.device, args.precision)
    sizes = ", ".join(f"{split} {len(getattr(corpus, split)):,}" for split in SPLITS)
    log(f"Corpus {corpus.name}: tokens {sizes}; {len(corpus.dictionary):,} {LEVELS[args.level]}s")
    log(f"Corpus sha256: {corpus.digest}")
    note_explicit_eos(corpus.explicit_eos)
    ranks = f", {distributed.size()} processes" if distributed.is_distributed() else ""
    log(
        f"PyTorch {torch.__version__}, device {describe_device(args.device)}, "
        f"{torch.get_num_threads()} threads{ranks}"
    )
    log(f"Args: {plain_flags(args)}")
    return corpus


def note_explicit_eos(count, report=log):
    """Reports the number of lines that end in an explicit <eos>, unless it is 0."""
    if count:
        report(
            f"Note: lines that end in an explicit {EOS}: {count:,}; it doubles the implied one and "
            "lowers the perplexity; remove it from the text"
        )


def read_with_vocabulary(corpus, dictionary, path):
    """Encodes the corpus with the vocabulary of the model at `path`, if it differs, and logs that.

    Raises InputError if words are unknown and the vocabulary has no token for them.
    """
    if corpus.dictionary.idx2word == dictionary.idx2word:
        return
    unknown = corpus.use_vocabulary(dictionary)
    tokens = sum(len(getattr(corpus, split)) for split in SPLITS)
    named = f", read as {dictionary.unk}: {list_most_common(unknown)}" if unknown else ""
    log(
        f"Text read with the vocabulary of {path}, {len(dictionary):,} "
        f"{LEVELS[dictionary.level]}s: {unknown.total():,} of {tokens:,} tokens "
        f"({unknown.total() / tokens:.1%}) are unknown{named}"
    )
    if unknown.total() > tokens / 2:
        warn(
            f"Warning: most of {corpus.name} is unknown to {path}; use text in the language, case "
            "and tokenization of the text that it was trained on"
        )


def environment(device):
    """The software and hardware that the exact bits of a result depend on."""
    return {
        "torch": str(torch.__version__), "hardware": describe_device(device),
        "ranks": distributed.size(), "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def get_generators(device):
    """The states of all random generators of a run, by rank, as tensors and plain data."""
    name, key, *rest = np.random.get_state()
    state = {"numpy": [name, key.tolist(), *rest], "torch": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return {"ranks": distributed.all_gather(state)}


def set_generators(generators, device):
    """Restores the states from `get_generators`; a rank without a state gets a new seed."""
    ranks = generators["ranks"]
    state = ranks[min(distributed.rank(), len(ranks) - 1)]
    name, key, *rest = state["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type])
    if distributed.rank() >= len(ranks):
        torch.manual_seed(torch.initial_seed() + distributed.rank())


# ------------------------------------------------------------ signals


class Preempted(Exception):
    """Raised by `Preemption.check_signals` after a signal; `number` is the signal's."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Preemption:
    """Defers SIGINT, SIGTERM and SIGHUP until `check_signals`.

    A second signal ends the process at once. The exit code is 128 + the signal's number: 130 after
    Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self):
        self.received = 0
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # Python handles signals in the main thread only
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # nohup sets SIG_IGN for SIGHUP; keep it.
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        # Under torchrun the same signal can arrive twice: from the scheduler and from torchrun.
        if self.received and not distributed.is_distributed():
            os._exit(128 + number)  # files are written atomically, so nothing saved is lost
        self.received = self.received or number

    def check_signals(self, due=False):
        """Raises Preempted if any rank got a signal; returns whether `due` is true on any rank."""
        number, due = distributed.largest(self.received, int(due))
        if number:
            raise Preempted(number)
        return bool(due)
