"""What is fast on a CPU computes what torch's own layers do."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

import cpu_kernels
from conftest import ROOT
from cpu_kernels import Cell, product, product_of_transposed
from weight_drop import WeightDrop, call_recurrent


def twins(dtype, sizes=(5, 7)):
    """A layer as the model calls it, and one with the same weights as torch does."""
    a, b = WeightDrop(nn.GRU(*sizes), []).to(dtype), nn.GRU(*sizes).to(dtype)
    b.load_state_dict(a.module.state_dict())
    return a, b


def everything(layer, steps, rows, dtype, with_state=True):
    """Outputs and all gradients of a random function of all outputs."""
    torch.manual_seed(1)
    inner = getattr(layer, "module", layer)
    x = torch.randn(steps, rows, inner.input_size, dtype=dtype, requires_grad=True)
    h = torch.randn(1, rows, inner.hidden_size, dtype=dtype, requires_grad=True)
    out, last = layer(x, h) if with_state else layer(x)
    loss = (out * torch.randn_like(out)).sum() + (last * torch.randn_like(last)).sum()
    loss.backward()
    leaves = [x, *([h] if with_state else []), *layer.parameters()]
    return [out.detach(), last.detach()] + [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (4, 3), (30, 2)])
@pytest.mark.parametrize("with_state", [True, False])
def test_outputs_and_gradients_are_torchs(dtype, rtol, steps, rows, with_state):
    a, b = twins(dtype)
    found = everything(a, steps, rows, dtype, with_state)
    expected = everything(b, steps, rows, dtype, with_state)
    assert len(found) == len(expected)
    for f, e in zip(found, expected):
        assert f.shape == e.shape
        torch.testing.assert_close(f, e, rtol=rtol, atol=rtol * float(e.abs().max()))


def test_at_a_size_where_kernels_block_and_thread():
    a, b = twins(torch.float32, (130, 270))
    for f, e in zip(everything(a, 9, 20, torch.float32), everything(b, 9, 20, torch.float32)):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))


def test_gradients_are_the_derivatives():
    layer = nn.GRU(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *weights):
        return call_recurrent(layer, dict(zip(names, weights)), x)

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_without_gradients_it_computes_the_same():
    a, b = twins(torch.float32)
    x = torch.randn(6, 3, 5)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            torch.testing.assert_close(a(x)[0], b(x)[0])


def test_products_are_plain_products():
    x, w, bias = torch.randn(11, 30), torch.randn(13, 30), torch.randn(13)
    torch.testing.assert_close(product(x, w), x @ w.t())
    torch.testing.assert_close(product(x, w, bias), x @ w.t() + bias)
    torch.testing.assert_close(product_of_transposed(x, x), x.t() @ x)


def test_without_onednn_it_is_the_same(monkeypatch):
    a, b = twins(torch.float32)
    monkeypatch.setattr(cpu_kernels, "has_onednn", lambda tensor: False)
    for f, e in zip(everything(a, 5, 3, torch.float32), everything(b, 5, 3, torch.float32)):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("options", [
    {"num_layers": 2}, {"bidirectional": True}, {"batch_first": True}, {"bias": False}
])
def test_other_layers_are_torchs_own(options):
    layer = nn.GRU(5, 7, **options)
    x = torch.randn(4, 3, 5)
    for found, expected in zip(WeightDrop(layer, [])(x), layer(x)):
        torch.testing.assert_close(found, expected)


def test_elsewhere_it_is_torchs_own(monkeypatch):
    called = []
    gru = torch.gru
    monkeypatch.setattr(torch, "gru", lambda *args: called.append(args) or gru(*args))
    with torch.device("meta"):
        assert WeightDrop(nn.GRU(5, 7), [])(torch.empty(4, 3, 5))[0].shape == (4, 3, 7)
    assert len(called) == 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cell_is_its_layer(kind, dtype):
    layer = kind(5, 7).to(dtype)
    x = torch.randn(9, 1, 5, dtype=dtype)
    state = torch.randn(1, 1, 7, dtype=dtype)
    state = (state, torch.randn_like(state)) if kind is nn.LSTM else state
    with torch.no_grad():
        expected = layer(x, state)
        cell = Cell(layer)
        torch.testing.assert_close(cell(x, state), expected)
        outputs = []
        for x_t in x:
            output, state = cell(x_t.unsqueeze(0), state)
            outputs.append(output)
        torch.testing.assert_close((torch.cat(outputs), state), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_cell_is_on_its_layers_device(kind):
    layer = kind(5, 7).to("meta")
    state = torch.zeros(1, 1, 7, device="meta")
    state = (state, state) if kind is nn.LSTM else state
    with torch.no_grad():
        assert Cell(layer)(torch.zeros(2, 1, 5, device="meta"), state)[0].is_meta


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}])
def test_other_layers_are_refused(options):
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
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, text=True,
            check=True,
        )
        faults[how] = int(done.stdout)
    if faults["leave"] == 0:
        pytest.skip("this system does not count page faults")
    assert faults["keep"] < 10_000  # pages of 4 KiB; 200 MB have 50,000
    assert faults["leave"] > 3 * faults["keep"]
