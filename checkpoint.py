"""The files of a run: whole or absent, sealed, nothing but data, written by one run at a time.

`model, vocabulary = load("PTB.pt")` is a trained model. Beside the checkpoint PTB.pt lie the
training state PTB.pt.state, all that the run needs to go on, and a JSON line an epoch in
PTB.pt.jsonl.
"""

import argparse
import contextlib
import hashlib
import io
import os
import shlex
import struct
from pathlib import Path

import torch
from torch import nn

import distributed
from bidirectional import make_model
from data import Dictionary, InputError
from flags import device as parse_device
from flags import resolve_device
from model import DROPOUTS, NOTES
from splitcross import SplitCrossEntropyLoss, default_splits
from utils import Preemption, environment, is_device_error, log, plain, set_up_device, warn

try:
    import fcntl
except ImportError:  # not POSIX: there is no lock; all else works
    fcntl = None

STATE, RECORDS, FINETUNE_RECORDS = ".state", ".jsonl", ".finetune.jsonl"  # after the path
CHECKPOINT = {
    "architecture": dict, "flags": dict, "vocabulary": list, "corpus": dict, "model": dict,
    "criterion": dict, "splits": list, "epoch": int, "valid_loss": float | int,
}
TRAINING_STATE = {
    "command": str, "flags": dict, "environment": dict, "architecture": dict, "vocabulary": list,
    "corpus": dict, "finetuning": bool, "epoch": int, "row": int, "seconds": float, "losses": list,
    "valid_losses": list, "best": float | int, "records": str, "done": bool,
    "high_loss_streak": int, "rollbacks": int, "model": dict, "criterion": dict,
    "average": dict | None, "optimizer": dict, "hidden": tuple | None, "generators": dict,
}
FORMATS = {"checkpoint": CHECKPOINT, "training state": TRAINING_STATE}
VERSION = 4
SEAL = b"sha256:"
DIGEST = 64  # characters of a SHA-256 in hexadecimal
# Flags that do not change what is computed; `data` is compared by its content.
FREE_FLAGS = (
    "data", "save", "resume", "epochs", "finetune", "log_interval", "cuda", "device", "tied",
    "checkpoint_minutes", "on_divergence",
)

# ------------------------------------------------------------ whole or absent


