"""Runs the experiments of "Regularizing and Optimizing RNN Language Models"; writes the results.

    python reproduce.py --scale tiny --out results/
    python reproduce.py --scale full --only ptb-lstm,wt2-lstm --devices cuda:0 cuda:1

Each is a run of main.py or finetune.py in a folder of its own, --out/runs/NAME. One that was
interrupted goes on where it was; one that is done is not run again. The results, a README.md with
tables and figures, are written anew whenever a run has ended.
"""

import importlib
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from data import InputError
from experiments import CORPORA, EXPERIMENTS, SCALES, corpus_of, epochs_of
from files import exclusive, write_atomically
from flags import Parser, device, run
from resume import read_state
from results import DONE, LOG, MODEL, read_results, write_results
from utils import load

SCALE = "runs/scale"  # in --out: what its runs are of
PATIENCE = 60  # seconds that a run whose parent has died may take to save its state


def with_bases(names):
    """The experiments named, each after the one whose model it fine-tunes."""
    chosen = []
    for name in names:
        chosen += [n for n in (EXPERIMENTS[name].base, name) if n and n not in chosen]
    return chosen


def chains(names):
    """`names` as lists that can run side by side: a base, and what fine-tunes it."""
    begins = [name for name in names if EXPERIMENTS[name].base is None]
    return [[n for n in names if first in (n, EXPERIMENTS[n].base)] for first in begins]


def command(name, scale, save):
    """The command line of an experiment, as a list that begins with main.py or finetune.py."""
    experiment, size, corpus = EXPERIMENTS[name], SCALES[scale], corpus_of(name)
    epochs = str(epochs_of(name, scale))
    if experiment.base:
        seed = CORPORA[corpus].split()[-2:]  # all else is as the base was trained
        return ["finetune.py", "--epochs", epochs, *seed, "--save", save]
    words = f"{CORPORA[corpus]} {experiment.flags} {size.flags}".split()
    flags = dict(zip(words[::2], words[1::2]))  # of one that is there twice, the last counts
    flags |= {"--epochs": epochs, "--save": save}
    return ["main.py", *(word for flag in flags.items() for word in flag)]


def hours(name, scale):
    """The estimated time of an experiment, in hours on the scale's machine."""
    experiment, size, corpus = EXPERIMENTS[name], SCALES[scale], corpus_of(name)
    share = EXPERIMENTS[experiment.like or name].seconds / EXPERIMENTS[f"{corpus}-lstm"].seconds
    return epochs_of(name, scale) * size.seconds[corpus] * share / 3600


def list_experiments(names, scale, out):
    """Prints what would run."""
    print(f"Scale {scale}: {SCALES[scale].about}")
    print(f"Hours as estimated for {SCALES[scale].machine}, one run after the other:")
    for name in names:
        line = shlex.join(command(name, scale, f"{out}/runs/{name}/{MODEL}"))
        print(f"{hours(name, scale):8.2f} h  {name}: python {line}")
    print(f"{sum(hours(name, scale) for name in names):8.2f} h  in all")


