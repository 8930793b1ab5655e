"""What a run needs to go on as if it had not been interrupted, beside its weights."""

import argparse
import contextlib
import random
import shlex
from pathlib import Path

import numpy as np
import torch

import flags
import parallel
from data import InputError
from files import is_of_device, unpack

STATE = ".state"  # appended to the checkpoint's path
KIND, VERSION = "training state", 3
# What a run has whose command knows no schedule.
UNSCHEDULED = {"schedule": "constant", "regularization_ramp": None, "recipe": "published"}
KEYS = {
    "command": str, "flags": dict, "environment": dict, "architecture": dict, "vocabulary": list,
    "corpus": dict, "finetuning": bool, "epoch": int, "row": int, "seconds": float, "losses": list,
    "logs": list, "best": float | int, "records": str, "done": bool, "above": int, "rollbacks": int,
    "model": dict, "criterion": dict, "averaged": dict | None, "optimizer": dict,
    "hidden": list | None, "generators": dict,
}

# A flag of these cannot change in the middle of a run: the position in the text, the optimizer's
# state or the random stream would have no meaning.
FIXED = ("batch_size", "optimizer", "seed", "decoder_bias", "objective", "recipe")
# These change nothing in what is computed; `data` is compared by its content.
FREE = (
    "data", "save", "resume", "epochs", "finetune", "log_interval", "cuda", "device", "tied",
    "checkpoint_minutes", "on_divergence", "by_recipe",
)


@contextlib.contextmanager
def making_sense(path):
    """Turns what goes wrong with a state that is sealed, but makes no sense, into InputError."""
    try:
        yield
    except InputError:
        raise
    except (
        ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
    ) as error:
        if is_of_device(error):
            raise
        raise InputError(
            f"{path}{STATE}: its parts do not fit together; remove it to start from the weights of "
            "the checkpoint alone"
        ) from None


def read_state(path, command=None):
    """The training state beside the checkpoint at `path`, on the CPU; None where there is none.

    With `command` ("main.py", "finetune.py"), the state of another command's finished run counts
    as none. Raises InputError when the file is unusable, or the other command's run unfinished.
    """
    file = Path(f"{path}{STATE}")
    if not file.exists():
        return None
    state = unpack(file, KIND, VERSION, KEYS)
    with making_sense(path):
        finished = is_finished(state)
    if command is None or state["command"] == command:
        return state
    if finished:
        return None
    raise InputError(
        f"--resume {path}: {file} is of an unfinished run of {state['command']}; "
        f"{how_to_resume(state['command'], path)} continues it"
    )


def is_over(state):
    """Whether the phase of the run that this state is of (training, fine-tuning) has ended."""
    targets = state["flags"]
    epochs = targets["epochs"]
    if state["finetuning"]:
        epochs = targets.get("finetune", epochs)
    return state["done"] or state["epoch"] > epochs


def is_finished(state):
    """Whether the whole run is at its end, a fine-tuning that was asked for included."""
    return is_over(state) and (state["finetuning"] or not state["flags"].get("finetune"))


def how_to_resume(command, path):
    """The shell command that continues the run at `path`."""
    separator = "=" if str(path).startswith("-") else " "
    return f"{parallel.launcher()} {command} --resume{separator}{shlex.quote(str(path))}"


