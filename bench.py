"""Times a training recipe against what the machine can do, and against plain PyTorch.

    python bench.py --recipe ptb --baseline
    python bench.py --recipe wt2 --model GRU --json
    python bench.py --attention single --baseline
    python bench.py --read 1 10 100

`utilization` is the time that the recipe's matrix products would take at the rate of a large one
(torch.mm, measured in the same run, between the steps), over the time that a step takes. With
`--baseline` a restatement of the recipe in plain PyTorch runs beside ours, step for step, and
`ratio` is its time over ours; so a noisy machine disturbs both alike. With `--attention` the
baseline is our model without it. Each side is a process of its own, which waits while the other
runs: its peak memory is that of the whole process after three steps.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.func import functional_call
from torch.nn import functional as F

from cpu_kernels import keep_freed_memory
from attention import KINDS
from checkpoint import new_params
from data import Corpus, InputError, batchify, batchify_exact, get_batch
from flags import Parser, count, device, make_parser, number, run
from model import activation_regularization
from train import (
    EVAL_BATCH_SIZE, EVAL_TOKENS, Objective, make_optimizer, score, train_step,
)
from utils import float32_products, repackage_hidden, set_up_device

# The published commands, and the size of their corpora's vocabularies.
RECIPES = {
    "ptb": {"ntoken": 10_000, "batch_size": 20, "dropouti": 0.4, "dropouth": 0.25},
    "wt2": {"ntoken": 33_278, "batch_size": 80, "dropouth": 0.2},
}
SIZES = ("batch_size", "bptt", "emsize", "nhid", "nlayers", "ntoken")
WARM_UP = 3
EVALUATED = 3 * EVAL_TOKENS


class Plain(nn.Module):
    """AWD-LSTM as one would write it first: the same model and regularizers, nothing made fast."""

    def __init__(self, args):
        super().__init__()
        cell = nn.GRU if args.model == "GRU" else nn.LSTM
        widths = [args.emsize] + [args.nhid] * (args.nlayers - 1) + [args.emsize]
        self.encoder = nn.Embedding(args.ntoken, args.emsize)
        self.rnns = nn.ModuleList(cell(a, b) for a, b in pairwise(widths))
        self.decoder = nn.Linear(args.emsize, args.ntoken)
        self.decoder.weight = self.encoder.weight
        self.args = args

    def locked(self, x, rate):
        if not self.training:
            return x
        return x * x.new_empty(1, *x.shape[1:]).bernoulli_(1 - rate) / (1 - rate)

    def forward(self, words, hidden):
        args, weight = self.args, self.encoder.weight
        if self.training:
            keep = 1 - args.dropoute
            weight = weight * weight.new_empty(len(weight), 1).bernoulli_(keep) / keep
        x, states = self.locked(F.embedding(words, weight), args.dropouti), []
        for layer, (rnn, state) in enumerate(zip(self.rnns, hidden or [None] * args.nlayers)):
            dropped = F.dropout(rnn.weight_hh_l0, args.wdrop, self.training)
            raw, state = functional_call(rnn, {"weight_hh_l0": dropped}, (x, state))
            states.append(state)
            x = self.locked(raw, args.dropout if layer == args.nlayers - 1 else args.dropouth)
        return self.decoder(x), states, raw, x


def nll(logits, targets):
    return -F.log_softmax(logits, -1).flatten(0, 1).gather(1, targets.unsqueeze(1)).mean()


def plain_side(args):
    """(step, evaluate): two functions without arguments, in plain PyTorch."""
    model = Plain(args).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, weight_decay=args.wdecay)
    data, targets, ids = inputs(args)
    states = None

    def step():
        nonlocal states
        model.train()
        optimizer.zero_grad()
        logits, states, raw, out = model(data, states and repackage_hidden(states))
        loss = nll(logits, targets)
        penalty = activation_regularization(raw, out, args.alpha, args.beta)
        (loss + penalty).backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()

    @torch.no_grad()
    @float32_products()
    def evaluation():
        model.eval()
        words, targets, _ = batchify_exact(ids, EVAL_BATCH_SIZE)
        words, targets = words.to(args.device), targets.to(args.device)
        hidden, total = None, 0.0
        for i in range(0, len(words), args.bptt):
            logits, hidden, _, _ = model(words[i : i + args.bptt], hidden)
            total += nll(logits, targets[i : i + args.bptt].flatten())
        return float(total)

    return step, evaluation


def our_side(args):
    """(step, evaluate): two functions without arguments, as main.py runs them."""
    corpus = Namespace(dictionary=range(args.ntoken))
    params = new_params(corpus, args)
    optimizer, objective = make_optimizer(params, args), Objective(params)
    data, targets, ids = inputs(args)
    hidden = params[0].init_hidden(args.batch_size)

    def step():
        nonlocal hidden
        params.train()
        _, hidden = train_step(objective, optimizer, data, targets, hidden, args)

    return step, lambda: score(params, ids, args)[0]


def baseline_side(args):
    """What ours is compared with: plain PyTorch, or, with attention, our model without it."""
    if args.attention == "none":
        return plain_side(args)
    return our_side(Namespace(**{**vars(args), "attention": "none"}))


SIDES = {"ours": our_side, "baseline": baseline_side}


def inputs(args):
    """Random words: data [bptt, B], targets [bptt * B] on the device, ids [N] to evaluate."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randint(args.ntoken, shape, generator=generator)

    data = draw(args.bptt, args.batch_size).to(args.device)
    targets = draw(args.bptt * args.batch_size).to(args.device)
    return data, targets, draw(EVALUATED + 1)


