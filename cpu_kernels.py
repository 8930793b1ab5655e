"""CPU-specific code: oneDNN products, recurrent layers, word-by-word cells, memory allocation.

Without oneDNN (on a GPU, in float64, in some builds of torch) the same functions use torch's
ordinary operations. All private torch functions that the project uses are in this file, including a
setting of CUDA's allocator.
"""

import ctypes
import os

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# ------------------------------------------------------------ matrix products


def has_bf16_products():
    """Whether the processor multiplies bfloat16; oneDNN itself emulates it on any AVX-512."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def has_onednn(tensor):
    """Whether torch's oneDNN products, which take packed weights, accept `tensor`.

    A model that is exported must not depend on them.
    """
    has_dtype = tensor.dtype == torch.float32
    has_dtype |= tensor.dtype == torch.bfloat16 and has_bf16_products()
    return (
        tensor.device.type == "cpu" and has_dtype and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    )


class Packed:
    """A matrix [N, K] packed once for many products: `Packed(w, rows)(x)` is x [rows, K] @ w.T.

    oneDNN packs a matrix in the order in which the processor reads it. If w is in bfloat16, x and
    the product are rounded to bfloat16; the bias and the sum stay in float32.
    """

    def __init__(self, weight, rows, once=False):
        # Packing takes longer than one product of few rows.
        self.onednn = has_onednn(weight) and not (once and rows < 32)
        self.dtype = weight.dtype
        self.weight = weight.t()
        if self.onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, x, bias=None):
        """x [rows, K] @ w.T (+ bias [N]) -> [rows, N]."""
        if bias is not None and bias.dtype != self.dtype:
            return self(x).to(bias.dtype).add_(bias)
        x = x.to(self.dtype)
        if self.onednn:
            if bias is not None:
                bias = bias.contiguous()  # the kernel assumes it
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
        return x @ self.weight if bias is None else torch.addmm(bias, x, self.weight)


def product(x, weight, bias=None):
    """x [M, K] @ weight [N, K].T (+ bias [N]) -> [M, N]."""
    if weight.dtype == torch.bfloat16 and bias is None:
        return x @ weight.t()  # as fast as with a packed matrix
    return Packed(weight, x.size(0), once=True)(x, bias)


# ------------------------------------------------------------ recurrent layers

sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


def has_recurrent_layer(module, x, bf16):
    """Whether to use `recurrent_layer`: on a CPU for a GRU and, with `bf16`, for an LSTM."""
    return (
        x.device.type == "cpu" and (bf16 or isinstance(module, nn.GRU))
        and not torch.compiler.is_compiling()
        and module.num_layers == 1 and module.bias and not module.batch_first
    )


def recurrent_layer(x, state, weights, dtype):
    """What an LSTM or GRU of one layer, in one or two directions, computes.

    x [T, B, I]; state as the module's; weights of one direction, then of the other. The operands of
    matrix products are cast to `dtype`. Returns all h [T, B, directions * H] and the last state.
    """
    is_lstm = isinstance(state, tuple)
    states = state if is_lstm else (state,)
    outputs, last = [], []
    for direction, initial in enumerate(zip(*states)):
        own = weights[4 * direction : 4 * direction + 4]
        inputs = x.flip(0) if direction else x
        hs, *final = RecurrentLayer.apply(dtype, inputs, *own, *initial)
        outputs.append(hs.flip(0) if direction else hs)
        last.append(final)
    output = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
    last = tuple(torch.stack(states) for states in zip(*last))
    return output, last if is_lstm else last[0]


class RecurrentLayer(torch.autograd.Function):
    """One direction of an LSTM or GRU layer over all time steps.

    On a CPU torch computes a GRU operation by operation, and a bfloat16 LSTM with oneDNN, which
    also rounds h. Here only the operands of matrix products are cast to `dtype`. The products with
    x are one large product for all time steps; those with h share a packed matrix.
    """

    @staticmethod
    def forward(ctx, dtype, x, w_ih, w_hh, b_ih, b_hh, h0, c0=None):
        """x [T, B, I], h0 and an LSTM's c0 [B, H] -> all h [T, B, H], the last h (and c) [B, H]."""
        steps, rows, _ = x.shape
        size = w_hh.size(1)
        x, w_ih, w_hh = x.flatten(0, 1).to(dtype), w_ih.to(dtype), w_hh.to(dtype)
        bias_x, bias_h = (b_ih, b_hh) if c0 is None else (b_ih + b_hh, None)
        gates = product(x, w_ih, bias_x).view(steps, rows, -1)
        hs = h0.new_empty(steps + 1, rows, size)
        hs[0] = h0
        ctx.kind = GRUSteps if c0 is None else LSTMSteps
        kept = h0.new_empty(ctx.kind.KEPT, steps + 1, rows, size)
        if c0 is not None:
            kept[0, 0] = c0
        elementwise = ctx.kind(gates, hs, kept)
        recurrent = Packed(w_hh, rows)
        for t, h in enumerate(hs[:-1]):
            elementwise.forward(t, recurrent(h, bias_h))
        ctx.save_for_backward(x, w_ih, w_hh, gates, hs, kept)
        last = [hs[-1]] if c0 is None else [hs[-1], kept[0, -1]]
        return hs[1:], *(state.clone() for state in last)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_hs, d_h, d_c=None):
        x, w_ih, w_hh, gates, hs, kept = ctx.saved_tensors
        steps, rows, size = d_hs.shape
        elementwise = ctx.kind(gates, hs, kept)
        recurrent = Packed(w_hh.t(), rows)
        d_gates = torch.empty_like(gates[0])  # the gradients of what h adds to a step's gates
        factors = torch.empty_like(gates, dtype=x.dtype)  # those of all steps, rounded
        d_h = d_h + d_hs[-1]
        for t in range(steps - 1, -1, -1):
            d_before = d_hs[t - 1] if t else torch.zeros_like(d_h)
            d_before, d_c = elementwise.backward(t, d_h, d_c, d_before, d_gates)
            d_h = recurrent(factors[t].copy_(d_gates)) + d_before
        factors = factors.flatten(0, 1)
        transposed = factors.t().contiguous()
        d_w_hh = product(transposed, hs[:-1].flatten(0, 1).to(x.dtype).t())
        d_b_hh = d_b_ih = factors.sum(0, dtype=hs.dtype)
        if ctx.kind is GRUSteps:  # what x adds to n is not scaled by r
            factors[:, 2 * size :] = torch.cat(elementwise.d_n[::-1])
            transposed = factors.t().contiguous()
            d_b_ih = factors.sum(0, dtype=hs.dtype)
        d_x = product(factors, w_ih.t()).view(steps, rows, -1)
        d_w_ih = product(transposed, x.t())
        products = (gradient.to(hs.dtype) for gradient in (d_x, d_w_ih, d_w_hh))
        return None, *products, d_b_ih, d_b_hh, d_h, d_c


