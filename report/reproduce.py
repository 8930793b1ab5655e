"""Runs the experiments of "Regularizing and Optimizing RNN Language Models".

    python -m report.reproduce --scale tiny --out results/
    python -m report.reproduce --scale full --only ptb-lstm,wt2-lstm --devices cuda:0 cuda:1

Each experiment is a run of main.py or finetune.py in the folder --out/runs/NAME. Running the same
command again resumes interrupted runs and skips finished ones. Whenever a run succeeds, and at the
end, the results are updated: README.md, with a table and figures.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from checkpoint import STATE
from data import InputError
from flags import Parser, parse_device, run_command
from report.experiments import EXPERIMENTS, SCALES, command, estimated_hours, flags_of, model_path
from report.plot import import_matplotlib
from report.results import LOG, read_log, write_results
from utils import Preemption

ROOT = Path(__file__).resolve().parent.parent


def list_experiments(names, scale, out):
    """Prints the commands and their estimated hours."""
    print(f"Scale {scale}: {SCALES[scale].about}")
    print("Estimated hours, on the report's GTX 1080 Ti at scale full, else on two CPU cores:")
    for name in names:
        line = shlex.join(command(name, scale, out))
        print(f"{estimated_hours(name, scale):8.2f} h  {name}: python {line}")
    print(f"{sum(estimated_hours(name, scale) for name in names):8.2f} h  in total")


def start(name, scale, out, device, threads):
    """Starts or resumes an experiment; returns its process."""
    model = model_path(out, name)
    model.parent.mkdir(exist_ok=True)
    argv = command(name, scale, out)
    # finetune.py first copies its base to `model`. If it is killed before its first save, the copy
    # exists without a training state.
    if Path(f"{model}{STATE}").exists() or (EXPERIMENTS[name].base and model.exists()):
        argv += ["--resume", str(model)]
    argv += ["--device", str(device)]
    line = f"python {shlex.join(argv)}"
    print(f"{name}: {line}", flush=True)
    with open(model.with_name(LOG), "a", encoding="utf-8") as log:
        print(f"# {line}", file=log, flush=True)
        return subprocess.Popen(
            [sys.executable, ROOT / argv[0], *argv[1:]], stdout=log, stderr=log,
            start_new_session=True,  # Ctrl-C reaches only the parent, which ends its children
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )


def report_end(name, status, out, scale):
    """Reports the end of an experiment and updates the results; returns whether it succeeded."""
    _, test = read_log(out, name)
    if status == 0 and test:
        print(f"{name}: done, test ppl {test['test']:.2f}", flush=True)
        write_results(out, scale)
        return True
    log = model_path(out, name).with_name(LOG)
    *_, last = log.read_text(encoding="utf-8", errors="replace").splitlines()
    print(f"reproduce.py: error: {name}: exit status {status}, see {log}: {last}", file=sys.stderr)
    return False


def run_all(names, scale, out, devices, check):
    """Runs the experiments, one at a time per device; returns the names of the failed ones.

    `check` is polled; if it raises, all runs save their state and end.
    """
    threads = max(1, torch.get_num_threads() // len(devices))
    waiting = [name for name in names if not read_log(out, name)[1]]
    idle, running, failed = list(devices), {}, []
    try:
        while waiting or running:
            check()
            ready = [n for n in waiting if EXPERIMENTS[n].base not in [*waiting, *running]]
            for name in ready[: len(idle)]:
                waiting.remove(name)
                device = idle.pop(0)
                running[name] = start(name, scale, out, device, threads), device
            for name, (process, device) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    idle.append(device)
                    if not report_end(name, process.returncode, out, scale):
                        failed.append(name)
                        for dependent in [n for n in waiting if EXPERIMENTS[n].base == name]:
                            waiting.remove(dependent)
                            print(f"{dependent}: skipped, since {name} failed", file=sys.stderr)
            time.sleep(0.1)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return failed


def prepare(out, scale, names):
    """Creates the folder of the runs. Raises InputError if the runs could not work."""
    import_matplotlib()
    for name in names:
        data = flags_of(name, scale)["--data"]
        if data != "sample" and not Path(data, "train.txt").exists():
            raise InputError(
                f"--scale {scale}: {data} does not exist; ./getdata.sh downloads it, and --scale "
                "tiny needs no corpus"
            )
    file = out / "runs" / "scale"  # holds the scale of the folder's runs
    earlier = file.read_text().strip() if file.exists() else None
    if earlier != scale and out.exists() and any(out.iterdir()):
        raise InputError(
            f"--out {out}: not empty, and not a folder for --scale {scale}; choose another folder"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{scale}\n")


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--scale", choices=SCALES, default="tiny",
        help="; ".join(f"{name}: {scale.about}" for name, scale in SCALES.items()))
    add("--only", metavar="NAME,...", default=",".join(EXPERIMENTS),
        help="run these experiments and the ones they fine-tune (default: all, see --list)")
    add("--out", type=Path, default=Path("results"),
        help="folder for the runs and the results (default: results)")
    add("--devices", type=parse_device, nargs="+", metavar="DEVICE",
        default=["cuda"] if torch.cuda.is_available() else ["cpu", "cpu"],
        help="run one experiment at a time on each device: for example cuda:0 cuda:1, or cpu cpu, "
             "which share the cores (default: cuda, else cpu cpu)")
    add("--list", action="store_true", help="print the commands and their estimated hours")
    args = parser.parse_args(argv)
    only = args.only.split(",")
    for name in only:
        if name not in EXPERIMENTS:
            parser.error(f"--only {name}: unknown; choose from {', '.join(EXPERIMENTS)}")
    only += [EXPERIMENTS[name].base for name in only]
    args.only = [name for name in EXPERIMENTS if name in only]
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.list:
        list_experiments(args.only, args.scale, args.out)
        return 0
    prepare(args.out, args.scale, args.only)
    try:
        with Preemption() as preemption:
            check = preemption.check_signals
            failed = run_all(args.only, args.scale, args.out, args.devices, check)
    finally:
        write_results(args.out, args.scale)
        print(f"Wrote {args.out / 'README.md'}")
    return 2 if failed else 0


if __name__ == "__main__":
    run_command(main)