def products(args):
    """Floating-point operations of the matrix products of a training step."""
    gates = 3 if args.model == "GRU" else 4
    widths = [args.emsize] + [args.nhid] * (args.nlayers - 1) + [args.emsize]
    weights = sum(gates * b * (a + b) for a, b in pairwise(widths))
    weights += args.emsize * args.ntoken
    weights += {"none": 0, "single": 3, "combined": 4}[args.attention] * args.emsize**2
    # A multiplication and an addition, forward and for the gradients of input and weight.
    return 2 * 3 * weights * args.bptt * args.batch_size


def seconds(function, on):
    """The time that one call takes, waited for; by events on CUDA, whose current device it is."""
    if on.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    begin = time.perf_counter()
    function()
    if on.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - begin


class Side:
    """One side in a process of its own, which does one thing at a time when it is told to."""

    def __init__(self, side, args):
        argv = [sys.executable, __file__, "--child", side]
        for flag in ("recipe", "model", "attention", "device", "precision", *SIZES):
            argv += [f"--{flag}", getattr(args, flag)]
        self.process = subprocess.Popen(
            list(map(str, argv)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,  # Ctrl-C ends this process, and the end of its input that one
        )
        for _ in range(WARM_UP):
            self.ask("step")
        self.peak_mib = self.ask("peak")

    def ask(self, what):
        """Has it do "step", "evaluation", "mm" or "peak"; returns the seconds, or the MiB."""
        print(what, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise InputError(f"the process of one side ended at {what!r}: lower the sizes")
        return float(answer)

    def close(self):
        self.process.communicate()


def serve(args):
    """The process of a side: reads what to do, a word a line, and answers with a number."""
    set_up_device(args)
    if (args.child == "ours" or args.attention != "none") and args.device.type == "cpu":
        keep_freed_memory()  # as every command of ours does
    step, evaluation = SIDES[args.child](args)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    a = torch.randn(args.bptt * args.batch_size, args.nhid, device=args.device, dtype=dtype)
    b = torch.randn(args.nhid, 4 * args.nhid, device=args.device, dtype=dtype)
    tasks = {"step": step, "evaluation": evaluation, "mm": lambda: a @ b}
    for line in sys.stdin:
        print(
            peak(args.device) if line == "peak\n" else seconds(tasks[line.strip()], args.device),
            flush=True,
        )


def measure(args):
    """All figures of one recipe, as a dictionary."""
    names = ["ours", "baseline"] if args.baseline else ["ours"]
    sides = {name: Side(name, args) for name in names}
    rows = args.bptt * args.batch_size
    mm, steps = [], {name: [] for name in names}
    evaluations = {name: [] for name in names}
    sides["ours"].ask("mm")
    for _ in range(args.steps):
        mm.append(sides["ours"].ask("mm"))
        for name, side in sides.items():
            steps[name].append(side.ask("step"))
    for _ in range(args.evaluations + 1):
        for name, side in sides.items():
            evaluations[name].append(side.ask("evaluation"))
    for name, side in sides.items():
        del evaluations[name][0]  # it warmed up
        side.close()
    rate = 2 * rows * args.nhid * 4 * args.nhid / statistics.median(mm)
    result = {
        "recipe": args.recipe, "model": args.model, "attention": args.attention,
        "precision": args.precision, "device": str(args.device),
        "torch": str(torch.__version__), "threads": torch.get_num_threads(), "steps": args.steps,
        "mm_gflops": rate / 1e9,
    }
    for name in names:
        prefix = "" if name == "ours" else "baseline_"
        median = statistics.median(steps[name])
        result |= {
            f"{prefix}ms_per_step": median * 1e3,
            f"{prefix}ms_min": min(steps[name]) * 1e3,
            f"{prefix}ms_max": max(steps[name]) * 1e3,
            f"{prefix}tokens_per_s": rows / median,
            f"{prefix}utilization": products(args) / (median * rate),
            f"{prefix}peak_mib": sides[name].peak_mib,
            f"{prefix}eval_tokens_per_s": EVALUATED / statistics.median(evaluations[name]),
        }
    if args.baseline:
        result |= {
            "ratio": result["baseline_ms_per_step"] / result["ms_per_step"],
            "memory_ratio": result["peak_mib"] / result["baseline_peak_mib"],
            "eval_ratio": result["eval_tokens_per_s"] / result["baseline_eval_tokens_per_s"],
        }
    return result


def profile(args):
    """Prints which operations a step and an evaluation of ours spend their time in, in ms.

    On CUDA these are kernels; and the share of the time, without the profiler, that the GPU idles.
    """
    keep_freed_memory()
    set_up_device(args)
    step, evaluation = our_side(args)
    on_gpu = args.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    for name, function in (("a step", step), ("an evaluation", evaluation)):
        for _ in range(WARM_UP):
            function()
        with torch.profiler.profile(activities=kinds) as profiled:
            function()
        events, idle = profiled.key_averages(), {}
        if on_gpu:
            times = kernel_times(events)
            whole = statistics.median(seconds(function, args.device) for _ in range(args.steps))
            idle = {"whole_ms": 1e3 * whole, "idle": idle_share(sum(times.values()) / 1e6, whole)}
        else:
            times = {event.key: event.self_cpu_time_total for event in events}
        total = sum(times.values())
        if args.json:
            milliseconds = {key: time_taken / 1000 for key, time_taken in times.items()}
            print(json.dumps({"of": name, "ms": total / 1000, **idle, "operations": milliseconds}))
            continue
        print(f"{name}: {total / 1000:.0f} ms")
        if idle:
            print(f"{idle['idle']:6.1%} of {idle['whole_ms']:8.1f} ms the GPU idles (no profiler)")
        for key, microseconds in sorted(times.items(), key=lambda item: -item[1])[:12]:
            print(f"{microseconds / total:6.1%} {microseconds / 1000:8.1f} ms  {key[:90]}")


def kernel_times(events):
    """{kernel: microseconds} of a profile on CUDA, copies included.

    Its other events, operations and annotations, have the same time once more.
    """
    return {
        event.key: event.self_device_time_total for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    }


def idle_share(busy, whole):
    """The share of the time `whole` in which no kernel runs; `busy` is the sum of all kernels."""
    return max(0.0, 1 - busy / whole)  # those that overlap come to more


def peak(on):
    """MiB: of the GPU's memory on CUDA, else of the whole process."""
    return (torch.cuda.max_memory_allocated(on) if on.type == "cuda" else resident_peak()) / 2**20


def resident_peak():
    """The peak of this process's memory in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage would count the parent's memory at the fork as ours
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read(millions, ntoken=267_735):
    """Makes a corpus of so many million tokens (WikiText-103's vocabulary), and reads it.

    Returns tokens, words, tokens per second; the peak memory that reading added, in a process of
    its own, in MiB and over that of the array of ids; and the milliseconds of a first training step
    on it, at the size of the model for Penn Treebank, through the split softmax.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), int(millions * 1e6), ntoken)
        done = subprocess.run(
            [sys.executable, "-c", "import bench; bench.read_and_step()", folder],
            cwd=Path(__file__).parent, check=True, capture_output=True, text=True,
        )
    return json.loads(done.stdout)


def read_and_step():
    """The process of `read`, with the corpus's folder as its argument; prints JSON."""
    keep_freed_memory()
    before, begin = resident_peak(), time.perf_counter()
    corpus = Corpus(sys.argv[1])
    elapsed, added = time.perf_counter() - begin, resident_peak() - before
    args = parse_args(["--device", "cpu"])
    params = new_params(corpus, args)
    args.batch_size = min(args.batch_size, len(corpus.train) // 2)
    source = batchify(corpus.train, args.batch_size, args)
    data, targets = get_batch(source, 0, args)
    begin = time.perf_counter()
    loss, _ = train_step(
        Objective(params).train(), make_optimizer(params, args), data, targets,
        params[0].init_hidden(args.batch_size), args,
    )
    print(json.dumps({
        "tokens": len(corpus.train), "words": len(corpus.dictionary),
        "tokens_per_s": len(corpus.train) / elapsed, "peak_mib": added / 2**20,
        "peak_over_array": added / corpus.train.nbytes, "splits": params[1].splits,
        "step_ms": 1e3 * (time.perf_counter() - begin), "step_loss": loss.item(),
    }))


def write_corpus(folder, tokens, ntoken, line=100):
    """train.txt: `tokens` words of Zipf's law (each of the vocabulary once), 100 to a line."""
    words = [f"w{i}" for i in range(ntoken - 1)]
    generator = torch.Generator().manual_seed(0)
    with open(folder / "train.txt", "w") as file:
        left = tokens
        while left > 0:
            uniform = torch.rand(min(left, 1_000_000), generator=generator)
            ids = (ntoken ** uniform).long().clamp(max=ntoken - 1) - 1
            for i in range(0, len(ids), line - 1):
                file.write(" ".join([words[k] for k in ids[i : i + line - 1].tolist()]) + "\n")
            left -= len(ids)
    for split in ("valid", "test"):
        with open(folder / f"{split}.txt", "w") as file:
            file.writelines(" ".join(words[i : i + line]) + "\n" for i in range(0, ntoken, line))


def show(result):
    """Prints the figures of `measure`, a line a side."""
    print(
        f"recipe {result['recipe']}, model {result['model']}, attention "
        f"{result['attention']}, {result['precision']}, device {result['device']}, torch "
        f"{result['torch']}, {result['threads']} threads, median of {result['steps']} steps; a "
        f"large product runs at {result['mm_gflops']:.0f} GFLOP/s"
    )
    for side, prefix in (("ours", ""), ("baseline", "baseline_")):
        if f"{prefix}ms_per_step" in result:
            r = {key.removeprefix(prefix): value for key, value in result.items() if prefix in key}
            print(
                f"{side:8s} | {r['ms_per_step']:8.1f} ms/step ({r['ms_min']:.1f} to "
                f"{r['ms_max']:.1f}) | {r['tokens_per_s']:7.0f} tokens/s | utilization "
                f"{r['utilization']:.2f} | peak {r['peak_mib']:6.0f} MiB | evaluation "
                f"{r['eval_tokens_per_s']:7.0f} tokens/s"
            )
    if "ratio" in result:
        print(
            f"ratio    | step {result['ratio']:.2f} times as fast | memory "
            f"{result['memory_ratio']:.2f} | evaluation {result['eval_ratio']:.2f} times as fast"
        )


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="ptb")
    add("--model", choices=["LSTM", "GRU"], default="LSTM")
    add("--attention", choices=KINDS, help="the baseline is then our model without it")
    add("--baseline", action="store_true", help="run plain PyTorch beside it, step for step")
    add("--steps", type=count, default=15, help="steps timed (default: 15)")
    add("--evaluations", type=count, default=5, help="evaluations timed (default: 5)")
    for flag in SIZES:
        add(f"--{flag}", type=count, metavar="N", help="instead of the recipe's")
    add("--device", type=device, help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    add("--precision", choices=["fp32", "tf32", "bf16"],
        help="ours: see main.py --help; the baseline has fp32, or tf32 where ours has it")
    add("--json", action="store_true", help="print one JSON object")
    add("--profile", action="store_true", help="print what the time of a step is spent in instead")
    add("--read", type=number(float, 0.01, 1e5), nargs="+", metavar="N",
        help="read corpora of so many million tokens instead")
    add("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    recipe = {**make_parser("").defaults, **RECIPES[args.recipe]}
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = Namespace(**{"child": None, "read": None, **recipe, **given, "optimizer": "sgd"})
    args.lr = args.bias_lr = 1.0  # random words: nothing to learn
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or ("tf32" if args.device.type == "cuda" else "fp32")
    if args.precision == "tf32" and args.device.type != "cuda":
        parser.error(f"--precision tf32: device {args.device} has none; leave it out")
    return args


def main():
    args = parse_args()
    torch.manual_seed(0)
    if args.child:
        serve(args)
    elif args.read:
        for result in map(read, args.read):
            print(json.dumps(result) if args.json else (
                f"{result['tokens']:11,d} tokens, {result['words']:,} words | "
                f"{result['tokens_per_s']:9,.0f} tokens/s | peak {result['peak_mib']:.0f} MiB, "
                f"{result['peak_over_array']:.2f} times the array of ids | a step "
                f"{result['step_ms']:.0f} ms, loss {result['step_loss']:.2f}"
            ))
    elif args.profile:
        profile(args)
    else:
        result = measure(args)
        print(json.dumps(result)) if args.json else show(result)


if __name__ == "__main__":
    run(main)