class GRUSteps:
    """The element-wise part of a GRU, step by step; the gates are r, z, n, in nn.GRU's order.

    gates [T, B, 3H]: at first what x adds to them; hs [T + 1, B, H]; kept [1, T + 1, B, H]: what h
    adds to n, before r scales it.
    """

    KEPT = 1  # the number of tensors in `kept`

    def __init__(self, gates, hs, kept):
        self.size = hs.size(2)
        self.rz = gates[..., : 2 * self.size].unbind()
        self.r, self.z, self.n = (gate.unbind() for gate in gates.split(self.size, 2))
        self.h, self.hidden_n = hs.unbind(), kept[0].unbind()
        self.d_n = []

    def forward(self, t, from_h):
        """Computes the gates of step t, and the h after it; from_h [B, 3H] is what h adds."""
        r, z, n, hidden_n = self.r[t], self.z[t], self.n[t], self.hidden_n[t]
        self.rz[t].add_(from_h[:, : 2 * self.size]).sigmoid_()
        hidden_n.copy_(from_h[:, 2 * self.size :])
        n.addcmul_(r, hidden_n).tanh_()
        torch.lerp(n, self.h[t], z, out=self.h[t + 1])

    def backward(self, t, d_h, d_c, d_before, d_gates):
        """Fills d_gates [B, 3H]; returns the gradients of the h and c before step t.

        d_h and d_c [B, H] are the gradients after step t; d_before is the gradient of the h before
        it as an output of the layer.
        """
        r, z, n, hidden_n = self.r[t], self.z[t], self.n[t], self.hidden_n[t]
        d_r, d_z, d_hidden_n = d_gates.split(self.size, 1)
        to_n = (1 - z) * (1 - n * n)
        torch.mul(to_n * (hidden_n * r * (1 - r)), d_h, out=d_r)
        torch.mul((self.h[t] - n) * (z * (1 - z)), d_h, out=d_z)
        torch.mul(to_n * r, d_h, out=d_hidden_n)
        self.d_n.append(to_n * d_h)
        return z * d_h + d_before, None


