"""A GRU layer made fast on a CPU.

torch computes an LSTM layer on the CPU with oneDNN, a GRU layer operation by operation, so there
the GRU, with three quarters of the products, is the slower. Here two thirds of its products have
all time steps in one large matrix; the recurrent ones use a packed matrix; and
all that is element-wise and need not wait for the step before is done for all steps at once.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from products import Packed, product


class GRUFunction(torch.autograd.Function):
    """One layer over all time steps, as nn.GRU defines it: gates r, z, n in this order."""

    @staticmethod
    def forward(ctx, x, h0, w_ih, w_hh, b_ih, b_hh):
        """x [T, B, I], h0 [B, H] -> all h [T, B, H], the last h."""
        steps, rows, _ = x.shape
        size = w_hh.size(1)
        recurrent = Packed(w_hh, rows)
        gates = product(x.flatten(0, 1), w_ih, b_ih).view(steps, rows, 3 * size)
        hs = x.new_empty(steps + 1, rows, size)
        hidden_n = x.new_empty(steps, rows, size)  # what h adds to n, before r scales it
        hs[0] = h0
        r, z, n = gates.view(steps, rows, 3, size).unbind(2)
        h = hs[0]
        for rz_t, r_t, z_t, n_t, hidden_n_t, h_next in zip(
            gates[..., : 2 * size], r, z, n, hidden_n, hs[1:]
        ):
            from_h = recurrent(h, b_hh)
            rz_t.add_(from_h[:, : 2 * size]).sigmoid_()
            hidden_n_t.copy_(from_h[:, 2 * size :])
            n_t.addcmul_(r_t, hidden_n_t).tanh_()
            h = torch.lerp(n_t, h, z_t, out=h_next)
        ctx.save_for_backward(x, w_ih, w_hh, gates, hs, hidden_n)
        return hs[1:], h.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_hs, d_h):
        x, w_ih, w_hh, gates, hs, hidden_n = ctx.saved_tensors
        steps, rows, size = hidden_n.shape
        r, z, n = gates.view(steps, rows, 3, size).unbind(2)
        # The gradients of what enters the gates from h are that of h times these:
        factors = torch.empty_like(gates).view(steps, rows, 3, size)
        to_n = (1 - z) * (1 - n * n)
        torch.mul(to_n, hidden_n * r * (1 - r), out=factors[:, :, 0])
        torch.mul(hs[:-1] - n, z * (1 - z), out=factors[:, :, 1])
        torch.mul(to_n, r, out=factors[:, :, 2])
        recurrent = Packed(w_hh.t(), rows)
        d_gates_h = factors  # overwritten step by step
        d_h = d_h + d_hs[-1]
        for t in range(steps - 1, -1, -1):
            d_gates_h[t].mul_(d_h.unsqueeze(1))
            to_n[t].mul_(d_h)
            passed_on = z[t] * d_h
            if t:
                passed_on += d_hs[t - 1]
            d_h = recurrent.add(d_gates_h[t].view(rows, 3 * size), passed_on)
        d_w_hh = product_of_transposed(d_gates_h.view(-1, 3 * size), hs[:-1].flatten(0, 1))
        d_b_hh = d_gates_h.view(-1, 3 * size).sum(0)
        d_gates_h[:, :, 2] = to_n  # what enters n from x is not scaled by r
        d_x, d_w_ih, d_b_ih = gradients(d_gates_h, x, w_ih)
        return d_x, d_h, d_w_ih, d_w_hh, d_b_ih, d_b_hh


def gradients(d_gates, x, weight):
    """The gradients of x, weight and bias in gates = x @ weight.T + bias, all steps at once."""
    d_gates = d_gates.view(-1, len(weight))
    d_x = product(d_gates, weight.t()).view_as(x)
    return d_x, product_of_transposed(d_gates, x.flatten(0, 1)), d_gates.sum(0)


def product_of_transposed(a, b):
    """a [N, P].T @ b [N, Q]: [P, Q]."""
    return product(a.t(), b.t())


def is_fast_gru(module, x):
    """Whether `fast_gru` computes what `module` does with x: float32 or float64 on a CPU."""
    return (
        isinstance(module, nn.GRU) and x.device.type == "cpu" and x.dtype != torch.bfloat16
        and module.num_layers == 1 and module.bias
        and not (module.bidirectional or module.batch_first)
    )


def fast_gru(x, state, *weights):
    """x [T, B, I], state [1, B, H], an nn.GRU's weights -> all h [T, B, H], the last [1, B, H]."""
    output, h = GRUFunction.apply(x, state[0], *weights)
    return output, h.unsqueeze(0)
