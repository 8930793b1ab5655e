"""Matrix products on a CPU by oneDNN, which torch has beside its BLAS library, and packed matrices.

A matrix that many products share is packed once, into the order in which the processor reads it.
Elsewhere (a GPU, float64, a torch without oneDNN) these are torch's ordinary products.
"""

import torch


def has_onednn(tensor):
    """Whether torch's oneDNN products, which take packed weights, can be used on `tensor`."""
    return (
        tensor.device.type == "cpu" and tensor.dtype == torch.float32
        and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    )


class Packed:
    """A matrix [N, K] made ready for products with x [rows, K]: `Packed(w, rows)(x)` is x @ w.T."""

    def __init__(self, weight, rows):
        self.onednn = has_onednn(weight)
        self.weight = weight.t()
        if self.onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, x, bias=None):
        """x [rows, K] @ w.T (+ bias [N]) -> [rows, N]."""
        if self.onednn:
            if bias is not None:
                bias = bias.contiguous()  # the kernel reads it as if it were
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
