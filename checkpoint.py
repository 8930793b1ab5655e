"""The files of a run: written atomically, sealed, data only, one run at a time per path.

`load("PTB.pt")` loads a trained model. Beside the checkpoint PTB.pt are the training state
PTB.pt.state, from which the run can be resumed, and PTB.pt.jsonl, with one JSON line per epoch.
"""

import contextlib
import hashlib
import io
import os
import shlex
import struct
from pathlib import Path

import torch

import distributed
from bidirectional import make_model
from data import Dictionary, InputError
from language_model import LanguageModel
from model import DROPOUTS, NOTES, training_settings
from splitcross import SplitCrossEntropyLoss
from utils import (
    FINETUNE_RECORDS, RECORDS, Preemption, append_rest, is_device_error, log, plain_flags,
    read_with_vocabulary, warn,
)

try:
    import fcntl
except ImportError:  # not POSIX: runs are not locked
    fcntl = None

STATE, BASE = ".state", ".base"  # after the path of the checkpoint
SUFFIXES = ("", STATE, RECORDS, FINETUNE_RECORDS, BASE, BASE + STATE)
VERSION = 7
SEAL = b"sha256:"
DIGEST = 64  # characters of a SHA-256 in hexadecimal

# ------------------------------------------------------------ atomic writes and seals


def write_atomically(path, content):
    """Writes the bytes `content` to `path`, which at any moment holds the old file or the new one.

    Writes a temporary file, syncs it, renames it, and syncs the folder. A symbolic link stays, and
    its target is replaced. Raises InputError, naming the file, on failure.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        with contextlib.suppress(OSError):  # not every system can sync a folder
            descriptor = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except BaseException as error:  # including Ctrl-C: leave no partial file behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        raise


def has_files(path):
    """Whether a run has written files at `path`."""
    return any(os.path.exists(f"{path}{suffix}") for suffix in SUFFIXES)


def unused_path(path, suffix):
    """`path` + `suffix`, followed by a number if a run has files there."""
    unused, number = f"{path}{suffix}", 1
    while has_files(unused):
        number += 1
        unused = f"{path}{suffix}{number}"
    return unused


def copy_base(path):
    """Copies the checkpoint at `path` and its training state, if any; returns the copy's path."""
    copy = unused_path(path, BASE)
    for suffix in ("", STATE):
        if os.path.exists(f"{path}{suffix}"):
            write_atomically(f"{copy}{suffix}", Path(f"{path}{suffix}").read_bytes())
    return copy


def pack(kind, contents):
    """Serializes the dictionary `contents` of a "checkpoint" or "training state", and seals it.

    torch.save writes a zip archive. The seal is its comment: "sha256:" and the SHA-256 of all bytes
    before the digest. torch.load ignores it, and `unzip -z` shows it.
    """
    file = io.BytesIO()
    torch.save({"format": f"awd-lstm {kind}", "version": VERSION, **contents}, file)
    file.seek(-2, io.SEEK_END)  # an archive's last field: the length of its comment, 0 so far
    file.write(struct.pack("<H", len(SEAL) + DIGEST) + SEAL)
    file.write(hashlib.sha256(file.getbuffer()).hexdigest().encode())
    return file.getbuffer()


def unpack(path, kind, device="cpu", content=None):
    """The dictionary that `pack` sealed, with its tensors on `device`; executes no code from it.

    If the bytes `content` are given, `path` is not read. Raises InputError, naming the file, when
    it is missing, damaged in any bit, or not of this kind and version.
    """
    device = torch.device(device)  # a mistyped device is not damage: torch's RuntimeError
    if content is None:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such {kind}; main.py --save writes one after an epoch")
        content = Path(path).read_bytes()
    if not is_sealed(content):
        advice = "use a copy, or train again (files of awd-lstm-lm cannot be loaded)"
        if kind == "training state":
            advice = "use a copy, or move it away to start from the checkpoint's weights"
        raise InputError(f"{path}: is damaged, or not a {kind} of main.py; {advice}")
    try:
        contents = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        identity = contents["format"], contents["version"]
    except Exception as error:  # torch raises many types of error for a foreign file
        if is_device_error(error):
            raise
        identity = None
    if identity == ("awd-lstm training state", VERSION) and kind == "checkpoint":
        raise InputError(f"{path}: is a training state; name its checkpoint, without {STATE}")
    if identity != (f"awd-lstm {kind}", VERSION):
        raise InputError(f"{path}: is not a {kind} of this version of main.py; train again")
    return contents


