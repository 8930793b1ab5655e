"""The flags that main.py and finetune.py share, their defaults, and their checks."""

import argparse
import errno
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch

import parallel
from cpu_kernels import keep_freed_memory
from attention import KINDS
from bidirectional import OBJECTIVES
from data import InputError
from files import is_of_device, is_out_of_memory
from model import check_architecture
from preemption import Preempted
from train import LONGER, LONGEST

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, the file
ARCHITECTURE = {
    "model": "rnn_type", "emsize": "ninp", "nhid": "nhid", "nlayers": "nlayers",
    "attention": "attention", "attention_window": "attention_window",
}


# What is not given of these. With a rate of 30 GRU diverges, as the report's did, and so do the
# layers that join states (biLM's combiner, attention); it is their biases that do. AR and TAR are
# mean squares, and a GRU's states, which no output gate halves, are larger: see records/gru. GRU
# with SGD and --lr trains as published.
LSTM = {
    "lr": 30.0, "bias_lr": 1.0, "decoder_bias": "zeros", "alpha": 2.0, "beta": 1.0,
    "wdecay": 1.2e-6,
}
GRU_PENALTIES = {"alpha": 0.5, "beta": 0.25}
GRU = {**LSTM, "lr": 10.0, "bias_lr": 0.02, "decoder_bias": "unigram", **GRU_PENALTIES}
JOINED = {**LSTM, "bias_lr": 0.01, "decoder_bias": "unigram"}
ADAM = {**LSTM, "lr": 1e-3}
ADAMW = {**LSTM, "lr": 5e-3, "wdecay": 0.02}  # whose decay is not a part of the gradient


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr. Prefixes (--epoch 500) work."""

    def __init__(self, inherited=(), **kwargs):
        super().__init__(**kwargs)
        self.inherited = inherited
        self.defaults = {}  # flag's name in the namespace -> default

    def error(self, message):
        if not parallel.speaks():
            parallel.let_another_speak()
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add(self, name, default, help, **kwargs):
        """Adds a flag that leaves no trace in the namespace unless it is given."""
        dest = name.lstrip("-").replace("-", "_")
        self.defaults[dest] = default
        if dest in self.inherited:
            help = f"{help.partition(' (default:')[0]} (default: as the model was trained)"
        elif default not in (None, False, ""):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            help = f"{help} (default: {shown})"
        self.add_argument(name, default=argparse.SUPPRESS, help=help, **kwargs)


def number(kind, low, high=float("inf"), open_low=False):
    """An argparse type: `kind` (int or float) from `low`, or above it, to below `high`."""
    name = "a whole number" if kind is int else "a number"
    bound = f"above {low}" if open_low else f"of {low} or more"
    if high != float("inf"):
        bound = f"in {'(' if open_low else '['}{low}, {high:g})"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None
        if not (low < value < high or (value == low and not open_low)):  # NaN is neither
            raise argparse.ArgumentTypeError(f"must be {name} {bound}, not {text}")
        return value

    return parse


count = number(int, 1, 2**31)
steps = number(int, 1, LONGEST - LONGER)
rate = number(float, 0, 1)
coefficient = number(float, 0, 1e30)  # float32 ends at 3.4e38


def rnn_type(text):
    """An argparse type: the name of a recurrent layer that model.py builds."""
    try:
        check_architecture(text, 2, 2)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def device(text):
    """An argparse type: cpu, cuda, cuda:N or mps, refused where this machine lacks it."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda, cuda:N or mps, not {text!r}")
    found = torch.device(text)
    lacking = {
        "cpu": False,
        "cuda": not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count(),
        "mps": not torch.backends.mps.is_available(),
    }
    if lacking[found.type]:
        raise argparse.ArgumentTypeError(f"this machine has no device {text}; try --device cpu")
    return found


def checkpoint_path(text):
    """An argparse type: a path; of a symbolic link its target, so that one run has one name."""
    return os.path.realpath(text) if os.path.islink(text) else text