def write_atomically(path, content):
    """Puts the bytes `content` at `path`, where at every moment the old file lies or the new one.

    Written beside it, synced, renamed; then the folder is synced. Of a symbolic link the target is
    replaced. Raises InputError, naming the file, when that fails.
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
            os.fsync(descriptor)
            os.close(descriptor)
    except BaseException as error:  # a full disk or Ctrl-C alike: leave no half-written file
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        raise


class Saver:
    """Writes a run's files. One that cannot be written now is reported, kept, and retried.

    `pending` {path: content} are those that wait; a newer content replaces an older one.
    """

    def __init__(self):
        self.pending = {}
        self.reported = {}

    def write(self, path, content):
        """Writes a file, and those that wait. Returns whether none is left waiting."""
        self.pending[str(path)] = content
        return self.retry()

    def retry(self):
        """Tries again to write what waits. Returns whether none is left waiting."""
        for path, content in list(self.pending.items()):
            try:
                write_atomically(path, content)
            except InputError as error:
                if self.reported.get(path) != str(error):  # once, not at every try
                    warn(f"Warning: {error}; the next save tries again")
                self.reported[path] = str(error)
            else:
                del self.pending[path]
                if self.reported.pop(path, None):
                    log(f"{path} is written again")
        return not self.pending


def backup_file(path, suffix):
    """Copies the file at `path` and its training state to `path` + `suffix`, or that and a number.

    Returns the copy's path; an earlier copy of the same contents serves. Raises InputError.
    """
    contents = {
        end: Path(f"{path}{end}").read_bytes() for end in ("", STATE) if os.path.exists(path + end)
    }
    number = 1
    while True:
        copy = f"{path}{suffix}{number if number > 1 else ''}"
        if not any(os.path.exists(copy + end) for end in ("", STATE)):
            for end, content in contents.items():
                write_atomically(copy + end, content)
            return copy
        if all(os.path.exists(copy + end) and Path(copy + end).read_bytes() == content
               for end, content in contents.items()):
            return copy
        number += 1


# ------------------------------------------------------------ sealed data


def pack(kind, contents):
    """The bytes of a "checkpoint" or "training state": the dictionary `contents`, sealed.

    torch.save writes a zip archive. The seal is its comment: "sha256:" and the SHA-256 of all bytes
    before the digest. torch.load reads the file all the same, and `unzip -z` shows the digest.
    """
    file = io.BytesIO()
    torch.save({"format": f"awd-lstm {kind}", "version": VERSION, **contents}, file)
    file.seek(-2, io.SEEK_END)  # an archive's last field: the length of its comment, 0 so far
    file.write(struct.pack("<H", len(SEAL) + DIGEST) + SEAL)
    file.write(hashlib.sha256(file.getbuffer()).hexdigest().encode())
    return file.getbuffer()


def unpack(path, kind, device="cpu", content=None):
    """The dictionary that `pack` sealed, its tensors on `device`; nothing of it is executed.

    `content`: its bytes, where they are not to be read from `path`. Raises InputError, naming the
    file, when it is missing, damaged in any bit, or not of this kind and version.
    """
    if content is None:
        content = read_bytes(path, kind)
    if not is_sealed(content):
        raise InputError(
            f"{path}: is damaged, or no {kind} of main.py (the original code's pickled modules "
            "cannot be loaded safely); use a copy, or train again"
        )
    try:
        contents = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        found = contents["format"], contents["version"]
        wrong = [k for k, kinds in FORMATS[kind].items() if not isinstance(contents[k], kinds)]
    except Exception as error:  # torch meets a foreign file with many types of error
        if is_device_error(error):
            raise
        found, wrong = None, []
    if found != (f"awd-lstm {kind}", VERSION) or wrong:
        raise InputError(f"{path}: is no {kind} of this version of main.py; train again")
    return contents


def is_sealed(content):
    """Whether these bytes end in the SHA-256 of what precedes it."""
    content = memoryview(content)
    return hashlib.sha256(content[:-DIGEST]).hexdigest().encode() == content[-DIGEST:]


def read_bytes(path, kind):
    """The bytes of a file of `kind`. Raises InputError, naming it."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such {kind}; train one with main.py --save") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


@contextlib.contextmanager
def validate_state(path):
    """Turns errors from a sealed state whose parts do not fit together into InputError."""
    try:
        yield
    except InputError:
        raise
    except (
        ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
    ) as error:
        if is_device_error(error):
            raise
        raise InputError(
            f"{path}{STATE}: its parts do not fit together; remove it to start from the weights of "
            "the checkpoint alone"
        ) from None


# ------------------------------------------------------------ models


def read_checkpoint(path, device="cpu", content=None):
    """Reads what `pack_checkpoint` made. Raises InputError, see `unpack`."""
    return unpack(path, "checkpoint", device, content)


def build_params(checkpoint, path="checkpoint", **settings):
    """nn.ModuleList([model, criterion]) of a checkpoint, on its tensors' device.

    `settings` are RNNModel's dropout rates and `bf16`. Raises InputError, naming `path`, when the
    weights do not fit the architecture.
    """
    try:
        model = make_model(**checkpoint["architecture"], **settings)
        model.load_state_dict(checkpoint["model"])
        criterion = SplitCrossEntropyLoss(model.decoder.in_features, checkpoint["splits"])
        criterion.load_state_dict(checkpoint["criterion"])
        device = checkpoint["model"]["encoder.weight"].device
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if is_device_error(error):
            raise
        raise InputError(f"{path}: its weights do not fit its architecture; train again") from None
    return nn.ModuleList([model, criterion]).to(device)


