"""The stack: sizes, initialization, interface, the regularizers' places, and what it has seen."""

import pytest
import torch
from torch import nn

from bidirectional import make_model
from model import RNNModel
from utils import map_hidden, repackage_hidden

T, B, V, E = 9, 2, 30, 8
ZERO = dict.fromkeys(("dropout", "dropouth", "dropouti", "dropoute", "wdrop"), 0)


def small(rnn_type="LSTM", nlayers=3, **settings):
    return make_model(rnn_type, V, E, 12, nlayers, tie_weights=True, **{**ZERO, **settings})


@pytest.mark.parametrize(
    ("rnn_type", "ntoken", "nlayers", "expected"),
    [
        ("LSTM", 10_000, 3, 24_221_600),
        ("GRU", 10_000, 3, 19_168_700),
        ("GRU", 10_000, 5, 35_052_500),
        ("biLSTM", 10_000, 3, 18_611_600),
    ],
)
def test_published_parameter_counts(rnn_type, ntoken, nlayers, expected):
    with torch.device("meta"):
        model = RNNModel(rnn_type, ntoken, 400, 1150, nlayers, tie_weights=True)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_initialization():
    model = RNNModel("LSTM", 5000, 20, 30, 2, tie_weights=True)
    assert model.decoder.weight is model.encoder.weight
    assert not model.decoder.bias.any()
    untied = RNNModel("LSTM", 5000, 20, 30, 2).decoder.weight
    for weight in (model.encoder.weight, untied):
        assert weight.abs().max() <= 0.1
        assert weight.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.02)  # if uniform


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "biLSTM"])
def test_interface(rnn_type):
    model = small(rnn_type)
    words, hidden = torch.randint(V, (7, 4)), model.init_hidden(4)
    output, _, raw_outputs, outputs = model(words, hidden, return_h=True)
    assert [tuple(h.shape) for h in raw_outputs] == [(7, 4, 12), (7, 4, 12), (7, 4, E)]
    assert all(map(torch.equal, raw_outputs, outputs))  # all rates are 0
    assert torch.equal(output, outputs[-1].flatten(0, 1))
    _, new_hidden = model(words, hidden)
    detached = repackage_hidden(tuple(new_hidden))
    map_hidden(torch.Tensor.numpy, detached)  # which is refused where a gradient is attached
    torch.testing.assert_close(tuple(hidden), map_hidden(torch.zeros_like, detached))


def test_bilstm_drops_the_recurrent_weights_of_both_directions():
    for rnn in small("biLSTM", wdrop=0.5).rnns:
        x = torch.randn(5, 2, rnn.module.input_size)
        forward, backward = (rnn(x)[0] != rnn(x)[0]).any(dim=1).chunk(2, dim=1)
        # Each direction's first step, at its own end of the sequence, has no state to drop from.
        assert forward.any(dim=1).tolist() == [False, True, True, True, True]
        assert backward.any(dim=1).tolist() == [True, True, True, True, False]


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(ValueError, match="QRNN is not supported yet"):
        RNNModel("QRNN", 50, 8, 12, 3)


# ------------------------------------------------------------ no leak


def forward_logits(model, words):
    return model.decoder(model(words, model.init_hidden(B))[0]).view(T, B, V)


def states_after(model, words):
    """The backward language model's [T, B, E], at the places of the text, read from its end."""
    hidden = model.init_hidden(B)[len(model.rnns) :]
    return model.read_backward(words.flip(0), hidden)[0].view(T, B, E).flip(0)


def backward_logits(model, words):
    return model.decoder(states_after(model, words))


def cloze_logits(model, words):
    """At t: of word t + 1, from the words up to t and from t + 2 on."""
    before = model(words, model.init_hidden(B))[0].view(T, B, E)
    after = torch.cat([states_after(model, words)[2:], torch.zeros(2, B, E)])
    return model.decoder(model.combine(before, after))


def seen(model, logits, place):
    """The places of the input that the logits at `place` depend on: (by gradient, by change).

    Each check alone can miss a leak: by change is found what a detached path hides.
    """
    shuffled = torch.randperm(V)
    words = shuffled[: T * B].view(T, B)  # each word once, so its gradient tells its place
    found = logits(model, words)[place]
    [gradient] = torch.autograd.grad(found.square().sum(), [model.encoder.weight])
    by_gradient = set(gradient[words].abs().sum((1, 2)).nonzero().flatten().tolist())
    by_change = set()
    for t in range(T):
        changed = words.clone()
        changed[t] = shuffled[-B:]
        if not torch.equal(logits(model, changed)[place], found):
            by_change.add(t)
    return by_gradient, by_change


ONE_WAY = (forward_logits, lambda t: range(t + 1))  # predicts word t + 1


@pytest.mark.parametrize(("rnn_type", "attention", "logits", "sees"), [
    ("LSTM", "none", *ONE_WAY), ("GRU", "none", *ONE_WAY), ("LSTM", "single", *ONE_WAY),
    ("LSTM", "combined", *ONE_WAY), ("GRU", "combined", *ONE_WAY), ("biLM", "none", *ONE_WAY),
    ("biLM", "none", backward_logits, lambda t: range(t, T)),  # predicts word t - 1
    ("biLM", "none", cloze_logits, lambda t: {*range(T)} - {t + 1}),
    ("biLSTM", "none", forward_logits, lambda t: range(T)),  # the report's has seen its answer
])
def test_a_prediction_has_seen_all_of_its_context_and_nothing_else(
    rnn_type, attention, logits, sees
):
    model = small(rnn_type, 2, attention=attention, attention_window=4).double()
    model.decoder.weight = nn.Parameter(model.decoder.weight.detach().clone())  # untied
    for place in (0, 4, T - 2, T - 1):
        assert seen(model, logits, place) == (set(sees(place)),) * 2