class LSTMSteps:
    """The element-wise part of an LSTM. Its gates are i, f, g, o in this order, as nn.LSTM's.

    gates [T, B, 4H]; hs [T + 1, B, H]; kept [2, T + 1, B, H]: c and tanh(c). See GRUSteps.
    """

    KEPT = 2

    def __init__(self, gates, hs, kept):
        self.size = hs.size(2)
        self.gates = gates.unbind()
        self.i, self.f, self.g, self.o = (gate.unbind() for gate in gates.split(self.size, 2))
        self.h, self.c, self.tanh_c = hs.unbind(), kept[0].unbind(), kept[1].unbind()

    def forward(self, t, from_h):
        i, f, g, o, tanh_c = self.i[t], self.f[t], self.g[t], self.o[t], self.tanh_c[t + 1]
        gates = self.gates[t].add_(from_h)
        # tanh(x) is 2 sigmoid(2x) - 1; torch's tanh takes five times as long as its sigmoid.
        g.mul_(2)
        gates.sigmoid_()
        g.mul_(2).sub_(1)
        c = torch.mul(f, self.c[t], out=self.c[t + 1]).addcmul_(i, g)
        torch.mul(c, 2, out=tanh_c).sigmoid_().mul_(2).sub_(1)
        torch.mul(o, tanh_c, out=self.h[t + 1])

    def backward(self, t, d_h, d_c, d_before, d_gates):
        i, f, g, o, tanh_c = self.i[t], self.f[t], self.g[t], self.o[t], self.tanh_c[t + 1]
        d_i, d_f, d_g, d_o = d_gates.split(self.size, 1)
        d_c = d_c + tanh_backward(d_h * o, tanh_c)
        sigmoid_backward(d_c * g, i, grad_input=d_i)
        sigmoid_backward(d_c * self.c[t], f, grad_input=d_f)
        tanh_backward(d_c * i, g, grad_input=d_g)
        sigmoid_backward(d_h * tanh_c, o, grad_input=d_o)
        return d_before, d_c * f


# ------------------------------------------------------------ one word at a time


class Cell:
    """An nn.LSTM or nn.GRU layer for one word: x [1, 1, I], state -> (h, state).

    nn.LSTM packs its weights anew at each call, which for a single word takes longer than the word.
    For evaluation only: no gradients, and later changes of the weights are not seen.
    """

    def __init__(self, layer):
        self.is_lstm = isinstance(layer, nn.LSTM)
        self.from_x, self.from_h = Packed(layer.weight_ih_l0, 1), Packed(layer.weight_hh_l0, 1)
        self.bias_x, self.bias_h = layer.bias_ih_l0, layer.bias_hh_l0

    def __call__(self, x, state, bf16=False):  # bf16: always False in evaluation
        h, c = (state[0][0], state[1][0]) if self.is_lstm else (state[0], None)  # [1, H]
        from_x, from_h = self.from_x(x[0], self.bias_x), self.from_h(h, self.bias_h)
        if self.is_lstm:
            i, f, g, o = (from_x + from_h).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, 1), from_h.chunk(3, 1)
            n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
            h = torch.lerp(n, h, (x_z + h_z).sigmoid())
        h = h.unsqueeze(0)
        return h, (h, c.unsqueeze(0)) if self.is_lstm else h


# ------------------------------------------------------------ memory


def keep_freed_memory():
    """Makes glibc's malloc keep freed memory; returns whether it does.

    A training step frees and allocates the same hundreds of megabytes again and again. By default
    glibc returns large blocks to Linux, which hands out zeroed pages: up to a tenth of a step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows, musl
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    # 32 MiB is the highest mmap threshold. In one heap with all the others, larger blocks would
    # leave holes that are never filled (40% more memory for WikiText-2).
    settings = {mmap_threshold: 2**25, trim_threshold: 2**31 - 1, top_pad: 2**26}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def use_expandable_segments(device):
    """Lets CUDA's allocator grow its segments, so that windows of random length do not fragment it.

    The public way, an environment variable, has to be set before torch is imported; a user's own
    setting stays.
    """
    if any(f"PYTORCH_{kind}ALLOC_CONF" in os.environ for kind in ("", "CUDA_", "HIP_")):
        return
    for name in ("_accelerator_setAllocatorSettings",
                 "_cuda_cudaCachingAllocator_set_allocator_settings"):  # newer, older torch
        configure = getattr(torch._C, name, None)
        if configure is not None:
            configure("expandable_segments:True")
            torch.cuda.empty_cache()  # so that the next tensor needs a new segment
            try:
                torch.empty(1, device=device)
            except RuntimeError:  # some virtual machines do not support it
                configure("expandable_segments:False")
            return
