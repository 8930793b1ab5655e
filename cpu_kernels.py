"""What is fast on a CPU only: oneDNN's products, a GRU layer, layers step by step, memory kept.

Elsewhere (on a GPU, in float64, in a torch without oneDNN) the same functions compute the same with
torch's ordinary operations. The private parts of torch that the project uses are in this file.
"""

import ctypes
import os
import sys

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# ------------------------------------------------------------ matrix products


def has_onednn(tensor):
    """Whether torch's oneDNN products, which take packed weights, accept `tensor`."""
    return (
        tensor.device.type == "cpu" and tensor.dtype == torch.float32
        and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    )


class Packed:
    """A matrix [N, K] packed once for many products: `Packed(w, rows)(x)` is x [rows, K] @ w.T.

    oneDNN packs a matrix into the order in which the processor reads it.
    """

    def __init__(self, weight, rows):
        self.onednn = has_onednn(weight)
        self.weight = weight.t()
        if self.onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, x, bias=None):
        """x [rows, K] @ w.T (+ bias [N]) -> [rows, N]."""
        if self.onednn:
            if bias is not None:
                bias = bias.contiguous()  # the kernel assumes it
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
        return x @ self.weight if bias is None else torch.addmm(bias, x, self.weight)

    def add(self, x, to):
        """to [rows, N] + x [rows, K] @ w.T, a new tensor."""
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise.binary(x, to, self.weight, None, "add")
        return torch.addmm(to, x, self.weight)


def product(x, weight, bias=None):
    """x [M, K] @ weight [N, K].T (+ bias [N]) -> [M, N]."""
    return Packed(weight, len(x))(x, bias)


def product_of_transposed(a, b):
    """a [N, P].T @ b [N, Q] -> [P, Q]."""
    return product(a.t(), b.t())


# ------------------------------------------------------------ GRU


def has_fast_gru(module, x):
    """Whether `fast_gru` computes what `module` computes from x: float32 or float64 on a CPU."""
    return (
        isinstance(module, nn.GRU) and x.device.type == "cpu" and x.dtype != torch.bfloat16
        and module.num_layers == 1 and module.bias
        and not (module.bidirectional or module.batch_first)
    )


def fast_gru(x, state, *weights):
    """x [T, B, I], state [1, B, H], an nn.GRU's weights -> all h [T, B, H], the last [1, B, H]."""
    output, h = FastGRU.apply(x, state[0], *weights)
    return output, h.unsqueeze(0)


class FastGRU(torch.autograd.Function):
    """One GRU layer over all time steps; its gates are r, z, n in this order, as nn.GRU's.

    torch computes an LSTM layer on a CPU with oneDNN, but a GRU layer operation by operation. Here
    the input's products are one large product for all time steps, the recurrent ones share a packed
    matrix, and all element-wise work that need not wait for the step before is done at once.
    """

    @staticmethod
    def forward(ctx, x, h0, w_ih, w_hh, b_ih, b_hh):
        """x [T, B, I], h0 [B, H] -> all h [T, B, H], the last h [B, H]."""
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
        # The gradients of what h adds to the gates are the gradient of the next h times these:
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
        d_gates_h[:, :, 2] = to_n  # what x adds to n is not scaled by r
        d_gates_x = d_gates_h.view(-1, 3 * size)
        d_x = product(d_gates_x, w_ih.t()).view_as(x)
        d_w_ih = product_of_transposed(d_gates_x, x.flatten(0, 1))
        return d_x, d_h, d_w_ih, d_w_hh, d_gates_x.sum(0), d_b_hh


# ------------------------------------------------------------ one word at a time


class Cell:
    """An nn.LSTM or nn.GRU layer for words that come one by one: x [T, 1, I], state -> (h, state).

    nn.LSTM packs its weights anew at each call, which for a single word takes longer than the word.
    For evaluation only: no gradients, and later changes of the weights are not seen.
    """

    def __init__(self, layer):
        if layer.num_layers != 1 or layer.bidirectional:
            raise ValueError("a cell has one layer and one direction")
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


# ------------------------------------------------------------ memory


def keep_freed_memory():
    """Has glibc's malloc keep freed memory in this process; returns whether it does.

    A training step frees and allocates the same hundreds of megabytes again and again. By default
    glibc returns large blocks to Linux, which hands out zeroed pages: up to a tenth of a step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows, musl
        return False
    if sys.platform != "linux":
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    # 32 MiB is the highest mmap threshold. In one heap with all the others, larger blocks would
    # leave holes that are never filled (40% more memory for WikiText-2).
    settings = {mmap_threshold: 2**25, trim_threshold: 2**31 - 1, top_pad: 2**26}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def use_expandable_segments():
    """Has CUDA's allocator grow its segments, so that windows of random length do not fragment it.

    The public way, an environment variable, has to be set before torch is imported; a user's own
    setting stays.
    """
    if any(f"PYTORCH_{kind}ALLOC_CONF" in os.environ for kind in ("", "CUDA_", "HIP_")):
        return
    for name in ("_accelerator_setAllocatorSettings",
                 "_cuda_cudaCachingAllocator_set_allocator_settings"):  # newer, older torch
        if hasattr(torch._C, name):
            getattr(torch._C, name)("expandable_segments:True")
            return
