"""Causal attention over the earlier states of the top layer.

Salton, Ross and Kelleher 2017, "Attentive Language Models" (I17-1045), and Mei, Bansal and Walter
2017 (1611.06997).
"""

import torch
from torch import nn

KINDS = ("none", "single", "combined")


class Attention(nn.Module):
    """Joins each state h_t with a mean of the `window` states before it, weighted by a score.

        score_i = v . tanh(W_s h_i)               kind "single": from the earlier state only
        score_i = v . tanh(W_s h_i + W_q h_t)     kind "combined": from both states
        a = softmax(score) over t - window <= i < t
        c_t = sum_i a_i h_i
        h'_t = tanh(W_c [h_t; c_t] + b)

    h'_t replaces h_t as the input of the tied decoder. If there is no earlier state, c_t is 0. The
    part of W_c that multiplies h_t is initialized as the identity, and b as 0: with small random
    values the states, small at first, would shrink further, and the model would learn little (see
    records/attention). `size` is the size of a state. Raises ValueError for an unknown kind.
    """

    def __init__(self, size, kind, window):
        super().__init__()
        if kind not in KINDS[1:]:
            raise ValueError(f"attention {kind} is unknown; choose from {', '.join(KINDS[1:])}")
        self.window = window
        self.earlier = nn.Linear(size, size, bias=False)  # W_s
        self.current = nn.Linear(size, size, bias=False) if kind == "combined" else None  # W_q
        self.score = nn.Linear(size, 1, bias=False)  # v
        self.join = nn.Linear(2 * size, size)  # W_c, b
        nn.init.eye_(self.join.weight.data[:, :size])
        nn.init.zeros_(self.join.bias)

    def forward(self, states, memory):
        """states [T, B, H], memory [M, B, H] (the M <= window states before them, detached).

        Returns h' [T, B, H] and the memory for the next call: the last `window` states, detached.
        """
        steps = len(states)
        window = min(self.window, len(memory) + steps)  # shorter at the start of a text
        missing = window - len(memory)
        padding = states.new_zeros(missing, *states.shape[1:])
        past = torch.cat([padding, memory, states])  # [window + T, B, H]; h_t is past[window + t]
        keys = self.earlier(past)
        if self.current is None:
            scores = self.score(keys.tanh()).squeeze(-1).unfold(0, window, 1)[:steps]
        else:
            keys = keys.unfold(0, window, 1)[:steps]  # [T, B, H, window], a view
            energies = (keys + self.current(states).unsqueeze(-1)).tanh()
            scores = torch.einsum("tbhw,h->tbw", energies, self.score.weight.squeeze(0))
        # scores [T, B, window]: the i-th at t is for past[t + i], which is padding below `missing`.
        index = torch.arange(steps, device=states.device).unsqueeze(1)
        index = (index + torch.arange(window, device=states.device)).unsqueeze(1)  # [T, 1, window]
        exists = index >= missing
        weights = scores.masked_fill(~exists, torch.finfo(scores.dtype).min).softmax(-1) * exists
        # Expand the band to a matrix [T, window + T] per column, so that the sum is a product.
        band = weights.new_zeros(*weights.shape[:2], len(past))
        band = band.scatter(2, index.expand_as(weights), weights)
        context = torch.einsum("tbi,ibh->tbh", band, past)
        joined = self.join(torch.cat([states, context], -1)).tanh()
        return joined, past[max(missing, len(past) - self.window) :].detach()
