"""Dynamic evaluation against the paper's update written out; the weights come back."""

import pytest
import torch
from torch.nn import functional as F

from conftest import make_params
from dynamic_evaluation import Rule, read, root_mean_square
from train import evaluate

V = 12


@pytest.fixture
def params():
    return make_params(ntoken=V, dtype=torch.float64).eval()


def losses(params, ids, *settings, **more):
    """-log p of ids[1:], read in segments of 5 words."""
    pieces = read(params, ids, 5, Rule(params, *settings, **more))
    return -torch.cat([logprob for *_, logprob in pieces])


def gradients_of_windows(params, columns, length):
    """Yields (the loss of each word, the gradients of its mean) by window of `columns` [T, B]."""
    model, hidden = params[0], params[0].init_hidden(columns.size(1))
    for start in range(0, len(columns) - 1, length):
        window = columns[start : start + length + 1]
        hidden = [tuple(part.detach() for part in state) for state in hidden]
        output, hidden = model(window[:-1], hidden)
        loss = F.cross_entropy(model.decoder(output), window[1:].flatten(), reduction="none")
        yield loss.detach(), torch.autograd.grad(loss.mean(), list(params.parameters()))


@pytest.mark.parametrize(
    ("name", "lr", "decay"),
    [("sgd", 0.5, 0.0), ("sgd", 0.5, 0.2), ("rms", 1e-3, 0.0), ("rms", 1e-3, 0.9)],
)
def test_the_update_matches_the_paper(name, lr, decay, params):
    ids = torch.randint(V, (43,))
    weights = list(params.parameters())
    trained = [weight.detach().clone() for weight in weights]
    rms = root_mean_square(params, torch.randint(V, (700,))) if name == "rms" else None
    found = losses(params, ids, lr, decay, 1e-4, rms)
    assert all(map(torch.equal, weights, trained))

    expected = []
    for loss, gradients in gradients_of_windows(params, ids[:, None], 5):
        expected.append(loss)
        with torch.no_grad():
            for i, (weight, gradient) in enumerate(zip(weights, gradients)):
                step, pull = gradient, decay
                if rms:
                    step = gradient / (rms[i] + 1e-4)
                    mean = sum(r.mean() for r in rms) / len(rms)
                    pull = torch.minimum(decay * rms[i] / mean, torch.ones_like(weight))
                weight += -lr * step + pull * (trained[i] - weight)
    torch.testing.assert_close(found, torch.cat(expected))
    assert not all(map(torch.equal, weights, trained))


def test_the_weights_are_restored_where_reading_is_cut_short(params):
    before = [weight.detach().clone() for weight in params.parameters()]
    pieces = read(params, torch.randint(V, (43,)), 5, Rule(params, 1.0, 0.0))
    next(pieces), next(pieces)
    assert not all(map(torch.equal, before, params.parameters()))
    pieces.close()
    assert all(map(torch.equal, before, params.parameters()))


def test_weight_drop_and_dropout_stay_off(params):
    """Though recurrent layers are in training mode: cuDNN's have no backward pass in evaluation."""
    for module in (params[0], *params[0].rnns):
        module.dropout = 0.5
    ids = torch.randint(V, (43,))
    found = losses(params, ids, 0.0, 0.0, root_mean_square=root_mean_square(params, ids))
    assert all(layer.module.training for layer in params[0].rnns)
    assert len(found) == 42
    assert found.mean().item() == pytest.approx(evaluate(params, ids, 1, 70))


def test_the_root_mean_square_of_the_gradients(params):
    text = torch.randint(V, (2 * 12 + 1,))
    windows = [g for _, g in gradients_of_windows(params, text[:24].view(2, 12).t(), 5)]
    expected = [torch.stack(gs).square().mean(0).sqrt() for gs in zip(*windows)]
    torch.testing.assert_close(root_mean_square(params, text, batch_size=2), expected)
    first = [gradient.abs() for gradient in windows[0]]
    torch.testing.assert_close(root_mean_square(params, text, 1, batch_size=2), first)


def test_a_split_softmax_with_tails_that_are_not_read():
    params = make_params(ntoken=V, splits=[4, 8], dtype=torch.float64)
    ids = torch.randint(4, (60,))
    for rms in (None, root_mean_square(params, ids)):
        assert losses(params, ids, 0.1, 0.1, root_mean_square=rms).isfinite().all()