class Runner:
    """Runs experiments, one at a time on each device, until they are done or it is asked to end."""

    def __init__(self, out, scale, names, devices):
        self.out, self.scale, self.names, self.devices = out, scale, names, devices
        self.children, self.stopped, self.failed = set(), 0, []
        self.lock = threading.Lock()  # of what is printed, and of the results

    def run(self):
        """Returns the exit status: 0; 2 where a run failed; 128 + a signal's number."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        waiting = queue.SimpleQueue()
        for chain in chains(self.names):
            waiting.put(chain)
        with ThreadPoolExecutor(len(self.devices)) as pool:
            workers = [pool.submit(self.work, waiting, device) for device in self.devices]
            while wait(workers, 0.5).not_done:  # a signal's handler runs between waits
                pass
        for worker in workers:
            worker.result()
        if self.stopped:
            print("Stopped; the same command goes on from here")
            return 128 + self.stopped
        return 2 if self.failed else 0

    def stop(self, number, frame):
        """The first signal: the runs save their state and end. The second: they end at once."""
        for child in list(self.children):
            child.kill() if self.stopped else child.terminate()
        self.stopped = number

    def work(self, waiting, where):
        """Runs chains of experiments on one device."""
        while not waiting.empty():
            try:
                chain = waiting.get_nowait()
            except queue.Empty:
                return
            for name in chain:
                if self.stopped or EXPERIMENTS[name].base in self.failed:
                    break
                if (self.folder(name) / DONE).exists():
                    self.say(f"{name}: done before")
                    continue
                try:
                    self.run_one(name, where)
                except (InputError, OSError) as error:
                    self.failed.append(name)
                    print(f"reproduce.py: error: {name}: {error}", file=sys.stderr, flush=True)

    def say(self, line):
        with self.lock:
            print(line, flush=True)

    def folder(self, name):
        return self.out / "runs" / name

    def run_one(self, name, where):
        """Begins an experiment or goes on with it; raises InputError when it fails."""
        folder = self.folder(name)
        argv = self.next_command(name)
        argv += ["--device", str(where)]
        self.say(f"{name}: python {shlex.join(argv)}")
        begun = time.time()
        with open(folder / LOG, "a", encoding="utf-8") as log:
            now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            print(f"# {now}: python {shlex.join(argv)}", file=log, flush=True)
            # In a session of its own, so that a Ctrl-C comes to it from here only.
            child = subprocess.Popen(
                [sys.executable, __file__, "--child", *argv], stdin=subprocess.PIPE, stdout=log,
                stderr=log, start_new_session=True, env=self.threads() | os.environ,
            )
            self.children.add(child)
            if self.stopped:
                child.terminate()
            status = self.wait(name, child, log.tell())
            self.children.discard(child)
        if self.stopped:
            return
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
        if status < 0:
            raise InputError(f"killed by signal {-status}; the same command goes on from there")
        if status:
            raise InputError(f"exit status {status}, see {folder / LOG}: {text.splitlines()[-1]}")
        test = text[text.rindex("| End of training |"):]
        found = {
            "command": ["python", *command(name, self.scale, str(folder / MODEL))],
            "parameters": sum(p.numel() for p in load(folder / MODEL)[0].parameters()),
            "test_ppl": float(re.search(r"test ppl +(\S+) \|", test)[1]),
            "parts": {
                name: float(ppl)
                for name, ppl in re.findall(r"\| (\w+) +\| loss +\S+ \| ppl +(\S+) \|", test)
            },
        }
        with self.lock:
            write_atomically(folder / DONE, (json.dumps(found, indent=1) + "\n").encode())
            print(f"{name}: done in {time.time() - begun:.0f} s, test ppl {found['test_ppl']:.2f}",
                  flush=True)
            write_results(self.out, self.scale, self.names)

    def wait(self, name, child, position):
        """The exit status of a run. Its warnings, as of a full disk, are said here meanwhile.

        position: where in its log, in bytes, this run begins.
        """
        with open(self.folder(name) / LOG, encoding="utf-8", errors="replace") as log:
            log.seek(position)
            while True:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(1)
                for line in log:
                    if line.startswith("Warning:"):
                        print(f"{name}: {line.rstrip()}", file=sys.stderr, flush=True)
                if child.returncode is not None:
                    return child.returncode

    def threads(self):
        """Runs side by side on a CPU share its cores."""
        beside = sum(where.type == "cpu" for where in self.devices)
        return {"OMP_NUM_THREADS": str(max(1, cores() // beside))} if beside > 1 else {}

    def next_command(self, name):
        """The command that begins the experiment, or goes on with it. Makes its folder."""
        folder, base = self.folder(name), EXPERIMENTS[name].base
        save = str(folder / MODEL)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise InputError(f"{folder}: is no folder; remove it") from None
        begin = command(name, self.scale, save)
        await_end(save)
        state = read_state(save)
        if state and state["command"] == begin[0]:
            return [begin[0], "--resume", save]
        if base:
            trained = self.folder(base) / MODEL
            if not trained.exists():
                raise InputError(
                    f"{trained}: is gone; remove {self.folder(base)}, and {base} is trained again"
                )
            load(trained)  # a damaged one is named
            write_atomically(save, trained.read_bytes())
        return begin


def cores():
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def default_devices():
    """CUDA's current device; without CUDA the CPU, for two runs side by side if it has two cores.

    One run does not keep two cores busy all the time, and less so the smaller its model is.
    """
    if torch.cuda.is_available():
        return [torch.device("cuda")]
    return [torch.device("cpu")] * min(2, cores())


def await_end(save):
    """Waits for the end of a run at `save` whose parent has died; InputError if it lasts."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with exclusive(save):
                return
        except InputError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def check(out, scale, names):
    """Raises InputError where `out` is in use for something else, or what runs need is absent."""
    if find_spec("matplotlib") is None:
        raise InputError("matplotlib is not installed; pip install -r requirements-plot.txt")
    found = None
    if (out / SCALE).is_file():
        found = (out / SCALE).read_text(encoding="utf-8", errors="replace").strip()
    if found is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: holds something else; name another folder, or a new one")
    if found not in (None, *SCALES):
        raise InputError(f"{out / SCALE}: names no scale; write {', '.join(SCALES)} into it")
    if found not in (None, scale):
        raise InputError(f"--out {out}: holds runs at --scale {found}; name another folder")
    for name in names:
        if EXPERIMENTS[name].base is None:
            argv = command(name, scale, "")
            data = argv[argv.index("--data") + 1]
            splits = [Path(data, f"{split}.txt") for split in ("train", "valid", "test")]
            if data != "sample" and not all(map(Path.exists, splits)):
                raise InputError(
                    f"--scale {scale}: {data} is absent, or not whole; ./getdata.sh fetches it, "
                    "and --scale tiny needs no corpus"
                )


