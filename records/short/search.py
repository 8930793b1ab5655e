"""The search behind the former --recipe short; runs at commit 8a83293 and before.

search.py FOLDER NAME ... runs these VARIANTS, two at a time. Each is main.py on Penn Treebank with
the reduced model, on one thread; FOLDER/NAME.log and FOLDER/NAME.pt.jsonl are what it leaves. A
name may end in xEPOCHS (4 without it) and in @SEED (141 without it): lr-1.2e-2x8@142. Run from the
top of the checkout, with data/penn there. A name that the folder has a log of is refused.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REDUCED = "--data data/penn --emsize 200 --nhid 400 --dropouti 0.4 --dropouth 0.25"
SHORT = (
    f"{REDUCED} --optimizer adamw --lr 8e-3 --wdecay 0.1 --schedule onecycle "
    "--decoder-bias unigram --batch_size 20 --regularization-ramp 0.3 12"
)
# Earlier recipes: weight decay 0.02, regularizers at full strength after 64 and after 32 epochs.
RAMP_16 = f"{SHORT} --wdecay 0.02 --regularization-ramp 0.3 64"
RAMP_8 = f"{SHORT} --wdecay 0.02 --regularization-ramp 0.3 32"
PUBLISHED = f"{REDUCED} --batch_size 20"
VARIANTS = {  # name -> flags
    "published": PUBLISHED,
    "published-onecycle": f"{PUBLISHED} --schedule onecycle",
    "short": SHORT,
    "ramp-16": RAMP_16,
    "ramp-16-lr-5e-3": f"{RAMP_16} --lr 5e-3",
    "ramp-16-lr-1.2e-2": f"{RAMP_16} --lr 1.2e-2",
    "ramp-16-lr-5e-3-bptt-35": f"{RAMP_16} --lr 5e-3 --bptt 35",
    "ramp-16-lr-3e-3-bptt-35": f"{RAMP_16} --lr 3e-3 --bptt 35",
    "share-0.5-lr-5e-3-bptt-35":
        f"{SHORT} --wdecay 0.02 --regularization-ramp 0.5 64 --lr 5e-3 --bptt 35",
    "ramp-8": RAMP_8,
    "ramp-8-wdecay-0.1": f"{RAMP_8} --wdecay 0.1",
    "ramp-8-wdecay-0.3": f"{RAMP_8} --wdecay 0.3",
    "share-0.15": f"{SHORT} --regularization-ramp 0.15 12",
    "no-ramp": f"{SHORT} --regularization-ramp 1 1",
    "ramp-to-half": f"{SHORT} --regularization-ramp 0.15 9.72",  # 0.15 + 0.85 * 4 / 9.72 = 0.5
    "ramp-to-whole": f"{SHORT} --regularization-ramp 0.3 4",
    "batch-10": f"{SHORT} --batch_size 10",
    "batch-40": f"{SHORT} --batch_size 40",
    "batch-grows": f"{SHORT} --batch_size 10",
    "lr-1.2e-2": f"{SHORT} --lr 1.2e-2",
    "wdecay-0": f"{SHORT} --wdecay 0",
    "wdecay-0.02": f"{SHORT} --wdecay 0.02",
    "decoder-zeros": f"{SHORT} --decoder-bias zeros",
    "clip-1": f"{SHORT} --clip 1",
    "up-0.3": SHORT,
    "betas-0.9-0.999": SHORT,
    "betas-0.8-0.99": SHORT,  # what adamw had before
    "betas-0.8-0.998": SHORT,  # what it has now
    "window-grows": SHORT,
    "averaging": SHORT,
    "constant": f"{SHORT} --schedule constant --lr 2e-3",
    "constant-averaging": f"{SHORT} --schedule constant --lr 2e-3",
    "gru": f"{SHORT} --model GRU --alpha 0.5 --beta 0.25",
    "gru-whole-penalties": f"{SHORT} --model GRU --alpha 2 --beta 1",
    "gru-published": f"{PUBLISHED} --model GRU",
    "attention": f"{SHORT} --attention single",
    "attention-published": f"{PUBLISHED} --attention single",
    "bilm": f"{SHORT} --model biLM --objective both",
    "bilm-published": f"{PUBLISHED} --model biLM --objective both",
}


def patch(variant):
    """Makes the changes for which there is no flag."""
    import torch

    import data
    import train

    if variant == "up-0.3":
        train.WARMUP = 0.3
    if variant.startswith("betas-"):
        betas = tuple(map(float, variant.split("-")[1:]))
        train.OPTIMIZERS["adamw"] = (torch.optim.AdamW, {"betas": betas})
    train_epoch, seq_len = train.Trainer.train_epoch, train.random_seq_len
    apply_schedules = train.apply_schedules
    if variant.endswith("averaging"):  # the mean of the weights over the last epoch

        def averaged_epoch(self):
            if self.epoch == self.args.epochs and self.average is None:
                self.average = train.Average(self.params)
            train_epoch(self)

        train.Trainer.train_epoch = averaged_epoch
    if variant == "batch-grows":  # four times as large in the second half of the run

        def larger_epoch(self):
            if self.epochs_read() == self.args.epochs / 2:
                self.args.batch_size *= 4
                self.texts = [data.batchify(self.corpus.train, self.args.batch_size)]
                self.rows = len(self.texts[0])
                self.set_offsets(None)
            train_epoch(self)

        train.Trainer.train_epoch = larger_epoch
    if variant == "window-grows":  # from half of --bptt to one and a half of it

        def growing(epochs, args, model):
            share = 0.5 + epochs / args.epochs
            train.random_seq_len = lambda bptt: seq_len(round(bptt * share))
            return apply_schedules(epochs, args, model)

        train.apply_schedules = growing


def parts(name):
    """(variant, epochs or None, seed or None) of a name."""
    return re.fullmatch(r"(.*?)(?:x(\d+))?(?:@(\d+))?", name).groups()


def run(folder, name):
    """Trains the variant of that name in a process of its own; returns its exit status."""
    variant, epochs, seed = parts(name)
    flags = [*VARIANTS[variant].split(), "--epochs", epochs or "4", "--seed", seed or "141"]
    command = [sys.executable, __file__, "--variant", variant, *flags]
    command += ["--save", str(folder / f"{name}.pt")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    with open(folder / f"{name}.log", "w") as log:
        print(f"# main.py {' '.join(flags)} (search.py {name})", file=log)
        begun = time.strftime("%F %R %Z")
        print(f"# {begun}, Python {platform.python_version()}", file=log, flush=True)
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env).returncode


if __name__ == "__main__":
    if sys.argv[1:2] == ["--variant"]:
        import flags
        import main

        patch(sys.argv[2])
        flags.run_command(lambda: main.main(sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(VARIANTS))
    args = parser.parse_args()
    for name in args.names:
        if parts(name)[0] not in VARIANTS:
            parser.error(f"{name}: no such variant; --help lists them")
        if (args.folder / f"{name}.log").exists():
            parser.error(f"{name}: {args.folder} has a log of it; name another folder")
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda name: run(args.folder, name), args.names)
        for name, status in zip(args.names, runs):
            print(name, "exit", status, flush=True)
            failed |= status != 0
    sys.exit(failed)
