"""--precision: bfloat16 where it is asked for, float32 everywhere else."""

import pytest
import torch

import flags
import main
import splitcross
from conftest import arguments, invoke, make_params
from train import score
from model import RNNModel
from splitcross import SplitCrossEntropyLoss
from train import Objective, evaluate, make_optimizer, train_step
from checkpoint import read_checkpoint


def twins(rnn_type):
    """The same model in float32 and with bf16."""
    plain, bf16 = make_params(rnn_type), make_params(rnn_type)
    bf16.load_state_dict(plain.state_dict())
    bf16[0].bf16 = True
    return plain, bf16


def both(pair, function):
    return [function(*params) for params in pair]


@pytest.mark.parametrize("rnn_type", ["LSTM", "biLSTM", "GRU"])
def test_in_training_the_layers_and_the_decoder_are_in_bfloat16_and_all_else_in_float32(
    rnn_type, monkeypatch
):
    plain, bf16 = twins(rnn_type)
    words = torch.randint(50, (9, 4))
    seen = []
    for name in ("lstm", "gru"):
        kernel = getattr(torch, name)

        def spy(x, state, weights, *rest, kernel=kernel):
            state = [state] if isinstance(state, torch.Tensor) else state
            seen.extend(t.dtype for t in [x, *state, *weights])
            return kernel(x, state if len(state) > 1 else state[0], weights, *rest)

        monkeypatch.setattr(torch, name, spy)
    hidden = plain[0].init_hidden(4)
    expected, states, *_ = plain[0](words, hidden, return_h=True)
    seen.clear()
    output, new_states, raw, out = bf16[0](words, hidden, return_h=True)
    assert seen and set(seen) == {torch.bfloat16} == {output.dtype}
    flat = [sum(h, ()) if rnn_type != "GRU" else h for h in (states, new_states)]
    assert {t.dtype for t in [*raw, *out, *flat[1]]} == {torch.float32}
    assert not torch.equal(expected, output.float())
    torch.testing.assert_close(expected, output.float(), rtol=0, atol=0.02)
    torch.testing.assert_close(*flat, rtol=0, atol=0.03)
    plain.eval(), bf16.eval()
    assert torch.equal(plain[0](words, hidden)[0], bf16[0](words, hidden)[0])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("splits", [(), (20, 30)])
def test_of_the_loss_only_the_products_are_in_bfloat16(chunked, splits, monkeypatch):
    """The operands are rounded once, the logits and what comes back through the product too."""
    monkeypatch.setattr(splitcross, "CHUNK_ABOVE", 0 if chunked else 2**26)
    monkeypatch.setattr(splitcross, "CPU_CHUNK_LOGITS", 200)
    criterion = SplitCrossEntropyLoss(8, splits)
    weight, bias = torch.randn(50, 8, requires_grad=True), torch.randn(50, requires_grad=True)
    hiddens, targets = torch.randn(30, 8, requires_grad=True), torch.randint(50, (30,))
    found = criterion(weight, bias, hiddens.bfloat16(), targets)
    assert found.dtype == torch.float32
    gradients = torch.autograd.grad(found, (weight, bias, hiddens))
    expected = criterion(weight.double(), bias.double(), hiddens.double(), targets)
    assert found.item() != pytest.approx(expected.item(), rel=1e-6)
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
    for gradient, reference in zip(
        gradients, torch.autograd.grad(expected, (weight, bias, hiddens))
    ):
        assert gradient.dtype == torch.float32
        assert (gradient - reference).norm() < 1e-2 * reference.norm()


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
    before = evaluate(pair[1], ids, 5, 7)
    pair[1][0].bf16 = False
    assert evaluate(pair[1], ids, 5, 7) == before


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


@pytest.mark.parametrize(("model", "precision"), [("LSTM", "tf32"), ("GRU", "bf16")])
def test_what_the_device_lacks_is_refused(model, precision, corpus_dir):
    status, out, err = invoke(
        main.main, "--data", corpus_dir, "--precision", precision, "--device", "cpu",
        "--model", model,
    )
    assert (status, out) == (2, "")
    assert err == (
        f"main.py: error: --precision {precision}: device cpu has none for {model}; give "
        "--precision fp32\n"
    )


@pytest.mark.parametrize("acceptable", [False, True])
def test_bf16_on_cuda_wants_a_cudnn_that_has_it(acceptable, monkeypatch):
    asked = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *n, device, dtype: zeros(*n, dtype=dtype))
    monkeypatch.setattr(
        torch, "cudnn_is_acceptable", lambda tensor: asked.append(tensor.dtype) or acceptable
    )
    for version, capability, has in ((91300, (8, 0), True), (90800, (9, 0), False),
                                     (91300, (7, 5), False)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, capability=capability: capability
        )
        found = flags.has_precision(torch.device("cuda"), "bf16", "GRU")
        assert found is (acceptable and has)
    assert asked == [torch.bfloat16] * 3


def test_cudnn_is_not_held_to_float32_where_its_layers_are_in_bfloat16():
    before = settings()
    try:
        found = {}
        for precision in ("fp32", "tf32", "bf16"):
            utils.set_products(precision)
            found[precision] = settings()
    finally:
        for setting, value in zip(utils.PRODUCTS, before):
            setattr(*setting, value)
    matmul, rnn = zip(*found.values())
    assert matmul[0] == matmul[2] != matmul[1]
    assert rnn[0] != rnn[1] == rnn[2]


def settings():
    return [getattr(*setting) for setting in utils.PRODUCTS]


def test_perplexities_are_float32s_whatever_training_is_in(monkeypatch):
    """TF32 is allowed in training alone: neither in evaluation, nor after an error in it."""
    before = settings()
    try:
        utils.set_products("tf32")
        training = settings()
        seen = []

        def fail(self, bsz):
            seen.append(settings())
            raise ArithmeticError

        monkeypatch.setattr(RNNModel, "init_hidden", fail)
        for rnn_type in ("LSTM", "biLM"):
            with pytest.raises(ArithmeticError):
                score(make_params(rnn_type), torch.randint(50, (60,)), arguments())
        assert settings() == training
        utils.set_products("fp32")
        assert seen == [settings()] * 2 != [training] * 2
    finally:
        for setting, value in zip(utils.PRODUCTS, before):
            setattr(*setting, value)
