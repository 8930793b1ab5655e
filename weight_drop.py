"""Weight drop: DropConnect on the hidden-to-hidden matrices of a recurrent layer.

Wan et al. 2013; section 2 of Merity et al. 2017 (1708.02182).
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from cpu_kernels import has_recurrent_layer, recurrent_layer


def drop_weight(weight, dropout, variational=False):
    """A copy of `weight` with elements zeroed at rate `dropout` and the rest scaled up.

    The scale is 1 / (1 - dropout). With `variational`, complete rows are dropped. On the CPU the
    rate is rounded to a multiple of 1/65536.
    """
    if variational:
        return weight * F.dropout(weight.new_ones(weight.size(0), 1), dropout)
    if weight.device.type != "cpu":
        return F.dropout(weight, dropout)
    # Drawing a float per element would cost ten times the rest of this function. An int64 holds
    # four 16-bit draws. (-2**63, None) is the full range: random_() without arguments never sets
    # the top bit, which would bias every fourth draw.
    draws = torch.empty((weight.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    draws = draws.view(torch.int16)[: weight.numel()].view_as(weight)
    dropped = min(round(dropout * 65536), 65535)  # of a draw's 65,536 values, from -32,768 on
    kept = (draws >= dropped - 32768).to(weight.dtype)  # torch.where takes eight times as long
    return weight * kept.mul_(65536 / (65536 - dropped))


class WeightDrop(nn.Module):
    """Wraps `module` and applies dropout to the parameters named in `weights` at each call.

    A forward pass uses one mask for all time steps. `module` keeps the raw parameters, under their
    own names; these are trained, averaged and saved. In evaluation, or with `dropout` 0, nothing is
    dropped.

    With `bf16` an nn.LSTM, nn.GRU or QRNN computes its matrix products in bfloat16; inputs, outputs
    and parameters stay in float32. `pad_to`: see `call_recurrent`.

    `WeightDrop(nn.LSTM(10, 10), ["weight_hh_l0"], dropout=0.5)` is AWD-LSTM's layer.
    """

    def __init__(self, module, weights, dropout=0, variational=False, pad_to=1):
        super().__init__()
        self.module = module
        self.weights = list(weights)
        self.dropout = dropout
        self.variational = variational
        self.pad_to = pad_to

    def forward(self, *args, bf16=False):
        """As the module's own `forward`; in training, with dropped weights."""
        parameters = dict(self.module.named_parameters())
        if self.training and self.dropout:
            for name in self.weights:
                parameters[name] = drop_weight(parameters[name], self.dropout, self.variational)
        if isinstance(self.module, nn.LSTM | nn.GRU):
            return call_recurrent(self.module, parameters, *args, bf16=bf16, pad_to=self.pad_to)
        return functional_call(self.module, parameters, args, {"bf16": True} if bf16 else {})


def call_recurrent(module, weights, x, state=None, bf16=False, pad_to=1):
    """Calls `module`, an nn.LSTM or nn.GRU, with `weights` in place of its parameters.

    weights {name: tensor}, in the order of `module.named_parameters()`; x [T, B, I]; state as the
    module's, zero if None. The weights are passed directly to the kernel: on CUDA functional_call
    would make nn.RNNBase copy its own parameters to new memory at each call. With `bf16` a CPU
    computes matrix products in bfloat16; other devices compute the complete layer in bfloat16.

    Tensor cores prefer sizes that are multiples of 8. With `pad_to`, layers in one direction are
    padded to multiples of it for the kernel only. A unit whose weights and biases are 0 keeps the
    state 0, so results do not change.
    """
    is_lstm, output_dtype = isinstance(module, nn.LSTM), x.dtype
    if state is None:
        layers = module.num_layers * (1 + module.bidirectional)
        state = x.new_zeros(layers, x.size(0 if module.batch_first else 1), module.hidden_size)
        state = (state, state) if is_lstm else state
    dtype = torch.bfloat16 if bf16 else x.dtype
    if has_recurrent_layer(module, x, bf16):
        return recurrent_layer(x, state, list(weights.values()), dtype)
    states = state if is_lstm else (state,)
    if pad_to > 1 and not module.bidirectional:
        weights = {name: pad_weight(w, 4 if is_lstm else 3, pad_to) for name, w in weights.items()}
        x, *states = (pad(tensor, -1, pad_to) for tensor in (x, *states))
    own = dict(module.named_parameters())
    if x.is_cuda and any(w is not own[name] or w.dtype != dtype for name, w in weights.items()):
        weights = in_one_piece(weights, dtype)
    weights = [weight.to(dtype) for weight in weights.values()]
    x, *states = (tensor.to(dtype) for tensor in (x, *states))
    kernel = torch.lstm if is_lstm else torch.gru
    output, *states = kernel(
        x, states if is_lstm else states[0], weights, module.bias, module.num_layers,
        module.dropout, module.training, module.bidirectional, module.batch_first,
    )
    width = module.hidden_size * (1 + module.bidirectional)
    states = [h[..., : module.hidden_size].to(output_dtype) for h in states]
    return output[..., :width].to(output_dtype), tuple(states) if is_lstm else states[0]


def pad(x, first, multiple):
    """`x`, with its dimensions from `first` on padded with zeros to multiples of `multiple`."""
    widths = [n for size in reversed(x.shape[first:]) for n in (0, -size % multiple)]
    return F.pad(x, widths) if any(widths) else x  # F.pad always copies


def pad_weight(weight, gates, multiple):
    """A weight [gates * H, K] or bias [gates * H], with each gate's H, and K, padded with zeros."""
    return pad(weight.unflatten(0, (gates, -1)), 1, multiple).flatten(0, 1)


def in_one_piece(weights, dtype):
    """The weights {name: tensor} as views of one new tensor, the matrices before the biases.

    That is cuDNN's own layout. cuDNN copies weights in any other layout, with a warning.
    """
    names = sorted(weights, key=lambda name: "bias" in name)
    flat = torch.cat([weights[name].flatten() for name in names]).to(dtype)
    parts = flat.split([weights[name].numel() for name in names])
    views = {name: part.view_as(weights[name]) for name, part in zip(names, parts)}
    return {name: views[name] for name in weights}