def inherit(given, state, path, defaults):
    """The flags of an interrupted run, as defaults for the command that resumes it.

    Raises InputError when one that is `given` cannot be changed in the middle of a run.
    """
    with making_sense(path):
        inherited = {flag: state["flags"][flag] for flag in defaults if flag in state["flags"]}
        inherited |= flags.take_architecture(given, state, f"{path}{STATE}")
        for flag, value in inherited.items():
            example = flags.LSTM.get(flag, defaults[flag])  # of its type
            if example is not None and type(value) is not type(example):
                raise TypeError(flag)
    inherited = {**defaults, **inherited}
    for flag in FIXED:
        if flag in inherited and getattr(given, flag, inherited[flag]) != inherited[flag]:
            raise InputError(
                f"{flags.spelled(flag, getattr(given, flag))}: the run in {path}{STATE} has "
                f"{inherited[flag]}; leave the flag out, or copy {path} elsewhere to start from "
                "its weights alone"
            )
    inherited |= {"save": path, "cuda": False, "resume": path}
    try:
        inherited["device"] = flags.device(state["flags"].get("device"))
    except (argparse.ArgumentTypeError, TypeError):  # resumed on another machine
        inherited["device"] = None
    return inherited


def check_corpus(state, corpus, args, path):
    """Raises InputError, naming what differs, unless `corpus` is the one the run is trained on."""
    name, digest = state["corpus"].get("name"), state["corpus"].get("sha256")
    if digest != corpus.digest:
        same = state["vocabulary"] == corpus.dictionary.idx2word
        raise InputError(
            f"--data {args.data}: its {'text' if same else 'vocabulary'} is not that of the run in "
            f"{path}{STATE} ({name}, sha256 {digest})"
        )


def check_groups(state, optimizer, path):
    """Raises InputError where the state's optimizer has not the groups that this code makes."""
    if len(state["optimizer"]["param_groups"]) != len(optimizer.param_groups):
        raise InputError(
            f"{path}{STATE}: was written by an earlier version of this code; go on with that one, "
            "or remove it to start from the weights of the checkpoint alone"
        )


def are_comparable(checkpoint, state, objective):
    """Whether the checkpoint's validation loss is of the state's corpus, and of this objective."""
    with making_sense(state["flags"]["save"]):
        trained_for = checkpoint["flags"].get("objective", "lm")
        return checkpoint["corpus"] == state["corpus"] and trained_for == objective


def changes(state, settings, device):
    """What keeps a resumed run from being bit-identical: ["lr 30 -> 10", ...]; [] if nothing.

    `settings` are its flags now, as plain data.
    """
    before, after = state["environment"], environment(device)
    free = set(FREE)
    if state["finetuning"]:
        free |= {"schedule", "recipe"}  # but not the ramp: the regularizers stay where it ended
    elif any(settings.get(flag, value) != value for flag, value in UNSCHEDULED.items()):
        free.remove("epochs")  # that the rate, or the regularizers, are stretched over
    flags_before = {**UNSCHEDULED, **state["flags"]}
    before |= {flag: value for flag, value in flags_before.items() if flag not in free}
    after |= {flag: settings[flag] for flag in before if flag in settings}
    found = [f"{n} {before[n]} -> {after[n]}" for n in after if before.get(n) != after[n]]
    if device.type != "cpu":
        found.append(f"{device.type} need not compute the same bits twice")
    return found


def environment(device):
    """Beside the flags, what the bits of a result depend on."""
    return {
        "torch": str(torch.__version__),
        "hardware": describe_device(device),
        "ranks": parallel.size(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def describe_device(device):
    """Its name; of CUDA's the card and cuDNN's version too, which decide a result's last bits."""
    if device.type != "cuda":
        return str(device)
    card, cudnn = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    return f"{device} ({card}, cuDNN {cudnn})"


def get_generators(device):
    """The state of every random generator a run could draw from, as tensors and plain data.

    The first rank's; those of the others in the list "others".
    """
    version, internal, gauss = random.getstate()
    name, key, *rest = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, key.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    state, *others = parallel.everyones(state)
    return {**state, "others": others}


def set_generators(state, device):
    """Puts back what `get_generators` took; a rank that had none then is seeded from the first."""
    if 0 < parallel.rank() <= len(state["others"]):
        state = state["others"][parallel.rank() - 1]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, key, *rest = state["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
    if parallel.rank() > 0 and "others" in state:
        torch.manual_seed(torch.initial_seed() + parallel.rank())