def is_sealed(content):
    """Whether the bytes end with the SHA-256 of the bytes before that."""
    content = memoryview(content)
    return hashlib.sha256(content[:-DIGEST]).hexdigest().encode() == content[-DIGEST:]


# ------------------------------------------------------------ models


def read_checkpoint(path, device="cpu", content=None):
    """The dictionary that `Run.save_model` wrote. Raises InputError, see `unpack`."""
    return unpack(path, "checkpoint", device, content)


def build_params(checkpoint, **settings):
    """nn.ModuleList([model, criterion]) of a checkpoint, on its tensors' device.

    `settings` are those of model.training_settings.
    """
    model = make_model(**checkpoint["architecture"], **settings)
    model.load_state_dict(checkpoint["model"])
    criterion = SplitCrossEntropyLoss(model.decoder.in_features, checkpoint["splits"])
    criterion.load_state_dict(checkpoint["criterion"])
    return torch.nn.ModuleList([model, criterion]).to(checkpoint["model"]["encoder.weight"].device)


def saved_params(path, corpus, args, content=None):
    """nn.ModuleList([model, criterion]) of the checkpoint at `path`, with the dropouts of `args`.

    The corpus is encoded with its vocabulary. If the bytes `content` are given, `path` is not read.
    Raises InputError when the checkpoint is unusable or has no token for unknown words.
    """
    checkpoint = read_checkpoint(path, args.device, content)
    read_with_vocabulary(corpus, vocabulary_of(checkpoint, args.unk), path)
    return build_params(checkpoint, **training_settings(args))


def vocabulary_of(contents, unk=None):
    """The data.Dictionary of a checkpoint or state. Raises InputError if it lacks `unk`."""
    flags = contents["flags"]
    return Dictionary(contents["vocabulary"], flags["level"], flags["unk"] if unk is None else unk)


def load(path, device="cpu", unk=None):
    """Loads a trained model: `lm = load("PTB.pt")`, or `model, vocabulary = load("PTB.pt")`.

    Returns a LanguageModel on `device`, in evaluation mode, with its training dropout rates.
    `unk`: its token for unknown words, by default that of training. Raises InputError.
    """
    checkpoint = read_checkpoint(path, device)
    rates = {name: checkpoint["flags"][name] for name in DROPOUTS}
    return LanguageModel(build_params(checkpoint, **rates), vocabulary_of(checkpoint, unk))


# ------------------------------------------------------------ training states


def read_state(path):
    """The training state beside the checkpoint at `path`, on the CPU; None if there is none.

    Raises InputError, see `unpack`.
    """
    file = f"{path}{STATE}"
    return unpack(file, "training state") if path and os.path.exists(file) else None


def is_finished(state):
    """Whether the run of a training state has finished, including its fine-tuning, if any."""
    flags, epochs = state["flags"], state["flags"]["epochs"]
    if state["finetuning"]:
        epochs = flags.get("finetune", epochs)  # main.py's flag; finetune.py has --epochs
    elif flags.get("finetune"):
        return False
    return state["done"] or state["epoch"] > epochs


def how_to_resume(command, path):
    """The shell command that continues the run at `path`."""
    return f"{distributed.launcher()} {command} --resume {shlex.quote(str(path))}"


def continuation(state, path):
    """The end of a log line: how to continue the run of `state`, now at `path`; "" if finished."""
    if state is None or is_finished(state):
        return ""
    return f"; {how_to_resume(state['command'], path)} continues the unfinished run"


