"""Dynamic evaluation against the paper's update written out, and that nothing of it stays."""

import pytest
import torch
from torch.nn import functional as F

import weight_drop
from conftest import make_params
from dynamic_evaluation import Rule, read_dynamically, root_mean_square
from train import evaluate

V = 12


@pytest.fixture
def params():
    return make_params(ntoken=V, dtype=torch.float64).eval()


def losses(pieces):
    return -torch.cat([logprob for _, _, logprob in pieces])


def rule(params, name, lr, decay, ids=None, **more):
    statistics = root_mean_square(params, ids) if name == "rms" else None
    return Rule(params, name, lr, decay, root_mean_square=statistics, **more)


def restated(params, ids, segment, name, lr, decay, epsilon, statistics):
    """The losses of ids[1:], with the update as the paper has it, one weight at a time."""
    model, _ = params
    weights = list(params.parameters())
    trained = [weight.detach().clone() for weight in weights]
    hidden, found = model.init_hidden(1), []
    for start in range(0, len(ids) - 1, segment):
        words = ids[start : start + segment + 1]
        hidden = [tuple(part.detach() for part in state) for state in hidden]
        output, hidden = model(words[:-1, None], hidden)
        loss = F.cross_entropy(model.decoder(output), words[1:], reduction="none")
        found.append(loss.detach())
        gradients = torch.autograd.grad(loss.mean(), weights)
        if name == "rms":
            mean = sum(r.mean() for r in statistics) / len(statistics)
        with torch.no_grad():
            for i, (weight, gradient) in enumerate(zip(weights, gradients)):
                if name == "sgd":
                    weight += -lr * gradient + decay * (trained[i] - weight)
                else:
                    r = statistics[i]
                    pull = torch.minimum(decay * r / mean, torch.ones_like(r))
                    weight += -lr * gradient / (r + epsilon) + pull * (trained[i] - weight)
    with torch.no_grad():
        for weight, before in zip(weights, trained):
            weight.copy_(before)
    return torch.cat(found)


@pytest.mark.parametrize(
    ("name", "lr", "decay"),
    [("sgd", 0.5, 0.0), ("sgd", 0.5, 0.2), ("rms", 1e-3, 0.0), ("rms", 1e-3, 0.9)],
)
def test_it_is_the_restatement(name, lr, decay, params):
    ids = torch.randint(V, (43,))
    text = torch.randint(V, (700,))
    statistics = root_mean_square(params, text) if name == "rms" else None
    expected = restated(params, ids, 5, name, lr, decay, 1e-4, statistics)
    moving = rule(params, name, lr, decay, text, epsilon=1e-4)
    found = losses(read_dynamically(params, ids, 5, moving))
    torch.testing.assert_close(found, expected)
    static = losses(read_dynamically(params, ids, 5, rule(params, "sgd", 0.0, 0.0)))
    assert not torch.allclose(found, static, rtol=1e-3)


def test_no_rate_is_plain_evaluation(params):
    ids = torch.randint(V, (43,))
    found = losses(read_dynamically(params, ids, 5, rule(params, "sgd", 0.0, 0.0)))
    assert found.mean().item() == pytest.approx(evaluate(params, ids, 1, 70))
    assert len(found) == 42


def test_recurrent_layers_are_in_training_mode_where_they_have_a_backward_pass(params, monkeypatch):
    """cuDNN's has none in evaluation; weight drop and dropout stay off all the same."""
    real, modes = weight_drop.call_recurrent, []

    def recorded(module, *args):
        assert module.training or not torch.is_grad_enabled()
        modes.append(module.training)
        return real(module, *args)

    monkeypatch.setattr(weight_drop, "call_recurrent", recorded)
    for rnn in params[0].rnns:
        rnn.dropout = 0.5
    params[0].dropout = 0.5
    ids = torch.randint(V, (43,))
    statistics = root_mean_square(params, ids)
    moving = Rule(params, "rms", 0.0, 0.0, root_mean_square=statistics)
    found = losses(read_dynamically(params, ids, 5, moving))
    assert modes and all(modes)
    assert found.mean().item() == pytest.approx(evaluate(params, ids, 1, 70))


