"""The flags of main.py and finetune.py: defaults, recipes, checks; exit codes and error lines."""

import argparse
import errno
import os
import re
import signal
import sys
import time

import torch
import torch.distributed as dist

import distributed
from attention import KINDS
from cpu_kernels import has_bf16_products, keep_freed_memory
from data import LEVELS, UNKNOWN_TOKENS, InputError
from model import RNN_TYPES, check_architecture
from utils import Preempted, environment, is_device_error, is_out_of_memory, log

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota, file size limit
ARCHITECTURE = {  # flag: RNNModel's argument
    "model": "rnn_type", "emsize": "ninp", "nhid": "nhid", "nlayers": "nlayers",
    "attention": "attention", "attention_window": "attention_window",
}
# Defaults that depend on the optimizer.
OPTIMIZER_DEFAULTS = {
    "sgd": {"lr": 30.0, "bias_lr": 1.0, "wdecay": 1.2e-6},
    "adam": {"lr": 1e-3}, "adamw": {"lr": 5e-3, "wdecay": 0.02},
}
OPTIMIZER_FLAGS = tuple(OPTIMIZER_DEFAULTS["sgd"])
# A recipe sets flags; a flag on the command line overrides only that flag. At a learning rate of 30
# the biases of the GRU diverge, as in the report, and so do those of biLM's combiner and of
# attention. AR and TAR are mean squares of the states, and a GRU has no output gate, so its states
# are larger: see records/gru.
RECIPES = {
    "published": {},
    "gru": {"lr": 10.0, "bias_lr": 0.02, "decoder_bias": "unigram", "alpha": 0.5, "beta": 0.25},
    "slow-biases": {"bias_lr": 0.01, "decoder_bias": "unigram"},
    "fast": {
        "optimizer": "adamw", "lr": 3e-3, "wdecay": 0.075, "schedule": "trapezoid",
        "decoder_bias": "unigram", "batch_size": 20, "regularization_ramp": [0.3, 12.0],
        "partial_shuffle": True,
    },
}
RECIPES["fast-gru"] = {**RECIPES["fast"], "lr": 1e-3, "alpha": 0.5, "beta": 0.25}  # records/fast
NEW_MODEL_FLAGS = ("decoder_bias", "embeddings")  # they set weights that a saved model already has
# Flags that cannot change within a run: the position in the text, the optimizer's state or the
# random numbers would become invalid.
FIXED_FLAGS = (
    "recipe", "batch_size", "optimizer", "seed", "objective", "level", *NEW_MODEL_FLAGS,
    *ARCHITECTURE,
)
# Flags that do not affect the result; `data` is compared by its content. A flag in neither list may
# change on --resume, but the run is then not bit-identical: see `differences`.
FREE_FLAGS = (
    "data", "save", "resume", "epochs", "finetune", "log_interval", "cuda", "device", "tied",
    "checkpoint_minutes", "on_divergence", "no_cache", "cuda_graphs",
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr. Prefixes (--epoch 500) work."""

    def __init__(self, inherited=None, **kwargs):
        super().__init__(**kwargs)
        self.inherited = inherited or {}  # {flag: where its default is from}
        self.defaults, self.actions = {}, {}  # by the flag's name in the namespace

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add(self, name, default, help, **kwargs):
        """Adds a flag. It is in the namespace only if given, so that a recipe can set it."""
        dest = name.lstrip("-").replace("-", "_")
        self.defaults[dest] = default
        if dest in self.inherited:
            help = f"{help.partition(' (default:')[0]} (default: {self.inherited[dest]})"
        elif not (default in (None, "", []) or isinstance(default, bool) or "(default:" in help):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            help = f"{help} (default: {shown})"
        self.actions[dest] = self.add_argument(
            name, default=argparse.SUPPRESS, help=help, **kwargs
        )


# ------------------------------------------------------------ argparse types


def number(kind, low, high=float("inf"), open_low=False):
    """An argparse type: a `kind` (int or float) in [low, high); (low, high) with `open_low`."""
    name = "a whole number" if kind is int else "a number"
    bound = f"above {low}" if open_low else f"of {low} or more"
    if high != float("inf"):
        bound = f"in {'(' if open_low else '['}{low}, {high if kind is int else f'{high:g}'})"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None
        if not (low < value < high or (value == low and not open_low)):  # refuses NaN too
            raise argparse.ArgumentTypeError(f"must be {name} {bound}, not {text}")
        return value

    return parse


count = number(int, 1, 2**31)
window_length = number(int, 1, 65_500)  # cuDNN's limit is 65,535, and a window can exceed bptt
fraction = number(float, 0, 1)
coefficient = number(float, 0, 1e30)  # float32's maximum is 3.4e38


def parse_device(text):
    """An argparse type: cpu, cuda, cuda:N or mps, if this machine has it."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda, cuda:N or mps, not {text!r}")
    device = torch.device(text)
    exists = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not exists[device.type]:
        raise argparse.ArgumentTypeError(f"this machine has no device {text}; try --device cpu")
    return device


