"""Weight drop: DropConnect on the hidden-to-hidden matrices of a recurrent layer.

Wan et al. 2013; section 2 of Merity et al. 2017 (1708.02182).
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F


def drop_weight(weight, dropout, variational=False):
    """A copy of `weight` with elements zeroed at rate `dropout`, the rest over (1 - dropout).

    With `variational`, whole rows are dropped. On the CPU the rate is rounded to 1/65536.
    """
    if variational:
        return weight * F.dropout(weight.new_ones(weight.size(0), 1), dropout)
    if weight.device.type != "cpu":
        return F.dropout(weight, dropout)
    # Drawing a float for each element costs more than the rest of this function tenfold. An int64
    # holds four 16-bit draws. (-2**63, None) is the full range: plain random_() never sets the
    # top bit, which would bias every fourth draw.
    draws = torch.empty((weight.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    draws = draws.view(torch.int16)[: weight.numel()].view_as(weight)
    dropped = min(round(dropout * 65536), 65535)  # of the 65,536 values a draw can take
    return torch.where(draws >= dropped - 32768, weight * (65536 / (65536 - dropped)), 0.0)


class WeightDrop(nn.Module):
    """Wraps `module` so that the parameters named in `weights` are dropped at each call.

    One mask a forward pass, the same at every time step. The raw parameters stay where they are,
    in `module`, under their own names: they are what is trained, averaged and saved. In
    evaluation, or with `dropout` 0, `module` is called as it is.

    `WeightDrop(nn.LSTM(10, 10), ["weight_hh_l0"], dropout=0.5)` is AWD-LSTM's layer.
    """

    def __init__(self, module, weights, dropout=0, variational=False):
        super().__init__()
        self.module = module
        self.weights = list(weights)
        self.dropout = dropout
        self.variational = variational

    def extra_repr(self):
        return f"weights={self.weights}, dropout={self.dropout}, variational={self.variational}"

    def forward(self, *args):
        if not self.training or not self.dropout:
            return self.module(*args)
        dropped = {
            name: drop_weight(getattr(self.module, name), self.dropout, self.variational)
            for name in self.weights
        }
        try:
            # The call sees the dropped weights as its parameters. nn.RNNBase notices the swap and
            # re-reads the flat list that its kernel gets; assigning to the attribute of a version
            # that does not would leave the kernel on the raw weights: no dropout, no error.
            return functional_call(self.module, dropped, args)
        finally:
            # nn.RNNBase would keep the dropped weights, and their graph, alive in that list until
            # its next call; assigning the parameters again puts them back into it.
            for name in self.weights:
                setattr(self.module, name, getattr(self.module, name))
