"""--precision: bfloat16 where it is asked for, float32 everywhere else."""

import copy

import pytest
import torch

import flags
import main
import splitcross
import utils
from checkpoint import read_checkpoint
from conftest import arguments, invoke, make_params
from model import RNNModel
from splitcross import SplitCrossEntropyLoss
from train import Objective, make_optimizer, score, train_step


def twins(rnn_type):
    """The same model in float32 and with bf16."""
    plain = make_params(rnn_type)
    bf16 = copy.deepcopy(plain)
    bf16[0].bf16 = True
    return plain, bf16


@pytest.mark.parametrize("rnn_type", ["LSTM", "biLSTM", "GRU"])
def test_in_training_the_layers_and_the_decoder_are_in_bfloat16_and_all_else_in_float32(
    rnn_type, monkeypatch
):
    plain, bf16 = (params[0] for params in twins(rnn_type))
    words, hidden, seen = torch.randint(50, (9, 4)), plain.init_hidden(4), []
    expected, states, *_ = plain(words, hidden, return_h=True)
    name = "gru" if rnn_type == "GRU" else "lstm"
    kernel = getattr(torch, name)

    def spy(x, state, weights, *rest):
        utils.map_hidden(lambda tensor: seen.append(tensor.dtype), (x, state, weights))
        return kernel(x, state, weights, *rest)

    monkeypatch.setattr(torch, name, spy)
    output, new_states, raw, out = bf16(words, hidden, return_h=True)
    assert set(seen) == {torch.bfloat16} == {output.dtype}
    assert {tensor.dtype for tensor in [*raw, *out]} == {torch.float32}
    assert not torch.equal(expected, output.float())
    torch.testing.assert_close(expected, output.float(), rtol=0, atol=0.02)
    torch.testing.assert_close(new_states, states, rtol=0, atol=0.03)  # in float32 too
    assert torch.equal(plain.eval()(words, hidden)[0], bf16.eval()(words, hidden)[0])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("splits", [(), (20, 30)])
def test_of_the_loss_only_the_products_are_in_bfloat16(chunked, splits, monkeypatch):
    """The operands are rounded once, the logits and what comes back through the product too."""
    monkeypatch.setattr(splitcross, "CHUNK_ABOVE", 0 if chunked else 2**26)
    monkeypatch.setattr(splitcross, "CPU_CHUNK_LOGITS", 200)
    criterion = SplitCrossEntropyLoss(8, splits)
    shapes = (50, 8), (50,), (30, 8)
    weight, bias, hiddens = inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    targets = torch.randint(50, (30,))
    found = criterion(weight, bias, hiddens.bfloat16(), targets)
    assert found.dtype == torch.float32
    expected = criterion(*(tensor.double() for tensor in inputs), targets)
    assert 1e-6 < abs(found / expected - 1) < 1e-2
    for gradient, reference in zip(*(torch.autograd.grad(x, inputs) for x in (found, expected))):
        assert gradient.dtype == torch.float32
        assert (gradient - reference).norm() < 1e-2 * reference.norm()


def test_a_step_updates_float32_weights_by_float32_gradients():
    pair = twins("LSTM")
    words, targets, args = torch.randint(50, (9, 4)), torch.randint(50, (36,)), arguments()
    for params in pair:
        optimizer, hidden = make_optimizer(params, args), params[0].init_hidden(4)
        loss, _ = train_step(Objective(params), optimizer, words, targets, hidden, args)
        assert loss.dtype == torch.float32
    for (name, plain), bf16 in zip(pair[0].named_parameters(), pair[1].parameters()):
        assert bf16.dtype == bf16.grad.dtype == torch.float32
        assert 0 < (plain.grad - bf16.grad).norm() < 0.05 * plain.grad.norm(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_flag_reaches_the_model_and_the_checkpoint(
    precision, corpus_dir, small, tmp_path, monkeypatch
):
    built, real, path = [], main.new_params, tmp_path / "m.pt"
    monkeypatch.setattr(main, "new_params", lambda *args: built.append(real(*args)) or built[-1])
    given = [] if precision == "fp32" else ["--precision", precision]  # fp32 is the default here
    status, out, err = invoke(
        main.main, "--data", corpus_dir, *small, "--epochs", 1, "--save", path, "--device", "cpu",
        *given,
    )
    assert (status, err) == (0, "")
    assert built[0][0].bf16 == (precision == "bf16")
    assert read_checkpoint(path)["flags"]["precision"] == precision
    assert "test ppl" in out


@pytest.mark.parametrize(("model", "precision"), [("LSTM", "tf32"), ("GRU", "bf16")])
def test_what_the_device_lacks_is_refused(model, precision):
    given = ["--precision", precision, "--device", "cpu", "--model", model]
    status, out, err = invoke(main.main, *given)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"--precision {precision}: device cpu has none for {model}; give --precision fp32" in err


@pytest.mark.parametrize(
    ("acceptable", "version", "capability", "has"),
    [
        (True, 91300, (8, 0), True), (True, 90800, (9, 0), False), (True, 91300, (7, 5), False),
        (False, 91300, (8, 0), False),
    ],
)
def test_bf16_on_cuda_wants_a_cudnn_that_has_it(acceptable, version, capability, has, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *n, device, dtype: zeros(*n, dtype=dtype))
    monkeypatch.setattr(
        torch, "cudnn_is_acceptable", lambda tensor: tensor.dtype == torch.bfloat16 and acceptable
    )
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert flags.has_precision(torch.device("cuda"), "bf16", "GRU") is has


def products():
    return [getattr(*setting) for setting in utils.PRODUCTS]


@pytest.fixture
def settings():
    """{precision: the settings of products}, which are put back at the end."""
    before, found = products(), {}
    for precision in ("fp32", "tf32", "bf16"):
        utils.set_products(precision)
        found[precision] = products()
    yield found
    for setting, value in zip(utils.PRODUCTS, before):
        setattr(*setting, value)


def test_cudnn_is_not_held_to_float32_where_its_layers_are_in_bfloat16(settings):
    matmul, rnn = zip(*settings.values())
    assert matmul[0] == matmul[2] != matmul[1]
    assert rnn[0] != rnn[1] == rnn[2]


@pytest.mark.parametrize("rnn_type", ["LSTM", "biLM"])
def test_perplexities_are_float32s_whatever_training_is_in(rnn_type, settings, monkeypatch):
    """TF32 is allowed in training alone: neither in evaluation, nor after an error in it."""
    utils.set_products("tf32")
    seen = []

    def fail(self, bsz):
        seen.append(products())
        raise ArithmeticError

    monkeypatch.setattr(RNNModel, "init_hidden", fail)
    with pytest.raises(ArithmeticError):
        score(make_params(rnn_type), torch.randint(50, (60,)), arguments())
    assert products() == settings["tf32"]
    assert seen == [settings["fp32"]]
