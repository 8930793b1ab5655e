"""Times a step of the published QRNN on a CPU, its element-wise part, and a step of the LSTM.

    PYTHONPATH=. python records/qrnn/share.py

The two models are those of the published Penn Treebank commands, with random words. Their steps
alternate, so that a noisy machine disturbs both alike; medians of 9 are printed, as shares of the
QRNN's step. The element-wise part is the gates and the recurrence: torch_forward and
torch_backward.
"""

from statistics import median
from time import perf_counter

import torch

import bench
import qrnn

QRNN = "--model QRNN --nhid 1550 --nlayers 4 --clip 0.2 --wdrop 0.1 --dropouth 0.3".split()
spent = 0.0


def timed(function):
    """`function`, whose time is added to `spent`."""

    def call(*args):
        global spent
        begin = perf_counter()
        result = function(*args)
        spent += perf_counter() - begin
        return result

    return call


qrnn.torch_forward, qrnn.torch_backward = timed(qrnn.torch_forward), timed(qrnn.torch_backward)
steps = []
for flags in (QRNN, []):
    params, tasks = bench.make_tasks(bench.our_side, bench.parse_args(["--device", "cpu", *flags]))
    print(f"{params[0].rnn_type}: {sum(p.numel() for p in params.parameters()):,} parameters")
    steps.append(tasks["step"])
shares, ratios = [], []
for number in range(11):
    seconds = []
    for step in steps:
        spent, begin = 0.0, perf_counter()
        step()
        seconds.append(perf_counter() - begin)
        if step is steps[0]:
            share = spent / seconds[0]
    if number > 1:
        shares.append(share)
        ratios.append(seconds[1] / seconds[0])
print(f"{torch.get_num_threads()} threads; element-wise part {median(shares):.3f} "
      f"({min(shares):.3f} to {max(shares):.3f})")
print(f"the LSTM's step {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