def make_parser(description, inherited=()):
    """A parser for the flags of AWD-LSTM, with the reference's names and defaults.

    Those named in `inherited` are, when not given, as a checkpoint's model was trained.
    """
    parser = Parser(inherited, description=description)
    add = parser.add
    add("--data", "data/penn", "folder with train.txt, valid.txt and test.txt, or 'sample'")
    add("--model", "LSTM", "recurrent layers: LSTM, GRU, biLSTM (the report's, which reads its own "
        "answer) or biLM (two language models and cloze prediction)", type=rnn_type)
    add("--emsize", 400, "size of word embeddings", type=count)
    add("--nhid", 1150, "hidden units per layer", type=count)
    add("--nlayers", 3, "number of layers", type=count)
    add("--attention", "none", "attention over the last layer's earlier states: none, single (each "
        "scored alone) or combined (scored with the current one)", choices=KINDS)
    add("--attention-window", 70, "how many earlier states are attended", type=count, metavar="N")
    add("--objective", "lm", "what biLM is trained for: lm, to predict each word from one side, "
        "cloze, from both sides, or both", choices=OBJECTIVES)
    add("--lr", None, "learning rate (default: 30 with sgd, 10 for GRU; 0.001 with adam; 0.005 "
        "with adamw)", type=number(float, 0, 1e30, open_low=True))
    add("--bias-lr", None, "learning rate of the biases below the decoder, as a share of --lr "
        "(default: 1; with sgd 0.01 for biLM and with attention, 0.02 for GRU where --lr is not "
        "given)",
        type=number(float, 0, 1000), metavar="SHARE")
    add("--clip", 0.25, "largest gradient norm, 0 for no clipping", type=coefficient)
    add("--epochs", 8000, "upper epoch limit", type=count)
    add("--batch_size", 80, "columns read in parallel", type=count, metavar="N")
    add("--bptt", 70, "sequence length, in expectation", type=steps)
    add("--dropout", 0.4, "dropout of the last layer's output", type=rate)
    add("--dropouth", 0.3, "dropout between recurrent layers", type=rate)
    add("--dropouti", 0.65, "dropout of the embedded input", type=rate)
    add("--dropoute", 0.1, "dropout of whole words from the embedding", type=rate)
    add("--wdrop", 0.5, "dropout of the hidden-to-hidden weights", type=rate)
    add("--alpha", None, "coefficient of activation regularization (AR) (default: 2; for GRU 0.5 "
        "with adamw, and with sgd where --lr is not given)", type=coefficient)
    add("--beta", None, "coefficient of temporal activation regularization (TAR) (default: 1; for "
        "GRU 0.25 with adamw, and with sgd where --lr is not given)", type=coefficient)
    add("--wdecay", None, "weight decay (default: 1.2e-06; 0.02 with adamw)", type=coefficient)
    add("--nonmono", 5, "non-monotone interval of the trigger, in epochs", type=number(int, 0))
    add("--seed", 1111, "random seed", type=number(int, 0, 2**32))
    add("--save", None, "path of the best model (default: a name made from the time)",
        type=checkpoint_path)
    add("--resume", "", "go on with the run that saves to this checkpoint; without its training "
        "state, start from its weights", metavar="CHECKPOINT", type=checkpoint_path)
    add("--checkpoint-minutes", 10.0, "minutes between saves of the training state",
        type=number(float, 0, open_low=True), metavar="N")
    add("--on-divergence", "stop", "what to do when training diverges: stop, rollback (to the "
        "last good state with half the learning rate) or continue",
        choices=["stop", "rollback", "continue"])
    add("--log-interval", 200, "batches between log lines", type=count, metavar="N")
    add("--cuda", False, "require CUDA (without this flag it is used where there is one)",
        action="store_true")
    add("--device", None, "cpu, cuda, cuda:N or mps (default: cuda where there is one, else cpu)",
        type=device)
    add("--precision", None, "of training: fp32; tf32, all products with factors of 10 bits, on "
        "CUDA; or bf16, the recurrent layers and the decoder's product in bfloat16 (on a CPU not "
        "GRU's), all else in float32. Evaluation is always in float32 (default: tf32 on CUDA, else "
        "fp32)",
        choices=["fp32", "tf32", "bf16"])
    add("--tied", True, "accepted as in the reference: the weights are always tied",
        action="store_true")
    return parser


def settle_device(args):
    """Sets `args.device`, where it is None, to CUDA or the CPU. Raises InputError for --cuda."""
    if args.cuda and not torch.cuda.is_available():
        raise InputError("--cuda: torch finds no CUDA device here; leave the flag out")
    if args.cuda and args.device is not None and args.device.type != "cuda":
        raise InputError(f"--cuda contradicts --device {args.device}; give one of them")
    if args.device is None:
        args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_precision(device, precision, model):
    """Whether a device computes the recurrent layers of `model` in that precision."""
    if precision == "tf32":
        return device.type == "cuda"
    if precision == "bf16" and device.type == "cuda":  # else torch's slow layers take its place
        return (
            torch.cudnn_is_acceptable(torch.zeros(1, dtype=torch.bfloat16, device=device))
            and torch.backends.cudnn.version() >= 91300
            and torch.cuda.get_device_capability(device) >= (8, 0)
        )
    if precision == "bf16":
        return device.type == "cpu" and model != "GRU"  # which has a slow form only
    return True