def new_params(corpus, args):
    """A new nn.ModuleList([model, criterion]) for the corpus, on `args.device`."""
    ntoken = len(corpus.dictionary)
    model = make_model(
        args.model, ntoken, args.emsize, args.nhid, args.nlayers, tie_weights=True,
        attention=args.attention, attention_window=args.attention_window,
        bf16=args.precision == "bf16", **{rate: getattr(args, rate) for rate in DROPOUTS},
    )
    criterion = SplitCrossEntropyLoss(args.emsize, default_splits(ntoken))
    return nn.ModuleList([model, criterion]).to(args.device)


def saved_params(path, corpus, args, content=None):
    """nn.ModuleList([model, criterion]) of the checkpoint at `path`, with the dropouts of `args`.

    `content`: its bytes, where they are not to be read. Raises InputError when it is unusable or
    its vocabulary is not the corpus's.
    """
    checkpoint = read_checkpoint(path, args.device, content)
    check_vocabulary(checkpoint["vocabulary"], corpus, args.data, path)
    rates = {rate: getattr(args, rate) for rate in DROPOUTS}
    return build_params(checkpoint, path, bf16=args.precision == "bf16", **rates)


def check_vocabulary(words, corpus, data, path):
    """Raises InputError unless the corpus from --data has the words of the model at `path`."""
    if words != corpus.dictionary.idx2word:
        raise InputError(
            f"--data {data}: its vocabulary is not that of {path}; name the corpus that the model "
            "was trained on"
        )


def load(path, device="cpu"):
    """Loads a trained model: `model, vocabulary = load("PTB.pt")`.

    Returns an RNNModel on `device`, in evaluation mode, with the dropout rates it was trained
    with; and the data.Dictionary of its words. The file alone is enough. Raises InputError.
    """
    checkpoint = read_checkpoint(path, device)
    rates = {name: rate for name, rate in checkpoint["flags"].items() if name in DROPOUTS}
    model, _ = build_params(checkpoint, path, **rates)
    return model.eval(), Dictionary(checkpoint["vocabulary"])


def load_for_use(path, args, keep_bilm=False):
    """Loads the checkpoint at `path` on `args.device`, by default CUDA where there is one.

    Returns (nn.ModuleList([model, criterion]) in evaluation mode and float32, data.Dictionary).
    Unless `keep_bilm`, a biLM becomes its forward language model, with a note on stderr. Raises
    InputError for a flag that cannot be met, and for biLSTM, which reads the word it predicts.
    """
    resolve_device(args)
    args.precision = "fp32"
    set_up_device(args)
    checkpoint = read_checkpoint(path, args.device)
    params = build_params(checkpoint, path).eval()
    found = params[0].rnn_type
    if args.model not in (None, found):
        raise InputError(f"--model {args.model}: {path} holds a model {found}; leave the flag out")
    if found == "biLSTM":
        raise InputError(f"{path}: {NOTES[found]}; name another model")
    if found == "biLM" and not keep_bilm:
        params[0] = params[0].forward_half()
        cloze = checkpoint["flags"].get("objective") == "cloze"
        warn(
            f"Note: of the biLM {path}, its forward language model alone is used"
            + (", which was not trained: it was for cloze prediction" if cloze else "")
        )
    return params, Dictionary(checkpoint["vocabulary"])


# ------------------------------------------------------------ training states


def read_state(path, command=None):
    """The training state beside the checkpoint at `path`, on the CPU; None where there is none.

    With `command` ("main.py", "finetune.py"), the state of another command's finished run counts
    as none. Raises InputError when the file is unusable, or the other command's run unfinished.
    """
    file = f"{path}{STATE}"
    if not path or not os.path.exists(file):
        return None
    state = unpack(file, "training state")
    with validate_state(path):
        finished = is_finished(state)
    if command in (None, state["command"]):
        return state
    if finished:
        return None
    raise InputError(
        f"--resume {path}: {file} is of an unfinished run of {state['command']}; "
        f"{how_to_resume(state['command'], path)} continues it"
    )


