"""What is fast on a CPU computes what torch's own layers do."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

import cpu_kernels
from conftest import ROOT
from cpu_kernels import Cell
from weight_drop import WeightDrop


def everything(layer, steps, rows, with_state=True):
    """Outputs and all gradients of a random function of all outputs."""
    torch.manual_seed(1)
    w_ih, w_hh, *_ = weights = list(layer.parameters())
    x = torch.randn(steps, rows, w_ih.size(1)).to(w_ih).requires_grad_()
    state = [torch.randn(1, rows, w_hh.size(1)).to(w_ih).requires_grad_()] * with_state
    outputs = layer(x, *state)
    loss = sum((output * torch.randn_like(output)).sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *state, *weights])]


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize(
    ("sizes", "steps", "rows"),
    [((5, 7), 1, 1), ((5, 7), 30, 2), ((130, 270), 9, 20)],  # in the last, kernels block and thread
)
def test_a_gru_layer_is_torchs(sizes, steps, rows, with_state, dtype, onednn, monkeypatch):
    layer = nn.GRU(*sizes).to(dtype)
    expected = everything(layer, steps, rows, with_state)
    if not onednn:
        monkeypatch.setattr(cpu_kernels, "has_onednn", lambda tensor: False)
    found = everything(WeightDrop(layer, []), steps, rows, with_state)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance * e.abs().max().item())
    x = torch.randn(steps, rows, sizes[0], dtype=dtype)
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            torch.testing.assert_close(WeightDrop(layer, [])(x)[0], layer(x)[0])


@pytest.mark.parametrize("options", [
    {"num_layers": 2}, {"bidirectional": True}, {"batch_first": True}, {"bias": False},
    {"device": "meta"},
])
def test_other_layers_are_torchs_own(options):
    layer, x = nn.GRU(5, 7, **options), torch.randn(4, 3, 5, device=options.get("device"))
    torch.testing.assert_close(WeightDrop(layer, [])(x), layer(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.float32, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")],
)
def test_a_cell_is_its_layer(kind, dtype, device):
    settings = {"dtype": dtype, "device": device}
    layer = kind(5, 7, **settings)
    x, state = torch.randn(9, 1, 5, **settings), torch.randn(2, 1, 1, 7, **settings)
    state = tuple(state) if kind is nn.LSTM else state[0]
    expected, cell = layer(x, state), Cell(layer)
    torch.testing.assert_close(cell(x, state), expected)
    first, state = cell(x[:4], state)
    rest, state = cell(x[4:], state)
    torch.testing.assert_close((torch.cat([first, rest]), state), expected)


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}])
def test_a_cell_of_more_is_refused(options):
    with pytest.raises(ValueError, match="one layer"):
        Cell(nn.LSTM(5, 7, **options))


FAULTS = """
import resource, sys
import torch
from cpu_kernels import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):  # 200 MB in ten pieces, made, used and freed
    pieces = [torch.zeros(5_000_000) for _ in range(10)]
    del pieces
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
pieces = [torch.zeros(5_000_000) for _ in range(10)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_is_kept_is_not_asked_for_again():
    keep, leave = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, how], cwd=ROOT))
        for how in ("keep", "leave")
    )
    if leave == 0:
        pytest.skip("this system does not count page faults")
    assert keep < 10_000  # pages of 4 KiB; 200 MB have 50,000
    assert leave > 3 * keep
