"""bench.py: its baseline is the same recipe, its counts are right, its output is complete."""

import json
import math

import pytest
import torch
from torch.autograd import DeviceType

import bench
from checkpoint import new_params
from train import EVAL_BATCH_SIZE, evaluate

TINY = "--emsize 8 --nhid 12 --nlayers 3 --ntoken 30 --batch_size 4 --bptt 7".split()


@pytest.mark.parametrize("model", ["LSTM", "GRU"])
def test_the_baseline_is_the_same_model(model):
    """With the same weights both sides have the same loss."""
    args = bench.parse_args([*TINY, "--model", model])
    params = new_params(bench.Namespace(dictionary=range(args.ntoken)), args)
    plain = bench.Plain(args).eval()
    ours = {name.replace(".module.", "."): value for name, value in params[0].state_dict().items()}
    plain.load_state_dict(ours)
    ids = torch.randint(args.ntoken, (EVAL_BATCH_SIZE * 7 + 1,))
    words, targets, _ = bench.batchify_exact(ids, EVAL_BATCH_SIZE)
    loss = bench.nll(plain(words, None)[0], targets.flatten())
    assert evaluate(params, ids, EVAL_BATCH_SIZE, 7) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("side", ["ours", "baseline"])
def test_both_sides_take_steps_and_evaluate(side):
    step, evaluation = bench.SIDES[side](bench.parse_args(TINY))
    step()
    step()
    assert 0 < evaluation() < 1e6


@pytest.mark.parametrize("kind", ["single", "combined"])
def test_with_attention_the_baseline_is_ours_without_it(kind, monkeypatch):
    made = []

    def new_params(corpus, args):
        made.append(run.new_params(corpus, args))
        return made[-1]

    monkeypatch.setattr(bench, "new_params", new_params)
    args = bench.parse_args([*TINY, "--attention", kind])
    for side in bench.SIDES.values():
        step, evaluation = side(args)
        step()
        assert 0 < evaluation() < 1e6
    ours, baseline = (dict(params[0].named_parameters()) for params in made)
    joined = {name for name in ours if name.startswith("attention.")}
    assert joined and set(baseline) == set(ours) - joined
    without = bench.parse_args(TINY)
    assert bench.products(args) - bench.products(without) == (
        6 * 8 * 8 * {"single": 3, "combined": 4}[kind] * 4 * 7
    )


def test_products_are_counted():
    args = bench.parse_args([])
    # Penn Treebank: 400 -> 1150 -> 1150 -> 400, four gates, and the decoder; 6 operations a
    # weight and token.
    weights = 4 * 1150 * (400 + 1150) + 4 * 1150 * (1150 + 1150) + 4 * 400 * (1150 + 400)
    assert bench.products(args) == 6 * (weights + 400 * 10_000) * 70 * 20
    assert bench.products(bench.parse_args(["--model", "GRU"])) < bench.products(args)


def test_json_has_all_figures(cli):
    done = cli("bench.py", *TINY, "--steps", 2, "--evaluations", 1, "--baseline", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    for key in ("ms_per_step", "tokens_per_s", "peak_mib", "utilization", "ratio",
                "eval_tokens_per_s", "baseline_ms_per_step", "memory_ratio", "eval_ratio"):
        assert result[key] > 0, key
    assert result["ms_min"] <= result["ms_per_step"] <= result["ms_max"]
    assert result["ratio"] == pytest.approx(result["baseline_ms_per_step"] / result["ms_per_step"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "biLSTM"], "argument --model: invalid choice: 'biLSTM'"),
        (["--read", "0"], "argument --read: must be a number in [0.01, 100000), not 0"),
        (["--precision", "tf32", "--device", "cpu"], "--precision tf32: device cpu has none"),
    ],
)
def test_bad_flags(flags, message, cli):
    done = cli("bench.py", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"bench.py: error: {message}")
    assert done.stderr.count("\n") == 1


def test_the_profile_names_the_layers_kernel(capsys):
    bench.profile(bench.parse_args([*TINY, "--device", "cpu"]))
    out = capsys.readouterr().out
    assert out.startswith("a step: ")
    assert "an evaluation: " in out
    shares = [float(line.split("%")[0]) for line in out.splitlines() if "%" in line]
    assert 50 < sum(shares) <= 200.5


def test_on_cuda_kernels_are_counted_once_and_the_rest_of_a_step_is_idle():
    def event(key, device_type, microseconds, annotation=False):
        return bench.Namespace(
            key=key, device_type=device_type, is_user_annotation=annotation,
            self_device_time_total=microseconds,
        )

    times = bench.kernel_times([
        event("aten::mm", DeviceType.CPU, 600), event("gemm", DeviceType.CUDA, 600),
        event("Memcpy HtoD", DeviceType.CUDA, 150),
        event("Optimizer.step", DeviceType.CUDA, 750, annotation=True),
    ])
    assert times == {"gemm": 600, "Memcpy HtoD": 150}
    assert bench.idle_share(750, 1000) == 0.25
    assert bench.idle_share(1100, 1000) == 0


def test_reading_is_measured_on_a_corpus_of_the_size_asked_for():
    result = bench.read(0.02, ntoken=100)
    assert result["tokens"] == pytest.approx(20_000, rel=0.02)
    assert result["words"] == 100
    assert result["tokens_per_s"] > 0
    assert result["splits"] == []  # of so small a vocabulary
    assert result["step_loss"] == pytest.approx(math.log(100), abs=0.5)
