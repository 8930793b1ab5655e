"""The QRNN: a recurrent layer whose matrix products do not wait for the previous time step.

Bradbury, Merity, Xiong and Socher 2016 (1611.01576), in the convention of the library behind the
published AWD-QRNN results: f here is 1 - f in the paper.
"""

import sys
from functools import cache

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from cpu_kernels import product, sigmoid_backward, tanh_backward

try:  # part of torch's CUDA builds
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 128  # elements of a state in one program of a Triton kernel


class QRNN(nn.Module):
    """A QRNN layer with an output gate ("fo-pooling").

        z_t, f_t, o_t = tanh, sigmoid, sigmoid of W [x_t; x_{t-1}] + b
        c_t = f_t z_t + (1 - f_t) c_{t-1}
        h_t = o_t c_t

    `window` is the number of inputs that a step reads: 2, or 1 without x_{t-1}. `linear` has the
    weight W [3H, window * I] and the bias b [3H].
    """

    def __init__(self, input_size, hidden_size, window=1):
        super().__init__()
        self.hidden_size, self.window = hidden_size, window
        self.linear = nn.Linear(window * input_size, 3 * hidden_size)

    def forward(self, x, state, bf16=False):
        """x [T, B, I], state -> all h [T, B, H], the state after them.

        The state is c [1, B, H]; with a window of 2 (c, the last input [1, B, I], detached). With
        `bf16` the operands of matrix products are in bfloat16.
        """
        c, last = state if self.window == 2 else (state, None)
        inputs = x
        if last is not None:
            inputs = torch.cat([x, torch.cat([last, x[:-1]])], 2)  # [T, B, 2I]
        dtype = torch.bfloat16 if bf16 else x.dtype
        h, c = Recurrence.apply(dtype, inputs, self.linear.weight, self.linear.bias, c[0])
        c = c.unsqueeze(0)
        return h, c if last is None else (c, x[-1:].detach())


class Recurrence(torch.autograd.Function):
    """A QRNN layer over all time steps: one product for all of them, then element by element.

    The operands of matrix products are cast to `dtype`; all else has the dtype of the state.
    """

    @staticmethod
    def forward(ctx, dtype, x, weight, bias, c0):
        """x [T, B, I], weight [3H, I], bias [3H], c0 [B, H] -> all h [T, B, H], the last c."""
        steps, rows, _ = x.shape
        x, weight = x.flatten(0, 1).to(dtype), weight.to(dtype)
        gates = product(x, weight, bias).view(steps, rows, -1)
        cs = c0.new_empty(steps + 1, *c0.shape)
        cs[0] = c0
        hs = (triton_forward if has_triton(gates) else torch_forward)(gates, cs)
        ctx.save_for_backward(x, weight, gates, cs)
        return hs, cs[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_hs, d_c):
        x, weight, gates, cs = ctx.saved_tensors
        backward = triton_backward if has_triton(gates) else torch_backward
        d_gates, d_c0 = backward(gates, cs, d_hs, d_c)
        factors = d_gates.flatten(0, 1).to(x.dtype)
        d_x = product(factors, weight.t()).view(*d_hs.shape[:2], -1)
        d_weight = product(factors.t().contiguous(), x.t())
        d_bias = d_gates.sum((0, 1))
        return None, d_x.to(d_hs.dtype), d_weight.to(d_hs.dtype), d_bias, d_c0


# ------------------------------------------------------------ in torch


def torch_forward(gates, cs):
    """Overwrites gates [T, B, 3H] with z, f and o, and fills cs [T + 1, B, H] except for cs[0].

    Returns all h [T, B, H]. Only what waits for the previous step is done step by step.
    """
    z, f, o = gates.chunk(3, 2)
    # tanh(x) is 2 sigmoid(2x) - 1; torch's tanh takes several times as long as its sigmoid.
    z.mul_(2)
    gates.sigmoid_()
    z.mul_(2).sub_(1)
    for t in range(len(gates)):
        torch.lerp(cs[t], z[t], f[t], out=cs[t + 1])
    return o * cs[1:]


def torch_backward(gates, cs, d_hs, d_c):
    """Given the gradients of all h and of the last c, returns those of `gates` and the first c.

    `gates` and `cs` are as `torch_forward` left them; the gradient is of what `gates` held before.
    """
    z, f, o = gates.chunk(3, 2)
    d_gates = torch.empty_like(gates)
    d_z, d_f, d_o = d_gates.chunk(3, 2)
    kept = 1 - f  # of c_{t-1} in c_t
    d_cs = d_hs * o
    d_cs[-1] += d_c
    for t in range(len(gates) - 1, 0, -1):
        d_cs[t - 1].addcmul_(kept[t], d_cs[t])
    tanh_backward(d_cs * f, z, grad_input=d_z)
    sigmoid_backward(d_cs * (z - cs[:-1]), f, grad_input=d_f)
    sigmoid_backward(d_hs * cs[1:], o, grad_input=d_o)
    return d_gates, kept[0] * d_cs[0]


