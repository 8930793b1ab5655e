"""The QRNN: its equations and gradients against float64, its Triton kernels, its commands."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import finetune
import main
import pointer
import qrnn
from conftest import ROOT, invoke
from qrnn import QRNN


def restated(x, weight, bias, c, last=None):
    """All h [T, B, H] and the last c [1, B, H] by the equations, step by step."""
    hs = []
    for x_t in x:
        inputs = x_t if last is None else torch.cat([x_t, last], 1)
        z, f, o = (inputs @ weight.T + bias).chunk(3, 1)
        c = f.sigmoid() * z.tanh() + (1 - f.sigmoid()) * c
        hs.append(o.sigmoid() * c[0])
        last = None if last is None else x_t
    return torch.stack(hs), c


def everything(call, x, c, last, layer):
    """What `call` returns, and all gradients of a random function of it, in float64."""
    torch.manual_seed(1)
    leaves = [x, c, layer.linear.weight, layer.linear.bias] + [last] * (layer.window == 2)
    outputs = call(*(leaf.requires_grad_() for leaf in leaves))
    loss = sum((output * torch.randn(output.shape).to(output)).sum() for output in outputs)
    return [found.double() for found in (*outputs, *torch.autograd.grad(loss, leaves))]


def check(window, steps, rows, size, dtype, tolerance, bf16=False):
    """Asserts that a layer's outputs, state and gradients are those of the equations."""
    layer = QRNN(6, size, window).to(dtype)
    x, last = torch.randn(steps, rows, 6, dtype=dtype), torch.randn(rows, 6, dtype=dtype)
    c = torch.randn(1, rows, size, dtype=dtype)

    def ours(x, c, weight, bias, last=None):
        state = c if last is None else (c, last.unsqueeze(0))
        h, state = layer(x, state, bf16=bf16)
        if last is not None:
            state, last = state
            assert torch.equal(last, x[-1:]) and not last.requires_grad
        return h, state

    def theirs(x, c, weight, bias, last=None):
        return restated(x, weight, bias, c, last)

    found = everything(ours, x, c, last, layer)
    expected = everything(theirs, *(tensor.detach().double() for tensor in (x, c, last)),
                          layer.double())
    for f, e in zip(found, expected, strict=True):
        assert (f - e).abs().max() <= tolerance * max(1, e.abs().max().item())


@pytest.mark.parametrize(("dtype", "tolerance", "bf16"), [
    (torch.float64, 1e-10, False), (torch.float32, 1e-5, False), (torch.float32, 3e-2, True),
])
@pytest.mark.parametrize(("steps", "rows", "size"), [(1, 1, 1), (7, 3, 5), (40, 20, 130)])
@pytest.mark.parametrize("window", [1, 2])
def test_a_layer_is_the_equations(window, steps, rows, size, dtype, tolerance, bf16):
    check(window, steps, rows, size, dtype, tolerance, bf16)


@pytest.mark.parametrize("window", [1, 2])
def test_the_state_carries_the_text_on(window):
    layer, x = QRNN(6, 5, window), torch.randn(9, 2, 6)
    c, last = torch.zeros(1, 2, 5), torch.zeros(1, 2, 6)
    fresh = c if window == 1 else (c, last)
    whole, end = layer(x, fresh)
    first, state = layer(x[:4], fresh)
    rest, state = layer(x[4:], state)
    torch.testing.assert_close((torch.cat([first, rest]), state), (whole, end))


# ------------------------------------------------------------ Triton

INTERPRETED = """
import sys
import torch
sys.path.append("tests")
import qrnn, test_qrnn

calls = []
for name in ("triton_forward", "triton_backward"):
    kernel = getattr(qrnn, name)
    setattr(qrnn, name, lambda *args, kernel=kernel: calls.append(kernel) or kernel(*args))
qrnn.has_triton = lambda tensor: True
for sizes in ((1, 1, 1), (1, 3, 5), (16, 3, 5), (7, 3, 150)):  # of 450 elements, in blocks of 128
    test_qrnn.check(2, *sizes, torch.float64, 1e-10)
    test_qrnn.check(1, *sizes, torch.float32, 1e-5)
    test_qrnn.check(1, *sizes, torch.float32, 3e-2, bf16=True)
assert len(calls) == 4 * 3 * 2
"""


@pytest.mark.skipif(qrnn.triton is None, reason="Triton is not installed")
def test_the_triton_kernels_in_its_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_where_triton_fails_a_warning_and_torchs_loop(installed, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("no C compiler\nmore")

    monkeypatch.setattr(qrnn, "triton", installed or None)
    monkeypatch.setattr(qrnn, "triton_forward", fail)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)  # there is no GPU
    qrnn.triton_works.cache_clear()
    assert [qrnn.triton_works(), qrnn.triton_works()] == [False, False]
    qrnn.triton_works.cache_clear()
    reason = "Triton failed (no C compiler)" if installed else "Triton is not installed"
    expected = f"Warning: {reason}; the QRNN uses the slower PyTorch loop\n"
    assert capsys.readouterr().err == expected


# ------------------------------------------------------------ the reference's commands

# As they stand in the README of salesforce/awd-lstm-lm.
COMMANDS = """
python -u main.py --model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 --emsize 400 --dropouth 0.3 --seed 9001 --dropouti 0.4 --epochs 550 --save PTB.pt
python -u finetune.py --model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 --emsize 400 --dropouth 0.3 --seed 404 --dropouti 0.4 --epochs 300 --save PTB.pt
python pointer.py --model QRNN --lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000 --save PTB.pt
python -u main.py --epochs 500 --data data/wikitext-2 --clip 0.25 --dropouti 0.4 --dropouth 0.2 --nhid 1550  --nlayers 4 --seed 4002 --model QRNN --wdrop 0.1 --batch_size 40 --save WT2.pt
python finetune.py --epochs 500 --data data/wikitext-2 --clip 0.25 --dropouti 0.4 --dropouth 0.2 --nhid 1550 --nlayers 4 --seed 4002 --model QRNN --wdrop 0.1 --batch_size 40 --save WT2.pt
python -u pointer.py --save WT2.pt --model QRNN --lambdasm 0.1279 --theta 0.662 --window 3785 --bptt 2000 --data data/wikitext-2
"""  # noqa: E501
CUT_DOWN = {
    "main.py": "--epochs 2 --emsize 8 --nhid 12 --batch_size 4 --bptt 10 --when 1",
    "finetune.py": "--epochs 1 --emsize 8 --nhid 12 --batch_size 4 --bptt 10", "pointer.py": "",
}
SCRIPTS = {"main.py": main.main, "finetune.py": finetune.main, "pointer.py": pointer.main}


def test_the_references_commands_run_from_their_own_text(corpus_dir, tmp_path, monkeypatch):
    for name in ("penn", "wikitext-2"):
        shutil.copytree(corpus_dir, tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS.strip().splitlines():
        _, script, *flags = command.replace(" -u", "").split()
        status, out, err = invoke(SCRIPTS[script], *flags, *CUT_DOWN[script].split())
        assert (status, err) == (0, ""), command
        assert "| End of training | test loss" in out
    records = (tmp_path / "PTB.pt.jsonl").read_text().splitlines()
    assert len(records) == 2
