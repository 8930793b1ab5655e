"""Time and memory of steps of the published WikiText-103 command, on random words (Zipf's law).

    PYTHONPATH=. python records/big/step.py [FLAGS...]    # flags of main.py override the command's
"""

import resource
import sys
import time
from argparse import Namespace

import torch

import main
from bench import zipf
from cpu_kernels import keep_freed_memory
from data import Dictionary, batchify, get_batch
from train import MAX_EXCESS, make_objective, make_optimizer, new_params, train_step
from utils import set_up_device

COMMAND = (
    "--epochs 14 --nlayers 4 --emsize 400 --nhid 2500 --alpha 0 --beta 0 --dropoute 0 --dropouth "
    "0.1 --dropouti 0.1 --dropout 0.1 --wdrop 0 --wdecay 0 --bptt 140 --batch_size 60 --optimizer "
    "adam --lr 1e-3 --data data/wikitext-103 --save WT103.12hr.QRNN.pt --when 12 --model QRNN"
)
WORDS, STEPS = 267_735, 4


def peak():
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def run():
    args, _ = main.parse_args(COMMAND.split() + sys.argv[1:])
    keep_freed_memory()
    set_up_device(args.device, args.precision)
    torch.manual_seed(args.seed)
    params = new_params(Namespace(dictionary=Dictionary(map(str, range(WORDS)))), args)
    optimizer, objective = make_optimizer(params, args), make_objective(params, args)
    print(f"{sum(p.numel() for p in params.parameters()):,} parameters, splits {params[1].splits}, "
          f"batch_size {args.batch_size}, bptt {args.bptt}, {torch.get_num_threads()} threads; "
          f"{peak()}", flush=True)
    lengths = [args.bptt] * STEPS + [args.bptt + MAX_EXCESS]
    ids = zipf(WORDS, (args.batch_size * (sum(lengths) + 1),)).int()
    text, row = batchify(ids, args.batch_size, args), 0
    hidden = params[0].init_hidden(args.batch_size)
    params.train()
    for length in lengths:
        begin = time.perf_counter()
        data, targets = get_batch(text, row, args, seq_len=length)
        loss, hidden = train_step(objective, optimizer, data, targets, hidden, args)
        loss, seconds = loss.item(), time.perf_counter() - begin
        speed = f"{seconds:.2f} s, {len(targets) / seconds:.0f} tokens/s"
        print(f"a step of {length} x {args.batch_size} tokens: {speed}, loss {loss:.2f}, {peak()}",
              flush=True)
        row += length


if __name__ == "__main__":
    run()
