"""Data-parallel training: torchrun starts one process (rank) per device, each with some columns.

    torchrun --nproc_per_node=2 main.py --data data/penn --batch_size 20

All ranks read the same windows of the text; DistributedDataParallel averages their gradients, so
all take the same step. A process that torchrun did not start is the only rank, and nothing is
exchanged.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def is_distributed():
    """Whether torchrun started this process, be it the only one."""
    return "RANK" in os.environ


def size():
    """The number of ranks."""
    return int(os.environ["WORLD_SIZE"]) if is_distributed() else 1


def rank():
    """The number of this rank, from 0."""
    return int(os.environ.get("RANK", 0))


def is_first():
    """Whether this is the rank that writes files and log lines."""
    return rank() == 0


def launcher():
    """What starts a command in the way this process was started: "python", or torchrun."""
    if not is_distributed():
        return "python"
    return f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', size())}"


@contextlib.contextmanager
def process_group(device):
    """Connects the ranks while it is held: NCCL for CUDA tensors, gloo for those on the CPU."""
    if not is_distributed():
        yield
        return
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo", device_id=device if on_cuda else None
        )
    except RuntimeError as error:  # gloo's errors have no type of their own
        raise dist.DistError(str(error)) from None
    yield
    dist.destroy_process_group()  # not after an error: it would wait for the other ranks


def columns(count):
    """The slice of `count` columns that this rank has, as even as they can be divided."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def replicate(module):
    """`module` with the first rank's weights, whose gradients are averaged over the ranks."""
    if not is_distributed():
        return module
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def mean(loss):
    """A loss, a tensor, averaged over the ranks in place; the host does not wait for it."""
    return total(loss).div_(size()) if is_distributed() else loss


def total(tensor):
    """A tensor, summed over the ranks in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def largest(*numbers):
    """The largest of the ranks' numbers at each place; a list of whole numbers, on the host."""
    if not is_distributed():
        return list(numbers)
    found = torch.tensor(numbers)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def broadcast(value):
    """The first rank's value, any object."""
    values = [value]
    if is_distributed():
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
    return values[0]


def all_gather(value):
    """The values of all ranks, any objects, in a list."""
    values = [value] * size()
    if is_distributed():
        dist.all_gather_object(values, value)
    return values
