"""bench.py: its baseline is the same recipe, its counts are right, its output is complete."""

import json

import pytest
import torch
from torch.autograd import DeviceType

import bench
from conftest import invoke
from train import evaluate

TINY = "--emsize 8 --nhid 12 --ntoken 30 --batch_size 4 --bptt 7 --steps 2 --device cpu".split()


@pytest.mark.parametrize("model", ["LSTM", "GRU", "QRNN"])
def test_the_baseline_is_the_same_model(model):
    args = bench.parse_args([*TINY, "--model", model])
    (ours, _), (plain, _) = bench.our_side(args), bench.plain_side(args)
    for weight in ours.parameters():  # so that every part of the model shows in the loss
        weight.data.mul_(8)
    plain.load_state_dict(ours.state_dict())
    ids = torch.randint(args.ntoken, (500,))
    assert evaluate(ours, ids, 10, 7) == pytest.approx(evaluate(plain, ids, 10, 7), rel=1e-5)


@pytest.mark.parametrize("make_side", [bench.our_side, bench.plain_side])
def test_a_step_trains_all_parameters(make_side):
    params, tasks = bench.make_tasks(make_side, bench.parse_args(TINY))
    before = [parameter.clone() for parameter in params.parameters()]
    tasks["step"]()
    assert not any(map(torch.equal, before, params.parameters()))


def test_the_baseline_is_plain_or_ours_without_attention(with_bf16):
    args = bench.parse_args([*TINY, "--precision", "bf16"])
    assert bench.baseline(args)[:2] == ("plain PyTorch in fp32", bench.plain_side)
    args.attention = "single"
    _, make_side, flags = bench.baseline(args)
    assert (make_side, flags.attention, flags.precision) == (bench.our_side, "none", "bf16")


@pytest.mark.parametrize(("attention", "matrices"), [("none", 0), ("combined", 4)])
def test_products_are_counted(attention, matrices):
    args = bench.parse_args([*TINY, "--attention", attention])
    params, _ = bench.our_side(args)
    # Layers 8 -> 12 -> 12 -> 8 of four gates, and the decoder; six operations a weight and token.
    weights = 4 * 12 * (8 + 12) + 4 * 12 * (12 + 12) + 4 * 8 * (12 + 8) + 30 * 8
    weights += matrices * 8 * 8 + 8 * (matrices > 0)
    assert bench.matrix_flop(params, args) == 6 * weights * 4 * 7


def test_json_has_all_figures(cli):
    done = cli("bench.py", *TINY, "--baseline", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    run, ours, plain, ratio = json.loads(done.stdout).values()
    assert run["precision"] == "fp32" and set(ours) == set(plain)
    assert min(ours.values()) > 0
    assert ours["tokens_per_s"] == pytest.approx(4 * 7 / (ours["ms_per_step"] / 1000))
    assert ratio == pytest.approx({figure: ours[figure] / plain[figure] for figure in ours})


@pytest.mark.parametrize("flags", [["--model", "biLM"], ["--steps", "0"]])
def test_bad_flags(flags, monkeypatch):
    monkeypatch.setattr(bench, "main", lambda: bench.parse_args(flags))
    status, out, err = invoke(bench.main)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert flags[0] in err


def test_the_profile_names_the_operations():
    step, evaluation = bench.profile(bench.parse_args(TINY))
    assert "aten::mkldnn_rnn_layer_backward" in step
    assert "idle" in evaluation["evaluation"]


def test_on_cuda_kernels_are_counted_once():
    events = [
        bench.Namespace(
            key=key, device_type=kind, is_user_annotation=annotation, self_device_time_total=600
        )
        for key, kind, annotation in [
            ("aten::mm", DeviceType.CPU, False), ("gemm", DeviceType.CUDA, False),
            ("Optimizer.step", DeviceType.CUDA, True),
        ]
    ]
    assert bench.operation_times(events) == {"gemm": 0.6}