def follow_link(path):
    """An argparse type: the path itself, or the target of a symbolic link."""
    return os.path.realpath(path) if os.path.islink(path) else path


# ------------------------------------------------------------ the flags of training


def make_parser(description, inherited=None):
    """A parser for the flags that main.py and finetune.py share, with the reference's defaults.

    `inherited` is {flag: where its default is from}.
    """
    parser = Parser(inherited, description=description)
    add = parser.add
    add("--data", "data/penn", "folder with train.txt, valid.txt and test.txt, or 'sample'")
    add("--level", "word", "the text's tokens: word (separated by white space) or char (each "
        "character of a line, including spaces)", choices=list(LEVELS))
    add("--no-cache", False, "do not cache token ids; by default those of a text above 20 MB are "
        "cached in the --data folder (ids.word.npz, ids.char.npz) until the text changes",
        action="store_true")
    add("--model", "LSTM", "recurrent layers: LSTM, GRU, QRNN, biLSTM (the report's model, which "
        "sees the word it predicts) or biLM (two language models and cloze prediction)",
        choices=RNN_TYPES)
    add("--emsize", 400, "size of word embeddings", type=count)
    add("--nhid", 1150, "hidden units of each layer but the last, which has --emsize", type=count)
    add("--nlayers", 3, "number of layers", type=count)
    add("--attention", "none", "attention over the last layer's earlier states: none, single (each "
        "earlier state scored by itself) or combined (scored together with the current state)",
        choices=KINDS)
    add("--attention-window", 70, "number of earlier states to attend to", type=count, metavar="N")
    add("--objective", "lm", "biLM's training objective: lm (predict each word from one side), "
        "cloze (from both sides) or both", choices=["lm", "cloze", "both"])
    sgd = OPTIMIZER_DEFAULTS["sgd"]
    add("--lr", sgd["lr"], "learning rate (default: 30; 0.001 with adam, 0.005 with adamw)",
        type=number(float, 0, 1e30, open_low=True))
    add("--bias-lr", sgd["bias_lr"], "learning rate of the biases below the decoder, as a share of "
        "--lr", type=number(float, 0, 1000), metavar="SHARE")
    add("--clip", 0.25, "maximum gradient norm; 0 disables clipping", type=coefficient)
    add("--epochs", 8000, "maximum number of epochs", type=count)
    add("--batch_size", 80, "columns read in parallel", type=count, metavar="N")
    add("--bptt", 70, "typical window length, in tokens", type=window_length)
    add("--dropout", 0.4, "dropout of the last layer's output", type=fraction)
    add("--dropouth", 0.3, "dropout between recurrent layers", type=fraction)
    add("--dropouti", 0.65, "dropout of the embedded input", type=fraction)
    add("--dropoute", 0.1, "dropout of words from the embedding", type=fraction)
    add("--wdrop", 0.5, "dropout of the hidden-to-hidden weights", type=fraction)
    add("--alpha", 2.0, "coefficient of activation regularization (AR)", type=coefficient)
    add("--beta", 1.0, "coefficient of temporal activation regularization (TAR)", type=coefficient)
    add("--wdecay", sgd["wdecay"], "weight decay (default: 1.2e-06; 0.02 with adamw)",
        type=coefficient)
    add("--partial-shuffle", False, "in each epoch, start each column at a random position",
        action=argparse.BooleanOptionalAction)
    add("--nonmono", 5, "non-monotone interval of the trigger, in epochs", type=number(int, 0))
    add("--seed", 1111, "random seed", type=number(int, 0, 2**32))
    add("--save", None, "path of the best model; finetune.py starts from the model there (default "
        "for main.py: named after the current time)",
        type=follow_link)
    add("--resume", "", "resume the run that saves to this checkpoint; without a training state, "
        "start from the checkpoint's weights", metavar="CHECKPOINT", type=follow_link)
    add("--checkpoint-minutes", 10.0, "minutes between saves of the training state",
        type=number(float, 0, open_low=True), metavar="N")
    add("--on-divergence", "stop", "what to do when training diverges: stop, rollback (to the "
        "last good state with half the learning rate) or continue",
        choices=["stop", "rollback", "continue"])
    add("--log-interval", 200, "batches between log lines", type=count, metavar="N")
    add("--cuda", False, "require CUDA (without this flag, CUDA is used if available)",
        action="store_true")
    add("--device", None, "cpu, cuda, cuda:N or mps (default: cuda if available, else cpu; under "
        "torchrun each process has its own)",
        type=parse_device)
    add("--precision", None, "training precision: fp32; tf32 (CUDA only: all matrix products with "
        "10-bit mantissas); or bf16 (matrix products of the recurrent layers and the decoder in "
        "bfloat16, on CUDA the complete recurrent layers, everything else in float32; a CPU needs "
        "AVX-512 BF16). Evaluation is always in float32 (default: tf32 on CUDA, else fp32)",
        choices=["fp32", "tf32", "bf16"])
    add("--pad-to", 1, "pad LSTM and GRU layers (not biLSTM) to multiples of N, inside the kernel "
        "only, with units that stay 0 (8 suits a GPU's tensor cores)",
        type=count, metavar="N")
    add("--cuda-graphs", False, "replay the forward and backward pass of training steps from CUDA "
        "graphs, to save the host's time (CUDA only; not with torchrun, biLM, attention, or more "
        "than 75,000 words)",
        action=argparse.BooleanOptionalAction)
    add("--unk", None, "the model's token for unknown words, if a trained model reads other text "
        f"(default: the first of {', '.join(UNKNOWN_TOKENS)} in its vocabulary)", metavar="TOKEN")
    add("--tied", True, "accepted for compatibility: the weights are always tied",
        action="store_true")
    return parser


