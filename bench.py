"""Compares a training step's speed with the machine's peak and with plain PyTorch. For Linux.

    python bench.py --recipe ptb --baseline
    python bench.py --recipe wt2 --model GRU --json
    python bench.py --attention single --baseline
    python bench.py --profile

It takes main.py's flags: sizes, dropout rates, --device, --precision. `utilization` is the share of
a step's time that its matrix products would take at the speed of a large one (torch.mm, measured
between the steps). With `--baseline` the model, the loss and the optimizer in plain PyTorch run
beside ours, step for step (on a GPU, 20 steps at a time), so that a noisy machine disturbs both
alike; `ratio` is ours over theirs. With `--attention` the baseline is our model without it. Each
side has a process of its own, which waits while the other is timed. Peak memory is measured after
three steps: that of the whole process or, on CUDA, what torch has allocated.
"""

import argparse
import json
import re
import signal
from argparse import Namespace
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import copy
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.func import functional_call
from torch.nn import functional as F

from cpu_kernels import keep_freed_memory
from data import InputError
from flags import count, make_parser, resolve_flags, run_command
from model import RNNModel
from train import (
    Objective, evaluate_model, make_compute, make_optimizer, new_params, train_step,
)
from utils import set_up_device

# The published commands, and the size of their corpora's vocabularies.
SIZES = {
    "ptb": {"ntoken": 10_000, "batch_size": 20, "dropouti": 0.4, "dropouth": 0.25},
    "wt2": {"ntoken": 33_278, "batch_size": 80, "dropouth": 0.2},
}
UNUSED = (  # flags of training that make no difference to a step's time
    "data", "level", "no_cache", "objective", "lr", "bias_lr", "epochs", "partial_shuffle",
    "nonmono", "seed", "save", "resume", "checkpoint_minutes", "on_divergence", "log_interval",
    "unk", "tied",
)
EVALUATED = 6000  # tokens of an evaluation
LARGE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the large product's operands


# ------------------------------------------------------------ the sides


class Plain(RNNModel):
    """RNNModel in its plainest form, without optimizations."""

    def mask(self, x, like, rate):
        """`x` times one dropout mask of the shape of `like`."""
        return x * F.dropout(torch.ones_like(like), rate) if self.training else x

    def forward(self, input, hidden, return_h=False):
        weight = self.encoder.weight
        x = F.embedding(input, self.mask(weight, weight[:, :1], self.dropoute))
        x = self.mask(x, x[:1], self.dropouti)
        new_hidden = []
        for layer, state in zip(self.rnns, hidden):
            rnn, [name] = layer.module, layer.weights
            dropped = F.dropout(rnn.get_parameter(name), self.wdrop, self.training)
            call = plain_qrnn if self.rnn_type == "QRNN" else functional_call
            raw, state = call(rnn, {name: dropped}, (x, state))
            new_hidden.append(state)
            x = self.mask(raw, raw[:1], self.dropout if layer is self.rnns[-1] else self.dropouth)
        output = x.flatten(0, 1)
        return (output, new_hidden, [raw], [x]) if return_h else (output, new_hidden)


def plain_qrnn(layer, weights, inputs):
    """What `functional_call` returns, from a loop over the time steps."""
    x, state = inputs
    c, last = state if layer.window == 2 else (state, None)
    read = x if last is None else torch.cat([x, torch.cat([last, x[:-1]])], 2)
    z, f, o = F.linear(read, weights["linear.weight"], layer.linear.bias).chunk(3, 2)
    z, f, cs = z.tanh(), f.sigmoid(), []
    for z_t, f_t in zip(z.split(1), f.split(1)):
        c = f_t * z_t + (1 - f_t) * c
        cs.append(c)
    return o.sigmoid() * torch.cat(cs), c if last is None else (c, x[-1:])


class PlainLoss(nn.Module):
    def forward(self, weight, bias, hiddens, targets):
        return F.cross_entropy(F.linear(hiddens, weight, bias), targets)


