"""No model but the report's biLSTM has seen the word that it predicts.

Two checks, since each alone can miss a leak: the gradient of the logits with respect to the
embedded input (a tied matrix has a gradient anyway, so not with respect to the matrix), and the
logits after another word is put there (a path that is detached hides from the gradient).
"""

import pytest
import torch

import model as model_module
from bidirectional import BiLM, make_model

T, B, V, E = 9, 2, 30, 8


def build(rnn_type, attention="none", nlayers=2):
    torch.manual_seed(1)
    built = make_model(
        rnn_type, V, E, 12, nlayers, tie_weights=True, attention=attention, attention_window=4
    )
    return built.double().eval()


def forward_logits(built, words):
    return built.decoder(built(words, built.init_hidden(B))[0]).view(T, B, V)


def backward_logits(built, words):
    """The backward language model's, at the places of the text, which it reads from its end."""
    hidden = built.init_hidden(B)[len(built.rnns) :]
    return built.decoder(built.read_backward(words.flip(0), hidden)[0]).view(T, B, V).flip(0)


def cloze_logits(built, words):
    """At t: of word t + 1, from the words up to t and from t + 2 on."""
    layers, hidden = len(built.rnns), built.init_hidden(B)
    before = built(words, hidden[:layers])[0].view(T, B, E)
    after = built.read_backward(words.flip(0), hidden[layers:])[0].view(T, B, E).flip(0)
    after = torch.cat([after[2:], after.new_zeros(2, B, E)])
    return built.decoder(built.combine(before, after))


def seen(built, logits, place, monkeypatch):
    """The places of the input that the logits at `place` depend on: (by gradient, by change)."""
    words = torch.randint(V, (T, B))
    embedded = []

    def recorded(embed, ids, dropout):
        embedded.append((embed(ids).detach().requires_grad_(), ids))
        return embedded[-1][0]

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "embedded_dropout", recorded)
        out = logits(built, words)[place]
        gradients = torch.autograd.grad(
            out.square().sum(), [x for x, _ in embedded], allow_unused=True
        )
    by_gradient = set()
    for gradient, (_, ids) in zip(gradients, embedded):
        if gradient is not None:
            reversed_order = not torch.equal(ids, words)
            for t in gradient.abs().sum((1, 2)).nonzero().flatten().tolist():
                by_gradient.add(T - 1 - t if reversed_order else t)
    by_change = set()
    for t in range(T):
        changed = words.clone()
        changed[t] = (changed[t] + 1 + torch.randint(V - 1, (B,))) % V
        with torch.no_grad():
            if not torch.equal(logits(built, changed)[place], logits(built, words)[place]):
                by_change.add(t)
    return by_gradient, by_change


ONE_DIRECTIONAL = [
    ("LSTM", "none"), ("GRU", "none"), ("LSTM", "single"), ("LSTM", "combined"),
    ("GRU", "combined"), ("biLM", "none"),
]


@pytest.mark.parametrize(("rnn_type", "attention"), ONE_DIRECTIONAL)
def test_a_language_model_sees_all_words_before_the_one_it_predicts_and_no_other(
    rnn_type, attention, monkeypatch
):
    built = build(rnn_type, attention)
    for place in (0, 4, T - 1):  # predicts the word at place + 1
        earlier = set(range(place + 1))
        assert seen(built, forward_logits, place, monkeypatch) == (earlier, earlier)


def test_the_backward_language_model_sees_all_words_after_and_no_other(monkeypatch):
    built = build("biLM")
    for place in (0, 4, T - 1):  # predicts the word at place - 1
        later = set(range(place, T))
        assert seen(built, backward_logits, place, monkeypatch) == (later, later)


def test_cloze_prediction_sees_all_words_but_the_one_it_predicts(monkeypatch):
    built = build("biLM")
    for place in (0, 4, T - 2):
        others = set(range(T)) - {place + 1}
        assert seen(built, cloze_logits, place, monkeypatch) == (others, others)


@pytest.mark.parametrize("nlayers", [1, 2])
def test_the_reports_bilstm_has_seen_its_answer(nlayers, monkeypatch):
    """It leaks from its first layer on: half of its output comes from the words ahead."""
    built = build("biLSTM", nlayers=nlayers)
    everything = set(range(T))
    assert seen(built, forward_logits, 4, monkeypatch) == (everything, everything)


def test_within_the_reports_bilstm_the_forward_half_leaks_from_the_second_layer_on():
    built = build("biLSTM", nlayers=3)
    words = torch.randint(V, (T, B))
    changed = words.clone()
    changed[5] = (words[5] + 1) % V
    before, after = (built(w, built.init_hidden(B), return_h=True)[2] for w in (words, changed))
    for layer, (a, b) in enumerate(zip(before, after)):
        half = a.size(-1) // 2
        forward_same = torch.equal(a[4, :, :half], b[4, :, :half])
        assert forward_same == (layer == 0)
        assert not torch.equal(a[4, :, half:], b[4, :, half:])  # the backward half, everywhere


def test_the_stacks_of_bilm_never_mix_below_the_output():
    """The forward model is the same whatever the backward stack's weights, and the reverse."""
    built = build("biLM")
    assert isinstance(built, BiLM)
    words = torch.randint(V, (T, B))
    forward, backward = forward_logits(built, words), backward_logits(built, words)
    for parameter in built.backward_rnns.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.equal(forward_logits(built, words), forward)
    changed = backward_logits(built, words)
    assert not torch.equal(changed, backward)
    for parameter in built.rnns.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.equal(backward_logits(built, words), changed)