def state_to_resume(path, command):
    """The training state at `path`, from which `command` resumes; None if only weights are there.

    A finished run of main.py is the start of finetune.py. Raises InputError if the run belongs to
    the other command and is unfinished or has been fine-tuned.
    """
    state = read_state(path)
    if state is None or state["command"] == command:
        return state
    other, extension = state["command"], ""
    if not is_finished(state):
        raise InputError(
            f"--resume {path}: {path}{STATE} belongs to an unfinished run of {other}; "
            f"{how_to_resume(other, path)} continues it"
        )
    if not state["finetuning"]:
        return None
    if not state["done"]:
        flag = "--finetune" if other == "main.py" else "--epochs"
        extension = f"{how_to_resume(other, path)} {flag} N, with a higher N, extends it; "
    raise InputError(
        f"--resume {path}: its fine-tuning by {other} is finished; {extension}"
        f"finetune.py --save {path} fine-tunes it again; to start a new run of main.py from its "
        f"weights, copy {path} to another name and resume the copy"
    )


def reread_state(args, corpus, command):
    """The training state of `args.resume` again, now that the run is locked.

    Raises InputError unless the run is trained on the text of `corpus`.
    """
    state = state_to_resume(args.resume, command)
    if state["corpus"]["sha256"] != corpus.digest:
        raise InputError(
            f"--data {args.data}: its text is not that of the run of {args.resume}; use that, or "
            f"copy {args.resume} elsewhere to start from its weights only"
        )
    read_with_vocabulary(corpus, vocabulary_of(state, args.unk), args.resume)
    return state


# ------------------------------------------------------------ one run per path


