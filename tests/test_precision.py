"""--precision: bfloat16 where it is asked for, float32 everywhere else."""

import copy
from argparse import Namespace
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flags
import main
import splitcross
import utils
from checkpoint import read_checkpoint
from conftest import arguments, invoke, make_params
from data import InputError
from model import RNN_TYPES, RNNModel
from splitcross import SplitCrossEntropyLoss
from train import Objective, evaluate_model, make_objective


def twins(rnn_type):
    """The same model in float32 and with bf16."""
    plain = make_params(rnn_type)
    bf16 = copy.deepcopy(plain)
    bf16[0].bf16 = True
    return plain, bf16


class Products(TorchDispatchMode):
    """Notes the dtypes of the matrix products' factors."""

    NAMES = "mm", "addmm", "bmm", "_linear_pointwise", "mkldnn_rnn_layer"

    def __init__(self):
        super().__init__()
        self.factors = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.NAMES:
            matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 2]
            self.factors |= {matrix.dtype for matrix in matrices}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rnn_type", ["LSTM", "biLSTM", "GRU", "QRNN"])
def test_in_training_all_products_are_in_bfloat16_and_all_else_in_float32(rnn_type):
    plain, bf16 = twins(rnn_type)
    words, hidden = torch.randint(50, (9, 4)), plain[0].init_hidden(4)
    expected, states, *_ = plain[0](words, hidden, return_h=True)
    output, new_states, raw, out = bf16[0](words, hidden, return_h=True)
    found = []
    utils.map_hidden(lambda tensor: found.append(tensor.dtype), (*new_states, *raw, *out))
    assert set(found) == {torch.float32}
    for h in raw:  # not even rounded to bfloat16
        assert not torch.equal(h, h.bfloat16().float())
    assert not torch.equal(expected, output.float())
    torch.testing.assert_close(expected, output.float(), rtol=0, atol=0.01)
    torch.testing.assert_close(new_states, states, rtol=0, atol=0.01)
    with Products() as products:
        Objective(bf16)(words, words.flatten(), hidden, 2, 1)[0].backward()
    assert products.factors == {torch.bfloat16}
    with Products() as products:
        assert torch.equal(plain[0].eval()(words, hidden)[0], bf16[0].eval()(words, hidden)[0])
    assert products.factors <= {torch.float32}


def gradients(params, window, dtype, bf16=False):
    """{name: gradient in float64} of a step's objective in that precision."""
    params = copy.deepcopy(params).to(dtype)
    params[0].bf16 = bf16
    words, targets, backward, after = window
    more = (backward, after.flatten()), False
    total, *_ = make_objective(params, arguments(objective="both"))(
        words, targets.flatten(), params[0].init_hidden(words.size(1)), 2, 1,
        *more if params[0].rnn_type == "biLM" else (),
    )
    total.backward()
    return {name: p.grad.double() for name, p in params.named_parameters()}


@pytest.mark.parametrize("rnn_type", RNN_TYPES)
def test_rounding_adds_noise_to_the_gradients_and_no_bias(rnn_type):
    """The weights are rounded before: the same in all windows, that would be no noise."""
    params = make_params(rnn_type, emsize=24, nhid=40)
    for parameter in params.parameters():
        parameter.data.normal_(std=0.3)
        parameter.data.copy_(parameter.data.bfloat16())
    total, norms = Counter(), Counter()
    for _ in range(20):
        window = torch.randint(50, (4, 20, 4))
        expected = gradients(params, window, torch.float64)
        fp32 = gradients(params, window, torch.float32)
        bf16 = gradients(params, window, torch.float32, bf16=True)
        for name, reference in expected.items():
            error = bf16[name] - reference
            assert (fp32[name] - reference).norm() < 1e-5 * reference.norm(), name
            assert error.norm() < 1e-2 * reference.norm(), name
            total[name] = total[name] + error
            norms[name] += error.norm()
    for name, error in total.items():
        assert 0 < error.norm() < 0.75 * norms[name], name  # of pure noise 1 / sqrt(20)


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_flag_reaches_the_model_and_the_checkpoint(
    precision, corpus_dir, small, tmp_path, monkeypatch, with_bf16
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


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "QRNN"])
def test_a_run_in_bfloat16_is_resumed_bit_for_bit(rnn_type, corpus_dir, small, tmp_path, with_bf16):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    flags = ["--data", corpus_dir, *small, "--model", rnn_type, "--precision", "bf16"]
    for argv in (
        [*flags, "--save", whole, "--epochs", 2], [*flags, "--save", parts, "--epochs", 1],
        ["--resume", parts, "--epochs", 2],
    ):
        status, _, err = invoke(main.main, *argv)
        assert (status, err) == (0, "")
    whole, parts = (read_checkpoint(path)["model"] for path in (whole, parts))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("torch_has_it", [True, False])
def test_a_processor_that_emulates_bfloat16_is_refused(
    torch_has_it, corpus_dir, small, tmp_path, monkeypatch
):
    path = tmp_path / "m.pt"
    begin = ["--data", corpus_dir, *small, "--save", path, "--precision", "bf16", "--epochs", 1]
    with monkeypatch.context() as patch:
        patch.setattr("flags.has_bf16_products", lambda: True)
        assert invoke(main.main, *begin)[0] == 0
    if torch_has_it:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    else:
        monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    resume = ["--resume", path, "--epochs", 2]
    for argv in (begin, resume):
        status, out, err = invoke(main.main, *argv)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "--precision bf16: this processor only emulates bfloat16" in err
    status, _, err = invoke(main.main, *resume, "--precision", "fp32")
    assert (status, err) == (0, "")


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
    assert flags.has_precision(torch.device("cuda"), "bf16") is has


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


def test_where_cuda_has_no_bfloat16_the_message_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(flags, "has_precision", lambda device, precision: False)
    args = Namespace(device=torch.device("cuda"), precision="bf16")
    with pytest.raises(InputError, match=r"cuDNN 9\.13 .* 8\.0.*use --precision tf32$"):
        flags.resolve_precision(args, is_given=True)


def test_cudnn_is_not_held_to_float32_where_its_layers_are_in_bfloat16(settings):
    matmul, rnn = zip(*settings.values())
    assert matmul[0] == matmul[2] != matmul[1]
    assert rnn[0] != rnn[1] == rnn[2]


@pytest.mark.parametrize("rnn_type", ["LSTM", "biLM"])
def test_evaluation_is_always_in_float32(rnn_type, settings, monkeypatch):
    """TF32 is allowed in training alone: neither in evaluation, nor after an error in it."""
    utils.set_products("tf32")
    seen = []

    def fail(self, bsz):
        seen.append(products())
        raise ArithmeticError

    monkeypatch.setattr(RNNModel, "init_hidden", fail)
    with pytest.raises(ArithmeticError):
        evaluate_model(make_params(rnn_type), torch.randint(50, (60,)), arguments())
    assert products() == settings["tf32"]
    assert seen == [settings["fp32"]]
