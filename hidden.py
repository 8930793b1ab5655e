"""Hidden states: a tensor [directions, B, H] a layer, in nested lists and tuples; None for none."""

import torch


def repackage_hidden(h):
    """Detaches a hidden state, a tensor or nested tuples and lists of them, from its history."""
    if isinstance(h, torch.Tensor):
        return h.detach()
    return tuple(repackage_hidden(v) for v in h)


def copy_hidden(hidden, device=None):
    """A detached copy of a hidden state, nested tuples and lists of tensors or None."""
    if hidden is None:
        return None
    if isinstance(hidden, torch.Tensor):
        return hidden.detach().to(device or hidden.device, copy=True)
    return [copy_hidden(part, device) for part in hidden]


def join_hidden(parts):
    """One hidden state of the ranks' parts, each with some of the columns."""
    if parts[0] is None or len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, dim=1)
    return [join_hidden(part) for part in zip(*parts)]


def own_hidden(hidden, columns):
    """The part of a hidden state that belongs to a slice of the columns."""
    if hidden is None:
        return None
    if isinstance(hidden, torch.Tensor):
        return hidden[:, columns].contiguous()
    return [own_hidden(part, columns) for part in hidden]


def shapes(hidden):
    """The shapes [B, H] in a hidden state, nested as it is; None for None."""
    if hidden is None or isinstance(hidden, torch.Tensor):
        return hidden if hidden is None else list(hidden.shape[1:])
    return [shapes(part) for part in hidden]