# ------------------------------------------------------------ resolving and checking flags


def resolve_flags(given, defaults, saved=None):
    """The flags of a run, a Namespace.

    By precedence: defaults < the optimizer's < recipe < saved < given.

    `given` is a Namespace, `defaults` and `saved` (a saved run's or model's) are {name: value}.
    Raises InputError.
    """
    given, saved = vars(given), saved or {}
    if given.get("cuda"):  # even if the run began on another device
        saved = {**saved, "device": None}
    recipe = given.get("recipe") or saved.get("recipe") or default_recipe(defaults | saved | given)
    preset = {flag: value for flag, value in RECIPES[recipe].items() if flag in defaults}
    optimizer = (preset | saved | given).get("optimizer", "sgd")
    if optimizer != preset.get("optimizer", "sgd"):  # a recipe's rates are for its own optimizer
        preset = {flag: v for flag, v in preset.items() if flag not in OPTIMIZER_FLAGS}
    args = argparse.Namespace(**{
        **defaults, **OPTIMIZER_DEFAULTS[optimizer], **preset, **saved, **given, "recipe": recipe
    })
    resolve_device(args)
    resolve_precision(args, "precision" in given)
    if "cuda_graphs" not in given and not has_graphs(args.device):
        args.cuda_graphs = False  # a run with graphs continues without them elsewhere
    if args.save is None:
        args.save = f"{time.time():.6f}".replace(".", "") + ".pt"
    if args.resume and os.path.realpath(args.resume) == os.path.realpath(args.save):
        args.resume = args.save  # two spellings of one path
    if args.attention == "none" and "attention_window" in given:
        raise InputError(
            f"--attention-window {args.attention_window}: has no effect without --attention"
        )
    check_flags(args)
    return args


def default_recipe(flags):
    """The name of the default recipe for these flags."""
    if flags.get("optimizer", "sgd") != "sgd":
        return "published"
    if flags["model"] == "GRU":
        return "gru"
    joins_states = flags["model"] == "biLM" or flags["attention"] != "none"
    return "slow-biases" if joins_states else "published"


def sgd_rates(args):
    """{flag: value} of the default learning rates and weight decay of SGD for a model."""
    recipe = RECIPES[default_recipe({**vars(args), "optimizer": "sgd"})]
    return {flag: recipe.get(flag, rate) for flag, rate in OPTIMIZER_DEFAULTS["sgd"].items()}


