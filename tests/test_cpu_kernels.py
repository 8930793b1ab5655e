"""What is fast on a CPU computes what torch's own layers do."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

import cpu_kernels
from conftest import ROOT
from cpu_kernels import Cell, recurrent_layer
from weight_drop import WeightDrop


def everything(call, layer, x, state):
    """Outputs and all gradients of a random function of all outputs."""
    torch.manual_seed(1)
    leaves = [x, *(state if isinstance(state, tuple) else [state]), *layer.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    output, last = call(x, state)
    outputs = [output, *(last if isinstance(last, tuple) else [last])]
    loss = sum((output * torch.randn_like(output)).sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(
    ("dtype", "factors", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12), (torch.float32, torch.float32, 2e-5),
        (torch.float32, torch.bfloat16, 3e-2),
    ],
)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    ("sizes", "steps", "rows"),
    [((5, 7), 1, 1), ((5, 7), 30, 2), ((130, 270), 9, 20)],  # in the last, kernels block and thread
)
def test_a_layer_matches_torch(
    sizes, steps, rows, kind, bidirectional, dtype, factors, tolerance, onednn, monkeypatch
):
    layer = kind(*sizes, bidirectional=bidirectional).to(dtype)
    x = torch.randn(steps, rows, sizes[0], dtype=dtype)
    state = torch.randn(2, 1 + bidirectional, rows, sizes[1], dtype=dtype)
    state = tuple(state) if kind is nn.LSTM else state[0]
    expected = everything(layer, layer, x, state)
    if not onednn:
        monkeypatch.setattr(cpu_kernels, "has_onednn", lambda tensor: False)
    weights = list(layer.parameters())
    found = everything(lambda *args: recurrent_layer(*args, weights, factors), layer, x, state)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == dtype
        torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance * e.abs().max().item())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_weight_drop_matches_its_layer_with_and_without_a_state_and_autograd(kind, bf16):
    layer, x = kind(5, 7), torch.randn(30, 2, 5)
    zero = torch.zeros(1, 2, 7)
    tolerance = {"rtol": 0, "atol": 0.01} if bf16 else {}
    for state in (None, (zero, zero) if kind is nn.LSTM else zero):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                found = WeightDrop(layer, [])(x, state, bf16=bf16)
            torch.testing.assert_close(found, layer(x), **tolerance)


@pytest.mark.parametrize("options", [
    {"num_layers": 2}, {"batch_first": True}, {"bias": False}, {"device": "meta"},
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
    expected, cell, outputs = layer(x, state), Cell(layer), []
    for x_t in x.split(1):
        h, state = cell(x_t, state)
        outputs.append(h)
    torch.testing.assert_close((torch.cat(outputs), state), expected)


COUNT_PAGE_FAULTS = """
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
        int(subprocess.check_output([sys.executable, "-c", COUNT_PAGE_FAULTS, how], cwd=ROOT))
        for how in ("keep", "leave")
    )
    if leave == 0:
        pytest.skip("this system does not count page faults")
    assert keep < 10_000  # pages of 4 KiB; 200 MB have 50,000
    assert leave > 3 * keep
