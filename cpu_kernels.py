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


def has_bf16_products():
    """Whether the processor multiplies bfloat16; oneDNN itself emulates it on any AVX-512."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def has_onednn(tensor):
    """Whether torch's oneDNN products, which take packed weights, accept `tensor`."""
    has_dtype = tensor.dtype == torch.float32
    has_dtype |= tensor.dtype == torch.bfloat16 and has_bf16_products()
    return (
        tensor.device.type == "cpu" and has_dtype
        and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    )


def to_bf16(x):
    """x [N, K] in bfloat16, with columns of zeros up to a multiple of 32.

    So each row begins where a line of the processor's cache does, and products are faster.
    """
    if x.dtype == torch.bfloat16:
        return x
    padded = x.new_zeros(len(x), -(-x.size(1) // 32) * 32, dtype=torch.bfloat16)
    padded[:, : x.size(1)] = x
    return padded


class Packed:
    """A matrix [N, K] packed once for many products: `Packed(w, rows)(x)` is x [rows, K] @ w.T.

    oneDNN packs a matrix into the order in which the processor reads it. With `bf16` the factors
    are rounded to bfloat16, and so is their product; biases are added in float32.
    """

    def __init__(self, weight, rows, bf16=False):
        self.bf16 = bf16
        weight = to_bf16(weight) if bf16 else weight
        self.onednn = has_onednn(weight)
        self.weight = weight.t()
        if self.onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, x, bias=None):
        """x [rows, K] @ w.T (+ bias [N]) -> [rows, N]."""
        if self.bf16:
            result = self.multiply(to_bf16(x))
            return result.float() if bias is None else result + bias
        if self.onednn:
            return self.multiply(x, bias)
        return x @ self.weight if bias is None else torch.addmm(bias, x, self.weight)

    def multiply(self, x, bias=None):
        if not self.onednn:
            return x @ self.weight
        if bias is not None:
            bias = bias.contiguous()  # the kernel assumes it
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")

    def add(self, x, to):
        """to [rows, N] + x [rows, K] @ w.T, a new tensor."""
        if self.bf16:
            return to + self.multiply(to_bf16(x))
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise.binary(x, to, self.weight, None, "add")
        return torch.addmm(to, x, self.weight)


def product(x, weight, bias=None, bf16=False):
    """x [M, K] @ weight [N, K].T (+ bias [N]) -> [M, N]."""
    return Packed(weight, len(x), bf16)(x, bias)


def weight_gradient(d_y, x, weight, bf16=False):
    """d_y [M, N].T @ x [M, K] -> [N, K], the gradient of weight [N, K] in y = x @ weight.T."""
    if not bf16:
        return product(d_y.t(), x.t())
    rows, columns = weight.shape
    return (to_bf16(d_y).t() @ to_bf16(x))[:rows, :columns].float()


# ------------------------------------------------------------ recurrent layers

sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


def has_recurrent_layer(module, x, bf16):
    """Whether `recurrent_layer` computes `module`: on a CPU a GRU, and with `bf16` an LSTM too."""
    return (
        x.device.type == "cpu" and module.num_layers == 1 and module.bias
        and not module.batch_first
        and (bf16 or isinstance(module, nn.GRU) and not module.bidirectional)
    )


def recurrent_layer(x, state, weights, bf16):
    """A layer of an LSTM, or of a GRU, in one or both directions, as torch.lstm and torch.gru.

    x [T, B, I]; state (h, c) or h, each [directions, B, H]; weights, those of one direction after
    the other -> (all h [T, B, directions * H], the last state).
    """
    is_lstm = isinstance(state, tuple)
    states = state if is_lstm else (state,)
    outputs, last = [], []
    for direction in range(len(states[0])):
        own = weights[4 * direction : 4 * direction + 4]
        begin = [s[direction] for s in states]
        inputs = x.flip(0) if direction else x
        hs, *end = RecurrentLayer.apply(bf16, inputs, *own, *begin)
        outputs.append(hs.flip(0) if direction else hs)
        last.append(end)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    last = tuple(torch.stack(s) for s in zip(*last))
    return output, last if is_lstm else last[0]


class RecurrentLayer(torch.autograd.Function):
    """One direction of an LSTM or GRU layer over all time steps.

    The input's products are one large product for all time steps, the recurrent ones share a packed
    matrix. With `bf16` all products are of factors in bfloat16, and all else is in float32.
    """

    @staticmethod
    def forward(ctx, bf16, x, w_ih, w_hh, b_ih, b_hh, h0, c0=None):
        """x [T, B, I], h0 and an LSTM's c0 [B, H] -> all h [T, B, H], the last h (and c)."""
        steps, rows, _ = x.shape
        ctx.bf16, ctx.cell = bf16, GRUSteps if c0 is None else LSTMSteps
        gates = product(x.flatten(0, 1), w_ih, b_ih, bf16).view(steps, rows, -1)
        recurrent = Packed(w_hh, rows, bf16)
        hs = x.new_empty(steps + 1, rows, w_hh.size(1))
        hs[0] = h0
        kept = ctx.cell.make_kept(hs, c0)
        cell = ctx.cell(gates, hs, kept)
        for t, h in enumerate(hs[:-1]):
            cell.forward(t, recurrent(h, b_hh))
        ctx.save_for_backward(x, w_ih, w_hh, gates, hs, kept)
        last = [hs[-1].clone()] if c0 is None else [hs[-1].clone(), kept[0, -1].clone()]
        return hs[1:], *last

    @staticmethod
    @once_differentiable
    def backward(ctx, d_hs, d_h, d_c=None):
        x, w_ih, w_hh, gates, hs, kept = ctx.saved_tensors
        steps, rows, size = d_hs.shape
        cell = ctx.cell(gates, hs, kept)
        recurrent = Packed(w_hh.t(), rows, ctx.bf16)
        d_h = d_h + d_hs[-1]
        d_gates = torch.empty_like(gates)  # of what h adds to the gates
        for t in range(steps - 1, -1, -1):
            d_before, d_c = cell.backward(t, d_h, d_c, d_gates[t])
            if t:
                d_before = d_before + d_hs[t - 1]
            d_h = recurrent.add(d_gates[t], d_before)
        d_gates = d_gates.flatten(0, 1)
        d_b_hh = d_gates.sum(0)
        d_w_hh = weight_gradient(d_gates, hs[:-1].flatten(0, 1), w_hh, ctx.bf16)
        cell.turn_into_gradients_of_x(d_gates)
        d_x = product(d_gates, w_ih.t(), bf16=ctx.bf16).view_as(x)
        d_w_ih = weight_gradient(d_gates, x.flatten(0, 1), w_ih, ctx.bf16)
        return None, d_x, d_w_ih, d_w_hh, d_gates.sum(0), d_b_hh, d_h, d_c


class GRUSteps:
    """The element-wise part of a GRU, step by step. Its gates are r, z, n, as nn.GRU's.

    gates [T, B, 3H]: at first what x adds to them; hs [T + 1, B, H];
    hidden_n [T, B, H]: what h adds to n, before r scales it.
    """

    @staticmethod
    def make_kept(hs, c0):
        return torch.empty_like(hs[1:])

    def __init__(self, gates, hs, hidden_n):
        self.size = hs.size(2)
        self.rz = gates[..., : 2 * self.size].unbind()
        self.r, self.z, self.n = (gate.unbind() for gate in gates.split(self.size, 2))
        self.h, self.hidden_n = hs.unbind(), hidden_n.unbind()
        self.d_n = [None] * len(hidden_n)

    def forward(self, t, from_h):
        """Computes the gates and h of step t; from_h [B, 3H] is what the h before adds."""
        r, z, n, hidden_n = self.r[t], self.z[t], self.n[t], self.hidden_n[t]
        self.rz[t].add_(from_h[:, : 2 * self.size]).sigmoid_()
        hidden_n.copy_(from_h[:, 2 * self.size :])
        n.addcmul_(r, hidden_n).tanh_()
        torch.lerp(n, self.h[t], z, out=self.h[t + 1])

    def backward(self, t, d_h, d_c, d_gates):
        """Fills d_gates [B, 3H]; returns the gradient of the h before, but through the gates."""
        r, z, n, hidden_n = self.r[t], self.z[t], self.n[t], self.hidden_n[t]
        d_r, d_z, d_hidden_n = d_gates.split(self.size, 1)
        to_n = (1 - z) * (1 - n * n)
        torch.mul(to_n * (hidden_n * r * (1 - r)), d_h, out=d_r)
        torch.mul((self.h[t] - n) * (z * (1 - z)), d_h, out=d_z)
        torch.mul(to_n * r, d_h, out=d_hidden_n)
        self.d_n[t] = to_n * d_h
        return z * d_h, None

    def turn_into_gradients_of_x(self, d_gates):
        """What x adds to n is not scaled by r. d_gates [T * B, 3H]"""
        d_gates[:, 2 * self.size :] = torch.cat(self.d_n)


class LSTMSteps:
    """The element-wise part of an LSTM, step by step. Its gates are i, f, g, o, as nn.LSTM's.

    gates [T, B, 4H]: at first what x adds to them; hs [T + 1, B, H];
    cs [2, T + 1, B, H]: c and tanh(c).
    """

    @staticmethod
    def make_kept(hs, c0):
        cs = hs.new_empty(2, *hs.shape)
        cs[0, 0] = c0
        return cs

    def __init__(self, gates, hs, cs):
        self.size = hs.size(2)
        self.gates = gates.unbind()
        self.i_f = gates[..., : 2 * self.size].unbind()
        self.i, self.f, self.g, self.o = (gate.unbind() for gate in gates.split(self.size, 2))
        self.h, self.c, self.tanh_c = hs.unbind(), cs[0].unbind(), cs[1].unbind()

    def forward(self, t, from_h):
        """Computes the gates, c and h of step t; from_h [B, 4H] is what the h before adds."""
        self.gates[t].add_(from_h)
        self.i_f[t].sigmoid_()
        g, o = self.g[t].tanh_(), self.o[t].sigmoid_()
        c = torch.mul(self.f[t], self.c[t], out=self.c[t + 1]).addcmul_(self.i[t], g)
        torch.mul(o, torch.tanh(c, out=self.tanh_c[t + 1]), out=self.h[t + 1])

    def backward(self, t, d_h, d_c, d_gates):
        """Fills d_gates [B, 4H]; returns the gradients of the h before, but through the gates,
        and of the c before."""
        i, f, g, o, tanh_c = self.i[t], self.f[t], self.g[t], self.o[t], self.tanh_c[t + 1]
        d_i, d_f, d_g, d_o = d_gates.split(self.size, 1)
        d_c = d_c + tanh_backward(d_h * o, tanh_c)
        sigmoid_backward(d_h * tanh_c, o, grad_input=d_o)
        sigmoid_backward(d_c * g, i, grad_input=d_i)
        sigmoid_backward(d_c * self.c[t], f, grad_input=d_f)
        tanh_backward(d_c * i, g, grad_input=d_g)
        return torch.zeros_like(d_h), d_c * f

    def turn_into_gradients_of_x(self, d_gates):
        """What x and h add to the gates is added up."""


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