def flags_of_run(state, path):
    """The flags of the run of `state`, which saves to `path`: the defaults when it is resumed."""
    flags = {**state["flags"], "save": path, "resume": path, "cuda": False}
    try:
        flags["device"] = parse_device(flags["device"])
    except argparse.ArgumentTypeError:  # another machine, without that device
        flags["device"] = None
    return flags


def model_flags(checkpoint):
    """The flags of a checkpoint that its weights require: the architecture, the level of tokens."""
    architecture = checkpoint["architecture"]
    flags = {flag: architecture[key] for flag, key in ARCHITECTURE.items()}
    return {**flags, "level": checkpoint["flags"]["level"]}


def describe_recipe(args, given):
    """A log line of the flags that the recipe set; "" if none."""
    flags = RECIPES[args.recipe].items()
    shown = [format_flag(f, v) for f, v in flags if getattr(args, f, None) == v and f not in given]
    return f"Recipe {args.recipe}: {' '.join(shown)}" if shown else ""


def resolve_device(args):
    """Sets `args.device` if it is None, and each rank's device. Raises InputError."""
    if args.cuda and not torch.cuda.is_available():
        raise InputError("--cuda: torch finds no CUDA device; leave the flag out")
    if args.cuda and args.device is not None and args.device.type != "cuda":
        raise InputError(f"--cuda contradicts --device {args.device}; give one of them")
    if args.device is None:
        args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if distributed.is_distributed() and args.device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--nproc_per_node: this machine has {torch.cuda.device_count()} CUDA devices"
            )
        args.device = torch.device("cuda", local_rank)


def resolve_precision(args, is_given):
    """Sets `args.precision` if it is None. Raises InputError if the device does not support it."""
    if args.precision is None or (args.precision == "tf32" and not is_given):
        # A run with tf32 that is resumed on another device continues with fp32.
        args.precision = "tf32" if args.device.type == "cuda" else "fp32"
    if not has_precision(args.device, args.precision):
        reason, other = f"not supported on device {args.device}", "fp32"
        if args.precision == "bf16" and args.device.type == "cpu":
            reason = "this processor only emulates bfloat16 (it has no AVX-512 BF16)"
        elif args.precision == "bf16" and args.device.type == "cuda":
            reason, other = "needs cuDNN 9.13 and compute capability 8.0, or newer", "tf32"
        raise InputError(f"--precision {args.precision}: {reason}; use --precision {other}")


def has_precision(device, precision):
    """Whether a device supports the precision without a large slowdown."""
    if precision == "tf32":
        return device.type == "cuda"
    if precision == "bf16" and device.type == "cuda":  # otherwise torch falls back to slow layers
        return (
            torch.cudnn_is_acceptable(torch.zeros(1, dtype=torch.bfloat16, device=device))
            and torch.backends.cudnn.version() >= 91300
            and torch.cuda.get_device_capability(device) >= (8, 0)
        )
    if precision == "bf16":
        return device.type == "cpu" and has_bf16_products()
    return True


def has_graphs(device):
    """Whether steps can be replayed from CUDA graphs, which DistributedDataParallel would break."""
    return device.type == "cuda" and not distributed.is_distributed()


def check_flags(args):
    """Raises InputError for flags that contradict one another."""
    if args.batch_size % distributed.size():
        raise InputError(
            f"--batch_size {args.batch_size}: not divisible by {distributed.size()} processes; use "
            "a multiple, or another number of processes"
        )
    if args.objective != "lm" and args.model != "biLM":
        raise InputError(f"--objective {args.objective}: requires --model biLM")
    is_plain = args.model != "biLM" and args.attention == "none"
    if args.cuda_graphs and not (is_plain and has_graphs(args.device)):
        raise InputError(
            "--cuda-graphs: requires CUDA without torchrun, and neither --model biLM nor "
            "--attention; leave the flag out"
        )
    try:
        check_architecture(args.model, args.emsize, args.nhid, args.attention)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    share, epochs = getattr(args, "regularization_ramp", None) or (1, 1)
    if not (0 <= share <= 1 and 0 < epochs < 1e30):  # refuses NaN too
        raise InputError(
            f"{format_flag('regularization_ramp', args.regularization_ramp)}: SHARE must be a "
            "number in [0, 1], and EPOCHS a number above 0"
        )