def settle_rates(args):
    """Sets what is None of learning rates, the decoder's bias, and AR's and TAR's strength."""
    optimizer = getattr(args, "optimizer", "sgd")
    if optimizer == "adam":
        rates = ADAM
    elif optimizer == "adamw":
        rates = ADAMW | GRU_PENALTIES if args.model == "GRU" else ADAMW
    elif args.model == "GRU" and args.lr is None:
        rates = GRU
    elif args.model == "biLM" or args.attention != "none":
        rates = JOINED
    else:
        rates = LSTM
    for flag, value in rates.items():
        if getattr(args, flag, value) is None:
            setattr(args, flag, value)


def spelled(flag, value):
    """A flag as it is given in the shell."""
    name = flag if flag == "batch_size" else flag.replace("_", "-")
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)])


def complete(given, defaults):
    """The flags of a run: what was `given`, else the default.

    Settles the device, the learning rate and the name of the checkpoint. Raises InputError.
    """
    args = argparse.Namespace(**{**defaults, **vars(given)})
    settle_device(args)
    args.device = parallel.own_device(args.device, hasattr(given, "device"))
    if args.batch_size % parallel.size():
        raise InputError(
            f"--batch_size {args.batch_size}: does not divide over {parallel.size()} processes; "
            "name a multiple, or another number of processes"
        )
    if args.precision is None:
        args.precision = "tf32" if args.device.type == "cuda" else "fp32"
    if args.precision == "tf32" and args.device.type != "cuda" and not hasattr(given, "precision"):
        args.precision = "fp32"  # begun on CUDA, resumed elsewhere
    if not has_precision(args.device, args.precision, args.model):
        raise InputError(
            f"--precision {args.precision}: device {args.device} has none for {args.model}; give "
            "--precision fp32"
        )
    settle_rates(args)
    if args.save is None:
        args.save = f"{time.time():.6f}".replace(".", "") + ".pt"
    if args.resume and Path(args.resume).resolve() == Path(args.save).resolve():
        args.resume = args.save  # two spellings of one file
    if args.objective != "lm" and args.model != "biLM":
        raise InputError(f"--objective {args.objective}: for --model biLM only")
    try:
        check_architecture(args.model, args.emsize, args.nhid, args.attention)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    return args


def plain(args):
    """The flags as plain data (strings, numbers, lists), for logs and checkpoints."""
    return {name: str(v) if isinstance(v, torch.device) else v for name, v in vars(args).items()}


def take_architecture(given, checkpoint, path):
    """The checkpoint's architecture as flags; InputError when a flag that was given differs."""
    found = checkpoint["architecture"]
    flags = {flag: found[key] for flag, key in ARCHITECTURE.items() if key in found}
    for flag, value in flags.items():
        if getattr(given, flag, value) != value:
            raise InputError(
                f"{spelled(flag, getattr(given, flag))}: {path} has a model with "
                f"{spelled(flag, value)}; leave the flag out"
            )
    return flags


def of_device(error):
    """The line that reports an error of the device."""
    device = "cpu"
    if torch.cuda.is_initialized() or any(text in str(error) for text in ("CUDA", "cuDNN")):
        device = "cuda"
    if is_out_of_memory(error):
        return (
            f"device {device} is out of memory; lower --batch_size, --bptt, --nhid, --emsize, "
            "--window or --attention-window"
        )
    reason = str(error).partition("\n")[0]
    return f"device {device}: {reason}; no file is to blame, --device names another"


def run(main):
    """Calls `main()` and exits with its status: one line and 2 for bad input, 128 + a signal's."""
    prog = sys.argv[0].rpartition("/")[2]
    keep_freed_memory()
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end
    if hasattr(sys.stdout, "reconfigure"):  # a name the terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except BrokenPipeError:  # who read the output has seen enough, as `head` does
        os._exit(141)  # 128 + SIGPIPE
    except (InputError, OSError) as error:
        if getattr(error, "errno", None) in FULL and error.filename is None:
            error = f"the output cannot be written ({error.strerror}); make room and run it again"
        if not parallel.speaks(error):
            parallel.let_another_speak()
        print(f"{prog}: error: {error}", file=sys.stderr)
        status = 2
    except parallel.RankLost as error:
        print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # the connections to the dead rank are left as they are
    except (MemoryError, RuntimeError) as error:
        if not is_of_device(error):
            raise
        print(f"{prog}: error: {of_device(error)}", file=sys.stderr)
        status = 2
    except (KeyboardInterrupt, Preempted) as stop:
        if parallel.speaks():
            print(f"{prog}: interrupted", file=sys.stderr)
        status = 128 + getattr(stop, "number", signal.SIGINT)
    try:
        sys.stdout.flush()
    except OSError:  # reported when it began, see utils.log; Python would say it once more
        os._exit(status)
    if parallel.size() > 1:  # in Python's own end torch can abort: gloo's threads may hold a tensor
        os._exit(status or 0)
    sys.exit(status)
