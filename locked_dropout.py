"""Locked (variational) dropout: one mask for all time steps.

Gal and Ghahramani 2016 (1512.05287); section 4.2 of Merity et al. 2017 (1708.02182).
"""

from torch import nn


class LockedDropout(nn.Module):
    """Drops features of a sequence: a dropped feature is zero at all time steps."""

    def forward(self, x, dropout=0.5):
        """x [T, B, H] -> x * mask [1, B, H], with kept features scaled by 1 / (1 - dropout).

        Returns x in evaluation or if `dropout` is 0.
        """
        if not self.training or not dropout:
            return x
        mask = x.new_empty(1, x.size(1), x.size(2)).bernoulli_(1 - dropout).div_(1 - dropout)
        return x * mask