def is_over(state):
    """Whether the phase of the run that this state is of (training, fine-tuning) has ended."""
    flags = state["flags"]
    epochs = flags.get("finetune", flags["epochs"]) if state["finetuning"] else flags["epochs"]
    return state["done"] or state["epoch"] > epochs


def is_finished(state):
    """Whether the whole run has ended, a fine-tuning that was asked for included."""
    return is_over(state) and (state["finetuning"] or not state["flags"].get("finetune"))


def how_to_resume(command, path):
    """The shell command that continues the run at `path`."""
    separator = "=" if str(path).startswith("-") else " "
    return f"{distributed.launcher()} {command} --resume{separator}{shlex.quote(str(path))}"


def changes(state, flags, device):
    """What keeps a resumed run from being bit-identical: ["lr 30 -> 10", ...]; [] if nothing."""
    free = set(FREE_FLAGS)
    if state["finetuning"]:
        free.add("schedule")
    elif flags.get("schedule", "constant") != "constant":
        free.remove("epochs")  # the rate's curve is stretched over them
    before, after = state["environment"], environment(device)
    before |= {flag: value for flag, value in state["flags"].items() if flag not in free}
    after |= {flag: flags[flag] for flag in before if flag in flags}
    found = [f"{n} {before.get(n)} -> {after[n]}" for n in after if before.get(n) != after[n]]
    if device.type != "cpu":
        found.append(f"{device.type} need not compute the same bits twice")
    return found


# ------------------------------------------------------------ one run to a path