def as_child():
    """Runs main.py or finetune.py in this process; ends it, state saved, when the parent dies."""

    def watch():
        os.read(0, 1)  # returns when the other end of the pipe is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return importlib.import_module(sys.argv[0].removesuffix(".py")).main()


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--scale", choices=SCALES, default="tiny",
        help="; ".join(f"{name}: {scale.about}" for name, scale in SCALES.items()))
    add("--only", type=lambda text: text.replace(",", " ").split(), default=list(EXPERIMENTS),
        metavar="NAME,...", help="these experiments (default: all, see --list)")
    add("--out", type=Path, default=Path("results"), help="folder of the runs and the results")
    add("--devices", type=device, nargs="+", default=default_devices(), metavar="DEVICE",
        help="run an experiment at a time on each, as cuda:0 cuda:1, or cpu cpu, which share the "
             "cores (default: cuda, else cpu cpu)")
    add("--list", action="store_true", help="print what would run, and the estimated hours")
    args = parser.parse_args(argv)
    for name in args.only or [""]:
        if name not in EXPERIMENTS:
            parser.error(f"--only {name}: there are {', '.join(EXPERIMENTS)}")
    args.only = with_bases(args.only)
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.list:
        list_experiments(args.only, args.scale, args.out)
        return 0
    check(args.out, args.scale, args.only)
    read_results(args.out, EXPERIMENTS)  # what is damaged is said before anything runs
    try:
        (args.out / "runs").mkdir(parents=True, exist_ok=True)
        write_atomically(args.out / SCALE, f"{args.scale}\n".encode())
    except OSError as error:
        raise InputError(
            f"--out {args.out}: cannot be written ({error.strerror}); name another folder"
        ) from None
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(args.out / SCALE))
        except InputError:
            raise InputError(
                f"--out {args.out}: another reproduce.py is at work there; wait for it, or name "
                "another folder"
            ) from None
        status = Runner(args.out, args.scale, args.only, args.devices).run()
        write_results(args.out, args.scale, args.only)
    print(f"Written: {args.out / 'README.md'}")
    return status


if __name__ == "__main__":
    is_child = sys.argv[1:2] == ["--child"] and len(sys.argv) > 2
    sys.argv = sys.argv[2 * is_child :]
    run(as_child if is_child else main)
