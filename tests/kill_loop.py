"""Kills a run again and again, resumes it, and compares its end with that of a run left alone.

    PYTHONPATH=. python tests/kill_loop.py --cycles 100 --folder kills -- --data sample ...

What follows `--` are flags of main.py, without --save. First the run is made whole. Then the same
run is started, killed at a random moment and resumed, over and over, until it ends by itself; and
all of that anew until the kills are as many as asked for. After each kill every file is read.
Exit code 0 when every end was bit-identical to the whole run's, 1 otherwise.
"""

import argparse
import functools
import json
import platform
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from checkpoint import read_checkpoint, read_state
from utils import environment

ROOT = Path(__file__).resolve().parent.parent
TIMING = {"seconds", "tokens_per_s"}
IGNORED = {*TIMING, "records", "flags"}  # flags name the path


def same(a, b):
    """Whether states or checkpoints are equal in every bit, but for time spent and flags."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        keys = a.keys() - IGNORED
        return keys == b.keys() - IGNORED and all(same(a[k], b[k]) for k in keys)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def lines(records):
    """JSON lines without the times in them."""
    parsed = [json.loads(line) for line in records.splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMING} for record in parsed]


def outcome(folder):
    """All that a run has left: states, checkpoints, logged losses, by file name."""
    found = {}
    for path in sorted(folder.glob("m.pt*")):
        if path.suffix == ".state":
            found[path.name] = read_state(path.with_suffix(""))
        elif path.suffix == ".jsonl":
            found[path.name] = lines(path.read_text())
        elif path.suffix not in (".lock", ".tmp"):  # what a killed run leaves
            found[path.name] = read_checkpoint(path)
    return found


def where(folder):
    """The position of the state on disk, in words; reads every file."""
    outcome(folder)
    state = read_state(folder / "m.pt")
    if state is None:
        return "no state yet"
    phase = "fine-tuning" if state["finetuning"] else "training"
    averaging = "" if state["average"] is None else ", averaging"
    return f"state of {phase}, epoch {state['epoch']}, batch {len(state['losses'])}{averaging}"


def start(folder, flags):
    """Starts or resumes the run in `folder`, its output in the file `log` there."""
    resuming = (folder / "m.pt.state").exists()
    argv = ["--resume", "m.pt"] if resuming else [*flags, "--save", "m.pt"]
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), *argv], cwd=folder, stdout=log, stderr=log
        )


def kill_loop(folder, flags, cycles, seconds, signals=(signal.SIGKILL,), seed=0, tell=print):
    """Returns whether every end was bit-identical; `seconds`: how long it trains at most."""
    generator = random.Random(seed)
    whole = folder / "whole"
    whole.mkdir(parents=True)
    if start(whole, flags).wait() != 0:
        raise RuntimeError((whole / "log").read_text())
    reference = outcome(whole)
    tell(f"whole: {', '.join(reference)}")
    kills = 0
    while kills < cycles:
        part = folder / f"killed-{kills}"
        part.mkdir()
        while True:
            process = start(part, flags)
            number = generator.choice(signals)
            if kills == cycles:
                process.wait()
            elif generator.random() < 0.9:
                while process.poll() is None and "Args:" not in (part / "log").read_text():
                    time.sleep(0.01)
            else:  # while it still starts, when Ctrl-C ends in some error of torch's import
                number = signal.SIGKILL
            time.sleep(generator.uniform(0, seconds))
            process.send_signal(number)  # which does nothing once the run has ended
            process.wait()
            if process.returncode not in (-number, 128 + number):
                break
            kills += 1
            tell(f"{kills:4d} {number.name} -> exit {process.returncode}; {where(part)}")
        if process.returncode != 0 or not same(outcome(part), reference):
            tell(f"exit {process.returncode}, DIFFERENT from the whole run")
            tell((part / "log").read_text())
            return False
        tell(f"run ended ({kills} kills): bit-identical to the whole run")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=3.0, help="trained between kills, at most")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="+", help="flags of main.py, after --")
    args = parser.parse_args()
    tell = functools.partial(print, flush=True)
    tell(f"# PYTHONPATH=. python {shlex.join(sys.argv)}")
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    tell(f"# {now}, {platform.platform()}, {environment(torch.device('cpu'))}")
    identical = kill_loop(
        args.folder, args.flags, args.cycles, args.seconds, seed=args.seed, tell=tell
    )
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