def check_unchanged(given, saved, path, fixed=FIXED_FLAGS):
    """Raises InputError if a `fixed` flag in `given` differs from that of the run at `path`."""
    for flag in fixed:
        if flag in saved and getattr(given, flag, saved[flag]) != saved[flag]:
            has = format_flag(flag, saved[flag])
            if saved[flag] is None:
                has = "its own" if flag in NEW_MODEL_FLAGS else "none"
            advice = "leave the flag out"
            if flag not in (*ARCHITECTURE, *NEW_MODEL_FLAGS, "level"):
                advice += f", or copy {path} elsewhere to start from its weights only"
            raise InputError(
                f"{format_flag(flag, getattr(given, flag))}: {path} has {has}; {advice}"
            )


def differences(state, flags, device):
    """The changes that keep a resumed run from being bit-identical: ["lr 30 -> 10", ...]."""
    free = set(FREE_FLAGS)
    if not state["finetuning"] and flags.get("schedule", "constant") != "constant":
        free.remove("epochs")  # the schedule depends on them
    after = environment(device)
    before = state["environment"] | {f: v for f, v in state["flags"].items() if f not in free}
    after |= {flag: flags[flag] for flag in before if flag in flags}
    changes = [f"{n} {before.get(n)} -> {after[n]}" for n in after if before.get(n) != after[n]]
    if device.type != "cpu":
        changes.append(f"computation on {device.type} is not deterministic")
    elif after["ranks"] > 2:  # DistributedDataParallel sums in another order after a restart
        changes.append("the gradients of more than two processes are summed in another order")
    return changes


def format_flag(flag, value):
    """A flag with its value, as written on the command line."""
    name = flag if flag == "batch_size" else flag.replace("_", "-")
    values = value if isinstance(value, list) else [] if value is True else [value]
    return " ".join([f"--{name}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)])


# ------------------------------------------------------------ using a trained model


def add_model_flags(parser):
    """Adds the flags for the device, the expected type of the model, and its unknown token."""
    add = parser.add_argument
    add("--unk", metavar="TOKEN",
        help="the token that stands for unknown words (default: as in training, else the first "
             f"of {', '.join(UNKNOWN_TOKENS)} in the vocabulary)")
    add("--model", choices=RNN_TYPES,
        help="fail unless the checkpoint is of this type (default: any)")
    add("--cuda", action="store_true", help="require CUDA (otherwise it is used if available)")
    add("--device", type=parse_device,
        help="cpu, cuda, cuda:N or mps (default: cuda if available, else cpu)")


# ------------------------------------------------------------ exit codes and error lines


def run_command(main):
    """Calls `main()` and exits with its status; with 2 and one line for bad input.

    After a signal the status is 128 + the signal's number.
    """
    keep_freed_memory()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - stays open
    if hasattr(sys.stdout, "reconfigure"):  # a word the terminal cannot show must not end a run
        encoding = None if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        status = main() or 0
        if not log.failed:  # otherwise that has been reported
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the pipe has exited, as `head` does
        os._exit(141)  # 128 + SIGPIPE
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        status = 2
        message = error_line(error)
        if message is None:
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    except (KeyboardInterrupt, Preempted) as stop:
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        status = 128 + getattr(stop, "number", signal.SIGINT)
    try:
        sys.stdout.flush()
    except OSError:  # it has been reported; Python would report it again
        os._exit(status)
    if distributed.is_distributed():  # gloo's threads can abort the process in a normal exit
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def error_line(error):
    """The line that reports an error to the user; None for a bug in the program."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):
        if error.errno in FULL_DISK and error.filename is None:
            return f"cannot write the output ({error.strerror}); free disk space and run it again"
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo has no type of its own
        return f"the processes cannot communicate: {' '.join(str(error).split())}"
    if not is_device_error(error):
        return None
    on_cuda = torch.cuda.is_initialized() or any(t in str(error) for t in ("CUDA", "cuDNN"))
    device = "mps" if "MPS" in str(error) else "cuda" if on_cuda else "cpu"
    if is_out_of_memory(error):
        return (
            f"device {device} is out of memory; lower --batch_size, --bptt or other flags that set "
            "sizes (--help lists them)"
        )
    reason = str(error).partition("\n")[0]
    return f"device {device}: {reason}; the files are not the cause, try another --device"