# ------------------------------------------------------------ in Triton

if triton is not None:
    # Each program takes BLOCK elements of the state [B, H] through all steps. Without
    # do_not_specialize the kernels would be compiled anew for some lengths (1, multiples of 16).

    @triton.jit(do_not_specialize=["steps"])
    def forward_kernel(gates, cs, hs, steps, rows, size, BLOCK: tl.constexpr):
        """See torch_forward; rows is B, size H."""
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < rows * size
        z_offsets = offsets // size * 3 * size + offsets % size  # f's are H and o's 2H further on
        c = tl.load(cs + offsets, mask=mask)
        for _ in range(steps):
            cs += rows * size
            z = 2 * tl.sigmoid(2 * tl.load(gates + z_offsets, mask=mask)) - 1
            f = tl.sigmoid(tl.load(gates + z_offsets + size, mask=mask))
            o = tl.sigmoid(tl.load(gates + z_offsets + 2 * size, mask=mask))
            c = f * z + (1 - f) * c
            tl.store(gates + z_offsets, z, mask=mask)
            tl.store(gates + z_offsets + size, f, mask=mask)
            tl.store(gates + z_offsets + 2 * size, o, mask=mask)
            tl.store(cs + offsets, c, mask=mask)
            tl.store(hs + offsets, o * c, mask=mask)
            gates += rows * 3 * size
            hs += rows * size

    @triton.jit(do_not_specialize=["steps"])
    def backward_kernel(gates, cs, d_hs, d_gates, d_c, steps, rows, size, BLOCK: tl.constexpr):
        """See torch_backward. d_c [B, H]: on entry of the last c, on return of the first."""
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < rows * size
        z_offsets = offsets // size * 3 * size + offsets % size
        last = steps.to(tl.int64) - 1  # long texts have more than 2**31 gates
        gates += last * rows * 3 * size
        d_gates += last * rows * 3 * size
        d_hs += last * rows * size
        cs += last * rows * size  # the c before each step
        d_c_t = tl.load(d_c + offsets, mask=mask)
        c = tl.load(cs + rows * size + offsets, mask=mask)
        for _ in range(steps):
            c_before = tl.load(cs + offsets, mask=mask)
            d_h = tl.load(d_hs + offsets, mask=mask)
            z = tl.load(gates + z_offsets, mask=mask)
            f = tl.load(gates + z_offsets + size, mask=mask)
            o = tl.load(gates + z_offsets + 2 * size, mask=mask)
            d_c_t += d_h * o
            tl.store(d_gates + z_offsets, d_c_t * f * (1 - z * z), mask=mask)
            tl.store(d_gates + z_offsets + size, d_c_t * (z - c_before) * f * (1 - f), mask=mask)
            tl.store(d_gates + z_offsets + 2 * size, d_h * c * o * (1 - o), mask=mask)
            d_c_t *= 1 - f
            c = c_before
            gates -= rows * 3 * size
            d_gates -= rows * 3 * size
            d_hs -= rows * size
            cs -= rows * size
        tl.store(d_c + offsets, d_c_t, mask=mask)


def triton_forward(gates, cs):
    """As `torch_forward`."""
    hs = torch.empty_like(cs[1:])
    steps, rows, size = hs.shape
    grid = (triton.cdiv(rows * size, BLOCK),)
    with torch.cuda.device_of(gates):  # Triton launches on the current device
        forward_kernel[grid](gates, cs, hs, steps, rows, size, BLOCK=BLOCK)
    return hs


def triton_backward(gates, cs, d_hs, d_c):
    """As `torch_backward`."""
    d_gates, d_c0 = torch.empty_like(gates), d_c.clone(memory_format=torch.contiguous_format)
    steps, rows, size = d_hs.shape
    grid = (triton.cdiv(rows * size, BLOCK),)
    with torch.cuda.device_of(gates):
        backward_kernel[grid](
            gates, cs, d_hs.contiguous(), d_gates, d_c0, steps, rows, size, BLOCK=BLOCK
        )
    return d_gates, d_c0


def has_triton(tensor):
    """Whether Triton's kernels take the place of torch's loop for `tensor`."""
    return tensor.is_cuda and triton_works()


@cache
def triton_works():
    """Whether Triton's kernels run on the current GPU; if not, a warning on stderr."""
    reason = "is not installed"
    if triton is not None:
        try:
            cs = torch.zeros(2, 1, 1, device="cuda")
            triton_forward(torch.zeros(1, 1, 3, device="cuda"), cs)
            return True
        except Exception as error:  # it has many for an old GPU, or a machine without a C compiler
            reason = "failed ({})".format(str(error).partition("\n")[0])
    print(f"Warning: Triton {reason}; the QRNN uses the slower PyTorch loop", file=sys.stderr)
    return False
