"""Data-parallel training: torchrun starts a process (a rank) a device, each with some columns.

    torchrun --nproc_per_node=2 main.py --data data/penn --batch_size 20

The ranks see the same windows of the text; torch's DistributedDataParallel averages their gradients
in the backward pass, so that all make the same step. What the hosts must agree on (a signal, a
loss that decides something, the time to save) goes over gloo, beside the devices. In a process
that torchrun did not start all of this does nothing: there is one rank, and it is the first.
"""

import contextlib
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import InputError


class RankLost(Exception):
    """Another process of this run is gone; the message is one line."""


def is_distributed():
    """Whether torchrun started this process, be it the only one."""
    return "RANK" in os.environ


def size():
    """The number of ranks."""
    return int(os.environ.get("WORLD_SIZE", 1)) if is_distributed() else 1


def rank():
    """The number of this one, from 0."""
    return int(os.environ.get("RANK", 0))


def launcher():
    """How a command is started with as many ranks as this one: "python", or torchrun's."""
    if not is_distributed():
        return "python"
    return f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', size())}"


def is_first():
    """Whether this is the rank that writes files and log lines."""
    return rank() == 0


def speaks(error=None):
    """Whether this rank reports an error: not one that another has reported.

    Before the ranks are connected every one finds the same; the first on each machine reports it.
    """
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    return size() == 1 or not getattr(error, "reported", not first_here)


def let_another_speak():
    """Waits, in a rank that leaves an error to another to report, until torchrun ends all.

    Were it the first to end, torchrun could end the other before it has reported.
    """
    time.sleep(10)


def own_device(device, asked_for):
    """The device of this rank, given that of the run; raises InputError where there is none."""
    if not is_distributed() or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InputError(f"--device {device}: one process only; leave torchrun out")
    if asked_for and device.index is not None:
        raise InputError(f"--device {device}: under torchrun each process has its own; say cuda")
    number, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= found:
        raise InputError(f"--nproc_per_node: this machine has {found} CUDA devices; lower it")
    return torch.device("cuda", number)


def connect(device):
    """Connects the ranks; returns the store through which they met. Raises InputError."""
    store, _, _ = next(dist.rendezvous("env://"))
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if on_cuda else "gloo", store=store, rank=rank(), world_size=size(),
            device_id=device if on_cuda else None,
        )
        group.hosts = dist.new_group(backend="gloo")
    except RuntimeError as error:
        raise InputError(
            f"rank {rank()} cannot connect to the others: {' '.join(str(error).split())}"
        ) from None
    return store


@contextlib.contextmanager
def group(device, again):
    """The ranks' connections, NCCL on CUDA and gloo elsewhere, while this is held.

    `again` returns the command that resumes the run. Raises RankLost when another rank has died.
    """
    if not is_distributed():
        yield
        return
    store = connect(device)
    try:
        yield
    except (InputError, OSError) as error:
        if is_first():
            store.set("error", str(error))
        error.reported = not is_first() and is_also_the_firsts(error, store)
        raise
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(
            word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Connection reset")
        )
        if not lost or size() == 1:
            raise
        raise RankLost(
            f"rank {rank()}: another process of this run is gone; the last state that was saved "
            f"stands, and {again()} goes on from there"
        ) from None
    else:  # after an error this could wait for ever for the others; the process ends anyway
        dist.destroy_process_group()


def is_also_the_firsts(error, store):
    """Whether the first rank has found this error too, within seconds."""
    try:
        store.wait(["error"], timedelta(seconds=5))
        return store.get("error").decode() == str(error)
    except RuntimeError:
        return False


def columns(count):
    """The slice of `count` columns that this rank has; as even as they can be divided."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def replicate(module):
    """`module` with its weights as the first rank's, and its gradients averaged over the ranks."""
    if not is_distributed():
        return module
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def mean(loss):
    """A loss, a tensor, averaged over the ranks; the host does not wait for it."""
    if is_distributed():
        dist.all_reduce(loss)
        loss /= size()
    return loss


def total(tensor):
    """A tensor, summed over the ranks."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def agree(*numbers):
    """The largest of the ranks' numbers, whole ones, at each place: a list, the same on all."""
    if not is_distributed():
        return list(numbers)
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group.hosts)
    return largest.tolist()


def first(value):
    """The first rank's value, any object, on all of them."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, group.hosts)
    return values[0]


def on_first(function, *args):
    """What `function` returns, or the InputError it raises, called on the first rank alone."""
    result = error = None
    if is_first():
        try:
            result = function(*args)
        except (InputError, OSError) as raised:
            error = InputError(str(raised))
    result, error = first((result, error))
    if error is not None:
        raise error
    return result


def everyones(value):
    """The values of all ranks, any objects, in a list."""
    if not is_distributed():
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value, group.hosts)
    return values