@contextlib.contextmanager
def run_lock(path):
    """Keeps other processes from training to `path`; the first rank holds the lock.

    The operating system locks `path`.lock, so the lock is released however its holder dies.
    Raises InputError when another process holds it, or the folder is not writable.
    """
    if fcntl is None or not distributed.is_first():
        yield
        return
    with contextlib.ExitStack() as held:
        lock = Path(f"{path}.lock")
        try:
            file = held.enter_context(open(lock, "a"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # its last holder has just removed it
                raise BlockingIOError
        except BlockingIOError:
            raise InputError(
                f"--save {path}: in use by another process; wait for it, or choose another path"
            ) from None
        except OSError as error:
            raise InputError(
                f"--save {path}: cannot be written ({error.strerror}); choose another path"
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder may be read-only by now
                lock.unlink()


def check_replaceable(args):
    """Raises InputError if the run would overwrite a file of another kind."""
    path = args.save
    if os.path.isdir(path) or not os.path.basename(path):
        raise InputError(f"--save {path}: is not a file name; choose one, such as model.pt")
    checkpoints = [path, *(f"{path}.e{epoch}" for epoch in args.when)]
    kinds = dict.fromkeys(checkpoints, "checkpoint") | {f"{path}{STATE}": "training state"}
    kinds |= {f"{path}{suffix}": "JSON lines" for suffix in (RECORDS, FINETUNE_RECORDS)}
    kinds[f"{path}.lock"] = "lock"
    for file, kind in kinds.items():
        if os.path.exists(file) and not is_of_kind(file, kind):
            raise InputError(f"{file}: is damaged or was not written by a run; move it away")


def is_of_kind(file, kind):
    """Whether a file is of that kind: "checkpoint", "training state", "JSON lines" or "lock"."""
    if not os.path.isfile(file):
        return False
    if kind == "lock":
        return os.path.getsize(file) == 0
    if kind == "JSON lines":
        return b'{"epoch":'.startswith(Path(file).read_bytes()[:9])
    try:
        unpack(file, kind)
    except InputError:
        return False
    return True


def copy_model(path, save):
    """Copies the checkpoint at `path` to `save`. Raises InputError if a run has files there."""
    if path != save and distributed.is_first():
        if has_files(save):
            raise InputError(
                f"--save {save}: already exists; use --resume {save}, or choose another path"
            )
        if os.path.exists(path):
            read_checkpoint(path)
            write_atomically(save, Path(path).read_bytes())
    distributed.broadcast(None)  # the other ranks wait for the copy


class Run:
    """Writes the files of a run to `args.save`.

    A file that cannot be written is reported, kept in memory, and tried again at the next save.
    `command` is the command's file name; `check_signals` raises Preempted after a signal,
    see utils.Preemption.
    """

    def __init__(self, args, command, check_signals=lambda due=False: due):
        self.path, self.flags = args.save, plain_flags(args)
        self.command, self.check_signals = command, check_signals
        self.resume_command = how_to_resume(command, args.save)
        self.pending = {}  # path: bytes that could not be written yet

    def write(self, path, content):
        """Writes a file and all pending ones. Returns whether no file is left pending."""
        self.pending[str(path)] = content
        return self.retry()

    def retry(self):
        """Tries to write the pending files. Returns whether no file is left pending."""
        for path, content in list(self.pending.items()):
            try:
                if path == self.path or not (path.endswith(RECORDS) and append_rest(path, content)):
                    write_atomically(path, content)
            except InputError as error:
                warn(f"Warning: {error}; will try again at the next save")
            else:
                del self.pending[path]
        return not self.pending

    def save_model(self, paths, params, corpus, **progress):
        """Writes a checkpoint, which is enough to use the model; on the first rank.

        `progress`: epoch, valid_loss (nats), averaged, finetuned.
        """
        if distributed.is_first():
            content = pack("checkpoint", {**self.contents(params, corpus), **progress})
            for path in paths:
                self.write(path, content)

    def save_records(self, lines, finetuning):
        """Writes the JSON lines so far."""
        if distributed.is_first():
            suffix = FINETUNE_RECORDS if finetuning else RECORDS
            self.write(f"{self.path}{suffix}", lines.encode())

    def save_state(self, params, corpus, trainer_state):
        """Writes the training state; returns whether no file is left pending."""
        path = f"{self.path}{STATE}"
        self.pending.pop(path, None)  # this state replaces it
        succeeded = self.retry()  # the state is never newer than the checkpoint it refers to
        if succeeded and distributed.is_first():
            state = {**self.contents(params, corpus), **trainer_state, "command": self.command}
            succeeded = self.write(path, pack("training state", state))
        return distributed.broadcast(succeeded)

    def best_model(self, corpus, args):
        """The best model, from its file, or from memory if it could not be written."""
        content = self.pending.get(self.path)
        content = distributed.broadcast(content and bytes(content))
        return saved_params(self.path, corpus, args, content)

    def contents(self, params, corpus):
        """The contents that checkpoints and training states share: the model and its origin."""
        model, criterion = params
        return {
            "architecture": model.architecture,
            "flags": self.flags,
            "vocabulary": corpus.dictionary.idx2word,
            "corpus": {"name": corpus.name, "sha256": corpus.digest},
            "model": model.state_dict(),
            "criterion": criterion.state_dict(),
            "splits": criterion.splits,
            "note": NOTES.get(model.rnn_type, ""),
        }


@contextlib.contextmanager
def open_run(args, command):
    """Locks `args.save`, connects the ranks, defers signals, and yields a Run.

    Raises InputError if the run could not write its files, or would overwrite other files.
    """
    with distributed.process_group(args.device):
        args.save = distributed.broadcast(args.save)  # a name made from the time differs by rank
        if distributed.is_first():
            check_replaceable(args)
        with run_lock(args.save), Preemption() as preemption:
            yield Run(args, command, preemption.check_signals)


def keep_older_run(path, when):
    """Renames the files of an older run at `path`, so that a new run does not replace them.

    `when`: the epochs whose models the new run saves too. A run is not kept if it has neither a
    model nor a finished epoch, and lasted less than a minute.
    """
    state = read_state(path)
    has_begun = state and (state["valid_losses"] or state["seconds"] > 60)
    if not (has_begun or os.path.exists(path)):
        return
    kept = unused_path(path, ".old")
    for suffix in (*SUFFIXES, *(f".e{epoch}" for epoch in when)):
        if os.path.exists(f"{path}{suffix}"):
            os.rename(f"{path}{suffix}", f"{kept}{suffix}")
    log(f"Note: {path} held an older run, now at {kept}{continuation(state, kept)}")
