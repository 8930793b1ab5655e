"""The stack: sizes, initialization, interface, and the regularizers' places in it."""

import pytest
import torch

from model import RNNModel
from utils import repackage_hidden


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("rnn_type", "ntoken", "nlayers", "expected"),
    [
        ("LSTM", 10_000, 3, 24_221_600),
        ("LSTM", 33_278, 3, 33_556_078),
        ("GRU", 10_000, 3, 19_168_700),
        ("GRU", 33_278, 3, 28_503_178),
        ("GRU", 10_000, 5, 35_052_500),
        ("biLSTM", 10_000, 3, 18_611_600),
        ("biLSTM", 33_278, 3, 27_946_078),
    ],
)
def test_published_parameter_counts(rnn_type, ntoken, nlayers, expected):
    with torch.device("meta"):
        model = RNNModel(rnn_type, ntoken, 400, 1150, nlayers, tie_weights=True)
    assert parameters(model) == expected


def small(rnn_type="LSTM", **rates):
    rates = {"dropout": 0, "dropouth": 0, "dropouti": 0, "dropoute": 0, "wdrop": 0, **rates}
    return RNNModel(rnn_type, 50, 8, 12, 3, tie_weights=True, **rates)


def test_initialization():
    model = RNNModel("LSTM", 5000, 20, 30, 2, tie_weights=True)
    assert model.decoder.weight is model.encoder.weight
    weight = model.encoder.weight.detach()
    assert weight.abs().max() <= 0.1
    assert weight.mean().abs() < 1e-3
    assert weight.std() == pytest.approx(0.2 / 12**0.5, rel=0.02)  # of a uniform distribution
    assert (model.decoder.bias == 0).all()
    untied = RNNModel("LSTM", 5000, 20, 30, 2)
    assert untied.decoder.weight.shape == (5000, 30)
    assert 0.099 < untied.decoder.weight.abs().max() <= 0.1


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "biLSTM"])
def test_interface(rnn_type):
    model = small(rnn_type, dropout=0.5)
    hidden = model.init_hidden(4)
    words = torch.randint(50, (7, 4))
    output, new_hidden = model(words, hidden)
    assert output.shape == (7 * 4, 8)
    assert len(hidden) == len(new_hidden) == 3
    for before, after in zip(hidden, new_hidden):
        pairs = [(before, after)] if rnn_type == "GRU" else zip(before, after)
        for b, a in pairs:
            assert b.shape == a.shape
            assert not b.any()
    output, _, raw_outputs, outputs = model(words, hidden, return_h=True)
    assert [tuple(h.shape) for h in raw_outputs] == [(7, 4, 12), (7, 4, 12), (7, 4, 8)]
    assert torch.equal(output, outputs[-1].view(28, 8))
    assert torch.equal(outputs[0], raw_outputs[0])  # dropouth is 0
    kept = outputs[-1] != 0
    torch.testing.assert_close(outputs[-1][kept], raw_outputs[-1][kept] * 2)
    assert not kept.all()
    detached = repackage_hidden(new_hidden)
    assert not any(t.requires_grad for state in detached for t in state)


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU"])
def test_state_carries_the_context_over_windows(rnn_type):
    model = small(rnn_type).eval()
    words = torch.randint(50, (12, 3))
    whole, _ = model(words, model.init_hidden(3))
    first, hidden = model(words[:5], model.init_hidden(3))
    second, _ = model(words[5:], hidden)
    torch.testing.assert_close(torch.cat([first, second]), whole)


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "biLSTM"])
@pytest.mark.parametrize("rate", ["dropout", "dropouth", "dropouti", "dropoute", "wdrop"])
def test_each_rate_acts_in_training_and_not_in_evaluation(rnn_type, rate):
    model = small(rnn_type, **{rate: 0.5})
    words = torch.randint(50, (6, 3))
    hidden = model.init_hidden(3)
    with torch.no_grad():
        plain = model.eval()(words, hidden)[0]
        assert torch.equal(model(words, hidden)[0], plain)
        first, second = (model.train()(words, hidden)[0] for _ in range(2))
        assert not torch.allclose(first, second)
        assert not torch.allclose(first, plain)
        assert torch.equal(model.eval()(words, hidden)[0], plain)
        undropped = small(rnn_type)
        undropped.load_state_dict(model.state_dict())
        torch.testing.assert_close(undropped.train()(words, hidden)[0], plain)


def test_bilstm_drops_the_recurrent_weights_of_both_directions():
    model = small("biLSTM", wdrop=0.5)
    for rnn in model.rnns:
        assert rnn.weights == ["weight_hh_l0", "weight_hh_l0_reverse"]
        x = torch.randn(5, 2, rnn.module.input_size)
        forward, backward = (rnn(x)[0] - rnn(x)[0]).abs().amax(dim=1).chunk(2, dim=1)
        # Each direction's first step, at its own end of the sequence, has no state to drop from.
        assert (forward.amax(dim=1) > 0).tolist() == [False, True, True, True, True]
        assert (backward.amax(dim=1) > 0).tolist() == [True, True, True, True, False]


def test_gradient_reaches_every_parameter():
    for rnn_type in ("LSTM", "GRU", "biLSTM"):
        model = RNNModel(rnn_type, 50, 8, 12, 3, 0.4, 0.3, 0.4, 0.1, 0.5, tie_weights=True)
        output, _ = model(torch.randint(50, (6, 3)), model.init_hidden(3))
        model.decoder(output).logsumexp(dim=1).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("QRNN", 50, 8, 12, 3), "QRNN is not supported yet"),
        (("TRANSFORMER", 50, 8, 12, 3), "TRANSFORMER is unknown"),
        (("biLSTM", 50, 8, 13, 3), "nhid 13 is odd"),
        (("biLSTM", 50, 9, 12, 3), "emsize 9 is odd"),
    ],
)
def test_what_cannot_be_built_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RNNModel(*arguments, tie_weights=True)