def plain_side(args):
    """(params, optimizer) in plain PyTorch."""
    model = Plain(
        args.model, args.ntoken, args.emsize, args.nhid, args.nlayers, args.dropout, args.dropouth,
        args.dropouti, args.dropoute, args.wdrop, tie_weights=True,
    )
    params = nn.ModuleList([model, PlainLoss()]).to(args.device)
    return params, torch.optim.SGD(params.parameters(), args.lr, weight_decay=args.wdecay)


def our_side(args):
    """(params, optimizer) as main.py makes them."""
    keep_freed_memory()
    params = new_params(Namespace(dictionary=range(args.ntoken)), args)
    return params, make_optimizer(params, args)


def baseline(args):
    """What ours is compared with: (name, function that makes the side, its flags)."""
    args = copy(args)
    if args.attention != "none":
        args.attention = "none"
        return "ours without attention", our_side, args
    if args.precision == "bf16":
        args.precision = "tf32" if args.device.type == "cuda" else "fp32"
    args.cuda_graphs = False
    return f"plain PyTorch in {args.precision}", plain_side, args


def make_tasks(make_side, args):
    """(params, {name: function without arguments}) of a side, on random words."""
    params, optimizer = make_side(args)
    torch.manual_seed(0)  # the same words for both sides
    shapes = (args.bptt, args.batch_size), (args.bptt * args.batch_size,), (EVALUATED + 1,)
    data, targets, ids = (zipf(args.ntoken, shape).to(args.device) for shape in shapes)
    objective, hidden = Objective(params), params[0].init_hidden(args.batch_size)
    compute = make_compute(params, args)

    def step():
        nonlocal hidden
        _, hidden = train_step(
            objective, optimizer, data, targets, hidden, args, compute=compute
        )

    return params, {"step": step, "evaluation": lambda: evaluate_model(params, ids, args)}


def zipf(ntoken, shape):
    """Random ids; the frequency of the n-th falls about as 1/n (Zipf's law)."""
    return (ntoken ** torch.rand(shape, dtype=torch.float64)).long() - 1


# ------------------------------------------------------------ measuring


def seconds(function, device):
    """The time of one call."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    begin = perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return perf_counter() - begin


def process_peak_mib():
    """The peak memory of this process; getrusage would count the parent's as well."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def matrix_flop(params, args):
    """Floating-point operations of a training step's matrix products.

    Per weight and token: a multiplication and an addition, forward and for each of two gradients.
    """
    weights = sum(weight.numel() for weight in params.parameters() if weight.dim() == 2)
    return 6 * weights * args.bptt * args.batch_size


def new_process():
    """A process that runs what is submitted to it, and ends quietly at Ctrl-C."""
    at_once = signal.SIGINT, signal.SIG_DFL
    return ProcessPoolExecutor(1, get_context("spawn"), signal.signal, at_once)


TASKS = {}  # those of a side, in its own process


def set_up_side(make_side, args):
    """Makes a side's tasks and warms up; returns (operations of a step, peak memory in MiB)."""
    set_up_device(args.device, args.precision)
    params, tasks = make_tasks(make_side, args)
    TASKS.update(tasks)
    for _ in range(3):
        tasks["step"]()
    on_gpu = args.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else process_peak_mib()
    return matrix_flop(params, args), peak


def time_task(name, device):
    """The time of one call of a side's task; of a step on a GPU, the mean of 20 without a pause.

    While the GPU computes a step, the host prepares the next one, as in training.
    """
    calls = 20 if name == "step" and device.type != "cpu" else 1
    return seconds(lambda: [TASKS[name]() for _ in range(calls)], device) / calls


