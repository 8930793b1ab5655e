"""--precision: bfloat16 where it is asked for, float32 everywhere else."""

import pytest
import torch

import main
from conftest import arguments, invoke, make_params
from train import Objective, evaluate, make_optimizer, train_step
from utils import read_checkpoint


def twins(rnn_type):
    """The same model in float32 and with bf16."""
    plain, bf16 = make_params(rnn_type), make_params(rnn_type)
    bf16.load_state_dict(plain.state_dict())
    bf16[0].bf16 = True
    return plain, bf16


def both(pair, function):
    return [function(*params) for params in pair]


@pytest.mark.parametrize("rnn_type", ["LSTM", "biLSTM"])
def test_the_layers_run_in_bfloat16_and_all_around_them_in_float32(rnn_type):
    pair = twins(rnn_type)
    words = torch.randint(50, (9, 4))
    seen = []
    for module in pair[1][0].rnns:
        module.module.register_forward_hook(lambda m, i, out: seen.append(out[0].dtype))
    (plain, hidden, *_), (bf16, states, raw, out) = both(
        pair, lambda model, _: model(words, model.init_hidden(4), return_h=True)
    )
    assert seen == [torch.bfloat16] * 2
    assert {t.dtype for t in [bf16, *raw, *out, *sum(states, ())]} == {torch.float32}
    assert not torch.equal(plain, bf16)
    torch.testing.assert_close(plain, bf16, rtol=0, atol=0.02)
    torch.testing.assert_close(sum(hidden, ()), sum(states, ()), rtol=0, atol=0.03)


def test_gru_is_float32_on_a_cpu():
    words = torch.randint(50, (9, 4))
    plain, bf16 = both(twins("GRU"), lambda model, _: model(words, model.init_hidden(4))[0])
    assert torch.equal(plain, bf16)


def test_a_step_updates_float32_weights_by_float32_gradients():
    pair = twins("LSTM")
    words, targets = torch.randint(50, (9, 4)), torch.randint(50, (36,))
    for params in pair:
        args = arguments()
        optimizer = make_optimizer(params, args)
        hidden = params[0].init_hidden(4)
        loss, _ = train_step(Objective(params), optimizer, words, targets, hidden, args)
        assert loss.dtype == torch.float32
    for (name, plain), bf16 in zip(pair[0].named_parameters(), pair[1].parameters()):
        assert bf16.dtype == bf16.grad.dtype == torch.float32
        assert bf16.grad.abs().sum() > 0, name
        error = (plain.grad - bf16.grad).norm() / plain.grad.norm()
        assert error < 0.05, name
    ids = torch.randint(50, (100,))
    plain, bf16 = both(pair, lambda *params: evaluate(torch.nn.ModuleList(params), ids, 5, 7))
    assert plain != bf16
    assert bf16 == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize("precision", [None, "fp32", "bf16"])
def test_the_flag_reaches_the_model_and_the_checkpoint(
    precision, corpus_dir, small, tmp_path, monkeypatch
):
    built = []
    real = main.new_params
    monkeypatch.setattr(main, "new_params", lambda *args: built.append(real(*args)) or built[-1])
    flags = [] if precision is None else ["--precision", precision]
    path = tmp_path / "m.pt"
    status, out, err = invoke(
        main.main, "--data", corpus_dir, *small, "--epochs", 1, "--save", path, *flags,
        "--device", "cpu",
    )
    assert (status, err) == (0, "")
    assert built[0][0].bf16 == (precision == "bf16")
    assert read_checkpoint(path)["flags"]["precision"] == (precision or "fp32")
    assert "test ppl" in out
    # A run that goes on with another is not bit-identical.
    other = "fp32" if precision == "bf16" else "bf16"
    status, out, _ = invoke(main.main, "--resume", path, "--precision", other, "--epochs", 2)
    assert status == 0
    assert f"precision {precision or 'fp32'} -> {other}" in out


def test_tf32_needs_cuda(corpus_dir):
    status, out, err = invoke(
        main.main, "--data", corpus_dir, "--precision", "tf32", "--device", "cpu"
    )
    assert (status, out) == (2, "")
    assert err == "main.py: error: --precision tf32: device cpu has none; leave it out\n"
