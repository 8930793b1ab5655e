"""Locked dropout: one mask for all time steps, another for each column."""

import math

import pytest
import torch

from locked_dropout import LockedDropout


def test_one_mask_for_all_time_steps():
    x = torch.randn(9, 300, 200, requires_grad=True)
    dropout = LockedDropout()
    y = dropout(x, 0.4)
    dropped = (y == 0)[0]
    assert dropped.double().mean() == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / 60000))
    assert dropped.any(dim=0).all() and not dropped.all(dim=0).any()  # each column has its own
    torch.testing.assert_close(y, x * ~dropped / 0.6)
    y.sum().backward()
    assert torch.equal(x.grad == 0, dropped.expand_as(x))
    assert dropout(x, 0) is x
    assert dropout.eval()(x, 0.4) is x