@contextlib.contextmanager
def run_lock(path):
    """While it is held no other process trains to `path`; on the first rank.

    The lock is the operating system's, on `path`.lock: however its holder dies, it is free then.
    Raises InputError when another process holds it.
    """
    if fcntl is None or not distributed.is_first():
        yield
        return
    lock = f"{os.path.realpath(path)}.lock"
    with contextlib.ExitStack() as held:
        while True:
            try:
                file = held.enter_context(open(lock, "a+"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"--save {path}: another process is training to it; wait for it, or name "
                    "another path"
                ) from None
            except OSError as error:
                raise InputError(f"--save {path}: cannot lock {lock} ({error.strerror})") from None
            if os.fstat(file.fileno()).st_size:
                raise InputError(f"--save {path}: {lock} exists and is no lock; name another path")
            if os.fstat(file.fileno()).st_nlink:  # else its former holder has just removed it
                break
        held.callback(lambda: os.path.exists(lock) and os.unlink(lock))
        yield


def check_writable(path, others=()):
    """Raises InputError unless a run can save to `path` (and `others`) without loss to the user.

    What exists there, or where the training state and the JSON lines go, may only be replaced where
    it is of the same kind.
    """
    if os.path.isdir(path) or str(path).endswith("/"):
        raise InputError(f"--save {path}: is a folder; name a file in it")
    folder = Path(path).parent
    if not folder.is_dir():
        raise InputError(f"--save {path}: the folder {folder} does not exist; create it")
    probe = f"{path}{FINETUNE_RECORDS}.probe"  # longer than any name of a run
    try:
        Path(probe).touch()
        os.unlink(probe)
    except OSError as error:
        raise InputError(f"--save {path}: cannot be written ({error.strerror})") from None
    for file in others:
        with refuse_foreign(path, file):
            if os.path.exists(file):
                read_checkpoint(file)
    with refuse_foreign(path, f"{path}{STATE}"):
        read_state(path)
    for suffix in (RECORDS, FINETUNE_RECORDS):
        file = Path(f"{path}{suffix}")
        with refuse_foreign(path, file):
            if file.exists() and file.read_bytes()[:9] not in (b"", b'{"epoch":'):
                raise OSError


@contextlib.contextmanager
def refuse_foreign(path, file):
    """Turns errors of reading what lies at `file` into an InputError that refuses to replace it."""
    try:
        yield
    except (InputError, OSError):
        raise InputError(
            f"--save {path}: {file} is damaged, or not a file of a run; name another path"
        ) from None


def copy_model(path, save):
    """Copies the checkpoint at `path` to `save`, where that is another path.

    Raises InputError where there is one already.
    """
    if path == save:
        return
    if distributed.is_first():
        if os.path.exists(save):
            raise InputError(
                f"--save {save}: exists; --resume {save} goes on from it, or name another path"
            )
        if os.path.exists(path):
            read_checkpoint(path)
            write_atomically(save, Path(path).read_bytes())
    distributed.broadcast(None)  # the others read it after that


# ------------------------------------------------------------ going on with a run


def flags_of_run(state, path):
    """The flags of the run of `state`, saved beside `path`, as defaults of what resumes it."""
    flags = {**state["flags"], "save": path, "resume": path, "cuda": False}
    try:
        flags["device"] = parse_device(flags.get("device"))
    except (argparse.ArgumentTypeError, TypeError):  # resumed on another machine
        flags["device"] = None
    return flags


def check_corpus(state, corpus, args):
    """Raises InputError, naming what differs, unless the run of `state` is trained on `corpus`."""
    name, digest = state["corpus"].get("name"), state["corpus"].get("sha256")
    if digest != corpus.digest:
        same = state["vocabulary"] == corpus.dictionary.idx2word
        raise InputError(
            f"--data {args.data}: its {'text' if same else 'vocabulary'} is not that of the run in "
            f"{args.resume}{STATE} ({name}, sha256 {digest})"
        )


def resume_from(state, trainer):
    """Has a Trainer go on from `state`, read from beside `args.resume`.

    Logs that, and whether bit for bit. Raises InputError when state or checkpoint is unusable.
    """
    args, run = trainer.args, trainer.run
    with validate_state(args.resume):
        trainer.load_state_dict(state)
        changed = changes(state, run.flags, args.device)
    same = {**state["flags"], "resume": args.resume, "cuda": args.cuda} == run.flags
    trainer.saved = args.resume == args.save and same
    log(f"Resuming the run of {args.save} at {trainer.position()}")
    changed += compare_checkpoint(state, trainer, bool(changed))
    if changed:
        log(f"Note: no longer bit-identical to a run never interrupted: {'; '.join(changed)}")
    else:
        log("It goes on bit-identical to a run never interrupted")
    if trainer.done:
        log("It has come to its end: validation has stopped improving")
    elif trainer.is_over():
        more = "--finetune" if trainer.finetuning and "finetune" in run.flags else "--epochs"
        log(f"It has come to its end; {more} asks for more")


def compare_checkpoint(state, trainer, changed):
    """Compares `state` with the best model on disk; returns what keeps them from fitting."""
    path = trainer.args.save
    if trainer.best == float("inf"):
        return []
    if not os.path.exists(path):
        if trainer.is_over():
            raise InputError(
                f"{path}: the model of this finished run is gone; put it back, or ask for more "
                "epochs"
            )
        missing = f"{path} (valid loss {trainer.best:.2f}) is gone"
        warn(f"Warning: {missing}; the model of the next epoch takes its place")
        trainer.best = float("inf")
        return [missing]
    checkpoint = read_checkpoint(path)
    for key in ("architecture", "vocabulary"):
        if checkpoint[key] != state[key]:
            raise InputError(
                f"{path}{STATE}: is not of the run that made {path}: another {key}; put the right "
                "one there, or remove it to start from the weights alone"
            )
    loss, objectives = checkpoint["valid_loss"], [
        saved["flags"].get("objective") for saved in (checkpoint, state)
    ]
    if checkpoint["corpus"] != state["corpus"] or objectives[0] != objectives[1]:
        # What this run began from, whose loss says nothing here; or it was replaced.
        mine = f"{path} is of another text or objective, not this run's best model"
        return [mine] if trainer.best in trainer.valid_losses else []
    if loss > trainer.best + 1e-3:  # a later epoch's is lower
        return [f"{path} (valid loss {loss:.3f}) is not this run's best ({trainer.best:.3f})"]
    if changed:  # it can be of a later epoch than the state
        trainer.best = min(trainer.best, loss)
    return []


# ------------------------------------------------------------ a run


class Run:
    """The files that a run writes at `args.save`, and what it goes on from.

    `command` is the command's file name; `check` raises Preempted after a signal, see
    utils.Preemption.
    """

    def __init__(self, args, command, check=lambda due=False: due):
        self.path, self.flags = args.save, plain(args)
        self.command, self.check = command, check
        self.saver = Saver()

    def resume_command(self):
        """The shell command that goes on with this run."""
        return how_to_resume(self.command, self.path)

    def save_model(self, paths, params, corpus, **progress):
        """Writes a checkpoint, all that is needed to use a model; on the first rank.

        `progress`: epoch, valid_loss (nats), averaged, finetuned.
        """
        if distributed.is_first():
            content = pack("checkpoint", {**self.describe(params, corpus), **progress})
            for path in paths:
                self.saver.write(path, content)

    def save_records(self, lines, finetuning):
        """Writes the JSON lines so far."""
        if distributed.is_first():
            suffix = FINETUNE_RECORDS if finetuning else RECORDS
            self.saver.write(f"{self.path}{suffix}", lines.encode())

    def save_state(self, params, corpus, progress):
        """Writes the training state; returns whether no file is left waiting.

        The checkpoint it refers to is written first, so the state is never newer than that.
        """
        succeeded = self.saver.retry()
        if succeeded and distributed.is_first():
            state = {**self.describe(params, corpus), **progress, "command": self.command}
            path = f"{self.path}{STATE}"
            succeeded = self.saver.write(path, pack("training state", state))
            self.saver.pending.pop(path, None)  # the next chance has a newer one
        return distributed.broadcast(succeeded)

    def read_state(self):
        """The training state on disk; None, with a warning, where it cannot be used."""
        try:
            return read_state(self.path)
        except InputError as unusable:
            warn(f"Warning: {unusable}")
            return None

    def best_model(self, corpus, args):
        """The best model, from its file, or from memory where that could not be written."""
        content = self.saver.pending.get(str(self.path))
        content = distributed.broadcast(content and bytes(content))
        return saved_params(self.path, corpus, args, content)

    def describe(self, params, corpus):
        """What a checkpoint and a training state share: a model, and what it was trained on."""
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
    """A Run at `args.save`, the only one there, whose ranks are connected and signals wait.

    Raises InputError unless all that it may write can be written.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(distributed.process_group(args.device))
        args.save = distributed.broadcast(args.save)  # one made from the time differs
        if distributed.is_first():
            mine = [] if args.resume == args.save else [args.save]  # what it resumes is read later
            check_writable(args.save, [*mine, *(f"{args.save}.e{epoch}" for epoch in args.when)])
        held.enter_context(run_lock(args.save))
        preemption = held.enter_context(Preemption())
        if distributed.is_first() and args.resume != args.save:
            set_aside(args.save)
        yield Run(args, command, preemption.check)


def set_aside(path):
    """Keeps the unfinished run at `path` under another name when a new one begins there.

    A run of less than a minute and less than an epoch is not kept.
    """
    state = read_state(path)
    if state and not is_finished(state) and (state["valid_losses"] or state["seconds"] > 60):
        again = how_to_resume(state["command"], backup_file(path, ".unfinished"))
        log(f"Note: {path} is of an unfinished run, which is kept: {again} continues it")
