"""Recurrent layers step by step, with weights that are packed once: for words that come one by one.

nn.LSTM on a CPU packs its weights anew at each call, which for a single word takes longer than the
word. These are what `RNNModel.read` takes in place of its layers; they are for evaluation, without
gradients, and do not see a later change of the weights.
"""

import torch
from torch import nn

from products import Packed


class Cell:
    """A layer, nn.LSTM or nn.GRU of one direction: x [T, 1, I], state -> (h [T, 1, H], state)."""

    def __init__(self, layer):
        if layer.num_layers != 1 or layer.bidirectional:
            raise ValueError("a cell is of one layer and one direction")
        self.is_lstm = isinstance(layer, nn.LSTM)
        self.from_x, self.from_h = Packed(layer.weight_ih_l0, 1), Packed(layer.weight_hh_l0, 1)
        self.bias_x, self.bias_h = layer.bias_ih_l0, layer.bias_hh_l0

    def __call__(self, x, state):
        outputs = []
        h, c = (state[0][0], state[1][0]) if self.is_lstm else (state[0], None)  # [1, H]
        for x_t in x:
            from_x, from_h = self.from_x(x_t, self.bias_x), self.from_h(h, self.bias_h)
            if self.is_lstm:
                i, f, g, o = (from_x + from_h).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, 1), from_h.chunk(3, 1)
                n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
                h = torch.lerp(n, h, (x_z + h_z).sigmoid())
            outputs.append(h)
        state = (h.unsqueeze(0), c.unsqueeze(0)) if self.is_lstm else h.unsqueeze(0)
        return torch.stack(outputs), state
