"""Small shared helpers: hidden states, checkpoints, log lines."""

import contextlib
import io
import os
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from data import Dictionary, InputError, batchify, get_batch
from model import RNNModel
from splitcross import SplitCrossEntropyLoss

__all__ = [
    "batchify", "get_batch", "load", "log", "read_checkpoint", "repackage_hidden",
    "save_checkpoint",
]

FORMAT, VERSION = "awd-lstm checkpoint", 1
KEYS = ("architecture", "flags", "vocabulary", "corpus", "model", "criterion", "splits")
RECORDS, FINETUNE_RECORDS = ".jsonl", ".finetune.jsonl"  # appended to the checkpoint's path
RATES = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")  # RNNModel's dropout rates


def repackage_hidden(h):
    """Detaches a hidden state, a tensor or nested tuples and lists of them, from its history."""
    if isinstance(h, torch.Tensor):
        return h.detach()
    return tuple(repackage_hidden(v) for v in h)


def log(line):
    """Prints a line to standard output, above the progress bar where one is shown."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def check_writable(path, checkpoints=()):
    """Raises InputError unless a checkpoint, and the files beside it, can be written at `path`.

    What exists at `path`, at the paths in `checkpoints`, or where the JSON lines go, may be
    replaced only if it is of the same kind: nothing of the user's own is written over.
    """
    if Path(path).is_dir() or str(path).endswith("/"):
        raise InputError(f"--save {path}: is a folder; name a file in it")
    for file in map(Path, [path, *checkpoints]):
        if file.exists() and not is_checkpoint(file):
            raise InputError(f"--save {path}: {file} exists and is no checkpoint; name another")
    for suffix in (RECORDS, FINETUNE_RECORDS):
        file = Path(f"{path}{suffix}")
        if file.is_dir() or (file.exists() and file.read_bytes()[:9] not in (b"", b'{"epoch":')):
            raise InputError(f"--save {path}: {file} exists and is no run's record; name another")
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"--save {path}: the folder {path.parent} does not exist; create it")
    probe = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise InputError(f"--save {path}: cannot be written ({error.strerror})") from None


def write_atomically(path, content):
    """Puts the bytes `content` at `path`, which at every moment is the old file or the new one.

    Raises InputError, naming the file, when that fails.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # a full disk or Ctrl-C alike: leave no half-written file
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        raise


def save_checkpoint(path, params, corpus, flags, **progress):
    """Writes all that is needed to use a model: tensors and plain data only.

    `params` is nn.ModuleList([model, criterion]). Keys: format, version; architecture (RNNModel's
    arguments without the dropout rates); flags; vocabulary (words in order of id); corpus (name,
    sha256); model and criterion (state dicts), splits; and `progress` (epoch, valid_loss in nats,
    averaged, finetuned).
    """
    model, criterion = params
    checkpoint = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": model.architecture,
        "flags": flags,
        "vocabulary": corpus.dictionary.idx2word,
        "corpus": {"name": corpus.name, "sha256": corpus.digest},
        "model": model.state_dict(),
        "criterion": criterion.state_dict(),
        "splits": criterion.splits,
        **progress,
    }
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_atomically(path, content.getbuffer())


def read_checkpoint(path, device="cpu"):
    """Reads what `save_checkpoint` wrote, its tensors on `device`, without executing any of it.

    Raises InputError, naming the file, when it is missing, damaged, or of another kind.
    """
    try:
        content = io.BytesIO(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; train one with main.py --save") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        checkpoint = torch.load(content, map_location=device, weights_only=True)
    except Exception:  # torch meets a damaged or foreign file with many types of error
        raise InputError(
            f"{path}: is damaged, or no checkpoint of main.py (one that pickles whole modules, as "
            "the original AWD-LSTM code wrote, cannot be loaded safely); train again"
        ) from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"{path}: is a file of torch's, but no checkpoint of main.py")
    if checkpoint.get("version") != VERSION:
        raise InputError(
            f"{path}: has format version {checkpoint.get('version')}, this code reads {VERSION}; "
            "use the version of the code that wrote it"
        )
    lacking = [key for key in KEYS if key not in checkpoint]
    if lacking:
        raise InputError(f"{path}: lacks {', '.join(lacking)}; is it damaged?")
    return checkpoint


def is_checkpoint(path):
    """Whether `read_checkpoint` can read what lies at `path`."""
    try:
        read_checkpoint(path)
    except InputError:
        return False
    return True


def build(checkpoint, path="checkpoint", **rates):
    """nn.ModuleList([model, criterion]) of a checkpoint, on its tensors' device.

    `rates` are RNNModel's dropout rates. Raises InputError, naming `path`, when the weights do not
    fit the architecture.
    """
    try:
        model = RNNModel(**checkpoint["architecture"], **rates)
        model.load_state_dict(checkpoint["model"])
        criterion = SplitCrossEntropyLoss(model.decoder.in_features, checkpoint["splits"])
        criterion.load_state_dict(checkpoint["criterion"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise InputError(f"{path}: its weights do not fit its architecture; train again") from None
    return nn.ModuleList([model, criterion]).to(checkpoint["model"]["encoder.weight"].device)


def load(path, device="cpu"):
    """Loads a trained model: `model, vocabulary = load("PTB.pt")`.

    Returns an RNNModel on `device`, in evaluation mode, with the dropout rates it was trained
    with; and the data.Dictionary of its words. The file alone is enough. Raises InputError.
    """
    checkpoint = read_checkpoint(path, device)
    model, _ = build(checkpoint, path, **{rate: checkpoint["flags"][rate] for rate in RATES})
    return model.eval(), Dictionary(checkpoint["vocabulary"])