def measure(args):
    """Yields {name: {figure: value}} of the run, of each side, and of ours over the baseline."""
    set_up_device(args.device, args.precision)
    sides = [("ours", our_side, args)] + [baseline(args)] * args.baseline
    processes = {name: new_process() for name, *_ in sides}
    futures = {name: processes[name].submit(set_up_side, *side) for name, *side in sides}
    costs = {name: future.result() for name, future in futures.items()}
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    size = LARGE[args.device.type]
    operand = torch.randn(size, size, device=args.device, dtype=dtype)
    times = defaultdict(list)
    for task in ["step"] * args.steps + ["evaluation"] * args.steps:
        times["product"].append(seconds(lambda: operand @ operand, args.device))
        for name, process in processes.items():
            times[name, task].append(process.submit(time_task, task, args.device).result())
    for process in processes.values():  # left to Python's exit, this can fail there
        process.shutdown()
    times = {what: median(taken) for what, taken in times.items()}
    large = 2 * size**3 / times["product"] / 1e9
    rows = {"run": {
        "precision": args.precision, "device": str(args.device), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "gflops_of_large_product": large,
    }}
    for name, (flop, peak) in costs.items():
        step = times[name, "step"]
        rows[name] = {
            "ms_per_step": 1e3 * step, "tokens_per_s": args.bptt * args.batch_size / step,
            "utilization": flop / step / 1e9 / large, "peak_mib": peak,
            "eval_tokens_per_s": EVALUATED / times[name, "evaluation"],
        }
    if args.baseline:
        _, ours, theirs = rows.values()
        rows["ratio"] = {figure: ours[figure] / theirs[figure] for figure in ours}
    yield rows


def profile(args):
    """Yields, for a step and an evaluation of ours, {name: {figure: value}}.

    First the time without the profiler, and the share of it in which nothing runs; then the
    operations (on CUDA: the kernels) that take the most time.
    """
    set_up_device(args.device, args.precision)
    _, tasks = make_tasks(our_side, args)
    TASKS.update(tasks)
    for name, function in tasks.items():
        whole = 1e3 * median(time_task(name, args.device) for _ in range(args.steps))
        with torch.profiler.profile(acc_events=True) as profiled:  # False makes torch warn
            function()
        times = operation_times(profiled.key_averages())
        idle = max(0.0, 1 - sum(times.values()) / whole)  # kernels may overlap
        largest = sorted(times, key=times.get, reverse=True)[:12]
        yield {name: {"ms": whole, "idle": idle}, **{key: {"ms": times[key]} for key in largest}}


def operation_times(events):
    """{operation: ms} of a profile; of one on CUDA {kernel or copy: ms}.

    On CUDA, the operations and annotations count the time of their kernels a second time.
    """
    kernels = {
        event.key: event.self_device_time_total / 1000 for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    }
    return kernels or {event.key: event.self_cpu_time_total / 1000 for event in events}


# ------------------------------------------------------------ the command line


def parse_args(argv=None):
    parser = make_parser(__doc__.splitlines()[0], dict.fromkeys(SIZES["ptb"], "the recipe's"))
    for flag in UNUSED:
        parser.actions[flag].help = argparse.SUPPRESS
    add = parser.add
    add("--recipe", "ptb", "the published command whose sizes are the defaults", choices=SIZES)
    add("--ntoken", None, "size of the vocabulary (default: the recipe's)", type=count)
    add("--baseline", False, "also time plain PyTorch, step for step (in float32 if ours is in "
        "bf16; with --attention, our model without it)", action="store_true")
    add("--steps", 15, "number of measurements of a step, and of an evaluation", type=count)
    add("--json", False, "print a JSON object", action="store_true")
    add("--profile", False, "instead of the benchmark, print the slowest operations",
        action="store_true")
    given = parser.parse_args(argv)
    sizes = SIZES[vars(given).pop("recipe", "ptb")]
    args = resolve_flags(given, {**parser.defaults, **sizes, "optimizer": "sgd"})
    args.lr = args.bias_lr = 1.0  # random words: there is nothing to learn
    if args.model not in ("LSTM", "GRU", "QRNN"):
        raise InputError(f"--model {args.model}: only LSTM, GRU and QRNN are timed")
    return args


def print_rows(rows, as_json=False):
    """Prints {name: {figure: value}} as a JSON object, or one line per name."""
    if as_json:
        print(json.dumps(rows))
        return
    for name, figures in rows.items():
        shown = [
            f"{figure} {value:,.2f}" if isinstance(value, float) else f"{figure} {value}"
            for figure, value in figures.items()
        ]
        print(f"{name[:100]}: {' | '.join(shown)}")  # a kernel's can be very long


def main():
    args = parse_args()
    task = profile if args.profile else measure
    try:
        for rows in task(args):
            print_rows(rows, args.json)
    except BrokenProcessPool:
        raise InputError("a process that measures was killed; lower the sizes") from None


if __name__ == "__main__":
    run_command(main)
