"""Data-parallel training: torchrun starts one process (rank) per device.

    torchrun --nproc_per_node=2 main.py --data data/penn --batch_size 20

Each rank has some of the batch's columns and reads windows of the same lengths. The gradients are
averaged, so all ranks take the same step. Without torchrun there is one rank.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP


def is_distributed():
    """Whether torchrun started this process, even if it is the only one."""
    return dist.is_torchelastic_launched()


def size():
    """The number of ranks."""
    return int(os.environ["WORLD_SIZE"]) if is_distributed() else 1


def rank():
    """The number of this rank, from 0."""
    return int(os.environ["RANK"]) if is_distributed() else 0


def is_first():
    """Whether this is the rank that writes files and log lines."""
    return rank() == 0


def launcher():
    """The start of a command line that launches as many processes as this run has."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", size())
    return f"torchrun --nproc_per_node={processes}" if is_distributed() else "python"


@contextlib.contextmanager
def process_group(device):
    """Connects the ranks: with NCCL for CUDA tensors, with gloo for CPU tensors."""
    if not is_distributed():
        yield
        return
    backend, gpu = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    try:
        dist.init_process_group(backend, device_id=gpu)
    except RuntimeError as error:  # gloo has no error type of its own
        raise dist.DistError(str(error)) from None
    yield
    dist.destroy_process_group()  # skipped after an error: it would wait for the other ranks


def columns(count):
    """This rank's slice of `count` columns, which are divided as evenly as possible."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def replicate(module):
    """`module` with the first rank's weights and with gradients averaged over the ranks."""
    return DDP(module, gradient_as_bucket_view=True) if is_distributed() else module


def mean(loss):
    """Averages a loss, a tensor, over the ranks in place; the host does not wait for it."""
    return total(loss).div_(size())


def total(tensor):
    """Sums a tensor over the ranks in place, and returns it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def largest(*numbers):
    """The maximum of each of `numbers`, integers, over the ranks; a list on the host."""
    maxima = torch.tensor(numbers)
    if is_distributed():
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
    return maxima.tolist()


def all_gather(value):
    """The list of all ranks' `value`, any objects."""
    values = [value] * size()
    if is_distributed():
        dist.all_gather_object(values, value)
    return values


def broadcast(value):
    """The first rank's `value`, any object. Returns only after all ranks have called it."""
    return all_gather(value)[0]
