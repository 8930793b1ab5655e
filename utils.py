"""Small shared helpers: hidden states, checkpoints, log lines."""

import contextlib
import os
import sys
from pathlib import Path

from torch import nn
from tqdm import tqdm

import parallel
from bidirectional import make_model
from data import Dictionary, InputError, batchify, get_batch
from files import is_of_device, pack, unpack
from hidden import repackage_hidden
from model import NOTES, RATES
from resume import STATE, read_state
from splitcross import SplitCrossEntropyLoss
from train import loss_columns

__all__ = [
    "batchify", "get_batch", "load", "log", "pack_checkpoint", "read_checkpoint",
    "repackage_hidden", "warn",
]

KIND, VERSION = "checkpoint", 2
KEYS = {
    "architecture": dict, "flags": dict, "vocabulary": list, "corpus": dict, "model": dict,
    "criterion": dict, "splits": list, "epoch": int, "valid_loss": float | int,
}
RECORDS, FINETUNE_RECORDS = ".jsonl", ".finetune.jsonl"  # appended to the checkpoint's path


def log(line):
    """Prints a line to standard output, above the progress bar where one is shown.

    Only the first rank does. A log on a full disk, or into a pipe that nobody reads any more
    (Ctrl-C ends `tee` too), does not end a run: the first line that is lost is reported.
    """
    if not parallel.is_first():
        return
    try:
        _print(line, sys.stdout)
    except OSError as error:
        if not log.failed:
            log.failed = True
            warn(f"Warning: standard output cannot be written ({error.strerror}): lines are lost")


log.failed = False


def warn(line):
    """Prints a line to standard error, above the progress bar where one is shown; as `log`."""
    if parallel.is_first():
        with contextlib.suppress(OSError):
            _print(line, sys.stderr)


def _print(line, file):
    tqdm.write(line, file=file)
    file.flush()


def log_parts(parts):
    """Logs a line for each of the losses that `parts` names."""
    for name, loss in parts.items():
        log(f"| {name:8s} | {loss_columns(loss)}")


def check_writable(path, checkpoints):
    """Raises InputError unless a checkpoint, and the files beside it, can be written at `path`.

    What exists at the paths in `checkpoints`, or where the training state and the JSON lines go,
    may be replaced only if it is of the same kind: nothing of the user's own is written over.
    """
    if os.path.isdir(path) or str(path).endswith("/"):
        raise InputError(f"--save {path}: is a folder; name a file in it")
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"--save {path}: the folder {path.parent} does not exist; create it")
    probe = path.with_name(f"{path.name}{FINETUNE_RECORDS}.{os.getpid()}.tmp")  # the longest name
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--save {path}: cannot be written ({error.strerror})") from None
    for file in map(Path, checkpoints):
        if file.exists() and not is_checkpoint(file):
            raise InputError(
                f"--save {path}: {file} exists and is no checkpoint, or a damaged one; name another"
            )
    try:
        read_state(path)
    except InputError:
        raise InputError(
            f"--save {path}: {path}{STATE} exists and is no training state, or a damaged one; name "
            "another"
        ) from None
    for suffix in (RECORDS, FINETUNE_RECORDS):
        file = Path(f"{path}{suffix}")
        if file.is_dir() or (file.exists() and file.read_bytes()[:9] not in (b"", b'{"epoch":')):
            raise InputError(f"--save {path}: {file} exists and is no run's record; name another")


def pack_checkpoint(params, corpus, flags, **progress):
    """The bytes of a checkpoint, all that is needed to use a model: tensors and plain data only.

    `params` is nn.ModuleList([model, criterion]). Keys: format, version; architecture (RNNModel's
    arguments without the dropout rates); flags; vocabulary (words in order of id); corpus (name,
    sha256); model and criterion (state dicts), splits; note (on what its loss is not); and
    `progress` (epoch, valid_loss in nats, averaged, finetuned).
    """
    return pack(KIND, VERSION, {**describe(params, corpus, flags), **progress})


def describe(params, corpus, flags):
    """What a checkpoint and a training state share: a model, and what it was trained on."""
    model, criterion = params
    return {
        "architecture": model.architecture,
        "flags": flags,
        "vocabulary": corpus.dictionary.idx2word,
        "corpus": {"name": corpus.name, "sha256": corpus.digest},
        "model": model.state_dict(),
        "criterion": criterion.state_dict(),
        "splits": criterion.splits,
        "note": NOTES.get(model.rnn_type, ""),
    }


def read_checkpoint(path, device="cpu", content=None):
    """Reads what `pack_checkpoint` made, its tensors on `device`, without executing any of it.

    `content`: its bytes, where they are not to be read from `path`. Raises InputError, naming the
    file, when it is missing, damaged in any bit, or of another kind.
    """
    checkpoint = unpack(path, KIND, VERSION, KEYS, device, content)
    if not all(isinstance(word, str) for word in checkpoint["vocabulary"]):
        raise InputError(f"{path}: its vocabulary is not one of words; train again")
    return checkpoint


def is_checkpoint(path):
    """Whether `read_checkpoint` can read what lies at `path`."""
    try:
        read_checkpoint(path)
    except InputError:
        return False
    return True


def build(checkpoint, path="checkpoint", **settings):
    """nn.ModuleList([model, criterion]) of a checkpoint, on its tensors' device.

    `settings` are RNNModel's dropout rates and `bf16`. Raises InputError, naming `path`, when the
    weights do not fit the architecture.
    """
    try:
        model = make_model(**checkpoint["architecture"], **settings)
        model.load_state_dict(checkpoint["model"])
        criterion = SplitCrossEntropyLoss(model.decoder.in_features, checkpoint["splits"])
        criterion.load_state_dict(checkpoint["criterion"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if is_of_device(error):
            raise
        raise InputError(f"{path}: its weights do not fit its architecture; train again") from None
    return nn.ModuleList([model, criterion]).to(checkpoint["model"]["encoder.weight"].device)


def load(path, device="cpu"):
    """Loads a trained model: `model, vocabulary = load("PTB.pt")`.

    Returns an RNNModel on `device`, in evaluation mode, with the dropout rates it was trained
    with; and the data.Dictionary of its words. The file alone is enough. Raises InputError.
    """
    checkpoint = read_checkpoint(path, device)
    flags = checkpoint["flags"]
    model, _ = build(checkpoint, path, **{rate: flags[rate] for rate in RATES if rate in flags})
    return model.eval(), Dictionary(checkpoint["vocabulary"])