def test_the_root_mean_square_of_the_gradients(params):
    text = torch.randint(V, (2 * 12 + 1,))
    model, _ = params
    columns = text[:24].view(2, 12).t()
    squares, hidden, batches = None, model.init_hidden(2), 0
    for start, stop in ((0, 5), (5, 10), (10, 11)):
        hidden = [tuple(part.detach() for part in state) for state in hidden]
        output, hidden = model(columns[start:stop], hidden)
        loss = F.cross_entropy(model.decoder(output), columns[start + 1 : stop + 1].flatten())
        gradients = torch.autograd.grad(loss, list(params.parameters()))
        squares = [g**2 + s for g, s in zip(gradients, squares or [0] * len(gradients))]
        batches += 1
    expected = [(square / batches).sqrt() for square in squares]
    torch.testing.assert_close(root_mean_square(params, text, batch_size=2), expected)
    one = root_mean_square(params, text, batches=1, batch_size=2)
    assert not torch.allclose(one[0], expected[0])
    assert all(weight.grad is None for weight in params.parameters())


@pytest.mark.parametrize("whole", [True, False])
def test_the_weights_are_the_trained_ones_afterwards(whole, params):
    before = [weight.detach().clone() for weight in params.parameters()]
    pieces = read_dynamically(params, torch.randint(V, (43,)), 5, rule(params, "sgd", 1.0, 0.0))
    for _ in range(3):
        next(pieces)
    assert any(not torch.equal(a, b) for a, b in zip(before, params.parameters()))
    if whole:
        list(pieces)
    pieces.close()
    assert all(torch.equal(a, b) for a, b in zip(before, params.parameters()))
    assert all(weight.grad is None for weight in params.parameters())


def test_a_word_does_not_change_the_losses_before_it(params):
    ids = torch.randint(V, (43,))
    changed = ids.clone()
    changed[30] = (ids[30] + 1) % V
    found, other = (
        losses(read_dynamically(params, text, 5, rule(params, "sgd", 0.5, 0.1)))
        for text in (ids, changed)
    )
    assert torch.equal(found[:29], other[:29])  # found[t] is of ids[t + 1]
    assert not torch.allclose(found[29:], other[29:])


def test_it_learns_a_text_that_repeats_itself(params):
    ids = torch.tensor([1, 5, 3, 7, 2, 9]).repeat(30)
    found = losses(read_dynamically(params, ids, 5, rule(params, "sgd", 0.5, 0.0)))
    assert found[-20:].mean() < 0.85 * found[:20].mean()


def test_a_split_softmax_with_tails_that_are_not_read():
    params = make_params(ntoken=V, splits=[4, 8], dtype=torch.float64).eval()
    ids = torch.randint(4, (30,))
    text = torch.randint(4, (60,))
    for name in ("sgd", "rms"):
        found = losses(read_dynamically(params, ids, 5, rule(params, name, 0.1, 0.1, text)))
        assert found.isfinite().all()


@pytest.mark.parametrize("name", ["sgd", "rms"])
def test_everything_is_on_the_models_device(name):
    """On `meta` any tensor that is left on the CPU, and any wait for a value, is an error."""
    params = make_params(ntoken=V).to("meta").eval()
    moving = rule(params, name, 0.1, 0.1, torch.randint(V, (700,)))
    for states, words, logprob in read_dynamically(params, torch.randint(V, (23,)), 5, moving):
        assert states.is_meta
        assert words.is_meta
        assert logprob.is_meta


def test_wrong_rules_are_refused(params):
    with pytest.raises(ValueError, match="rule adam is unknown"):
        Rule(params, "adam", 0.1, 0.1)
    with pytest.raises(ValueError, match="rms needs"):
        Rule(params, "rms", 0.1, 0.1)
