"""biLM: its three losses against plain restatements, and what each objective trains."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bidirectional import OBJECTIVES, BiObjective, evaluate_directions
from conftest import arguments, make_params, reversed_text
from train import evaluate_model, make_optimizer, train_step

V, E = 20, 8


@pytest.fixture
def params():
    return make_params("biLM", V, dtype=torch.float64)


def states(model, words, backward=False):
    """[T, B, E]: the state after reading each of `words` [T, B], from a zero state."""
    read = model.read_backward if backward else model
    return read(words, model.init_hidden(words.size(1))[:2])[0].view(*words.shape, E)


def nll(model, output, targets):
    return F.cross_entropy(model.decoder(output).flatten(0, -2), targets.flatten())


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_evaluation_is_over_whole_columns(params, columns):
    """Whatever the window: every word from all before it in its column, all after it, or both."""
    model, _ = params
    ids = torch.randint(V, (23, 1))

    def read(words, backward=False):
        parts = words[:-1].tensor_split(columns)
        return torch.cat([states(model, part, backward) for part in parts])

    before, after = read(ids), read(ids.flip(0), backward=True).flip(0)
    beyond = torch.cat([after[1:], torch.zeros_like(after[:1])])
    expected = {
        "forward": nll(model, before, ids[1:]),
        "backward": nll(model, after, ids[:-1]),
        "cloze": nll(model, model.combine(before, beyond), ids[1:]),
    }
    expected = {name: pytest.approx(loss.item()) for name, loss in expected.items()}
    for bptt in (3, 7, 40):
        found = evaluate_directions(params, ids.flatten(), columns, bptt)
        assert found == expected
    for objective, names in OBJECTIVES.items():
        args = arguments(objective=objective)
        loss, parts = evaluate_model(params, ids.flatten(), args, batch_size=columns)
        assert parts == expected
        assert loss == pytest.approx(sum(found[name] for name in names) / len(names))


def test_the_combiner_begins_as_the_product_of_both_predictions(params):
    """p(w | before, after) ~ p(w | before) p(w | after) / p(w), as long as tanh is linear."""
    model, _ = params
    model.decoder.bias.data.normal_()
    before, after = 1e-4 * torch.randn(2, 5, E, dtype=torch.float64)
    prior = model.decoder.bias.log_softmax(0)
    both = model.decoder(before).log_softmax(-1) + model.decoder(after).log_softmax(-1)
    found = model.decoder(model.combine(before, after)).log_softmax(-1)
    torch.testing.assert_close(found, (both - prior).log_softmax(-1), rtol=1e-9, atol=1e-9)
    # It is not so for what the states do not say.
    assert (found - prior).abs().max() > 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("is_first_window", [False, True])
@pytest.mark.parametrize(("length", "margin", "first"), [(25, 10, 10), (9, 4, 4), (2, 1, 0)])
def test_a_step_minimizes_what_the_objective_names(
    params, objective, is_first_window, length, margin, first
):
    model, _ = params
    text, turned = torch.randint(V, (2, length + 1, 3))
    before = states(model, text[:-1])
    after = states(model, text[1:].flip(0), backward=True).flip(0)
    turned_states = states(model, turned[:-1], backward=True)
    # Target t is word t + 1: what follows it is read from word t + 2 on.
    first, last = (first if is_first_window else 0), length - margin
    combined = model.combine(before[first:last], after[first + 1 : last + 1])
    losses = {
        "forward": nll(model, before, text[1:]),
        "backward": nll(model, turned_states, turned[1:]),
        "cloze": nll(model, combined, text[1:][first:last]),
    }
    names = OBJECTIVES[objective]
    whole = sum(losses[name] for name in names)
    read = {"forward": before, "backward": turned_states, "cloze": after}
    regularized = [before, *(read[name] for name in names if name != "forward")]
    penalty = sum(2 * h.square().mean() + h.diff(dim=0).square().mean() for h in regularized)
    gradients = torch.autograd.grad(whole + penalty, list(params.parameters()), allow_unused=True)
    total, loss, hidden = BiObjective(params, objective)(
        text[:-1], text[1:].flatten(), model.init_hidden(3), 2, 1,
        (turned[:-1], turned[1:].flatten()), is_first_window,
    )
    assert loss.item() == pytest.approx(whole.item() / len(names))
    total.backward()
    for (name, parameter), expected in zip(params.named_parameters(), gradients):
        if "combiner" in name and objective == "lm":  # it learns, and changes nothing else
            assert expected is None
            assert parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, expected)
    moved = [bool(h.any()) for h, _ in hidden]
    assert moved == [True, True, objective != "cloze", objective != "cloze"]


def test_with_lm_the_combiner_learns_and_the_language_models_do_not_notice():
    """Not by its gradient's part in the norm that is clipped, nor by the split softmax."""
    words, targets = torch.randint(V, (21, 3)), torch.randint(V, (63,))
    after = []
    for scale in (1, 3):
        torch.manual_seed(0)
        params = make_params("biLM", V, splits=[6], dtype=torch.float64)
        model, args = params[0], arguments(clip=0.05)
        model.combiner.weight.data.mul_(scale)
        train_step(
            BiObjective(params, "lm"), make_optimizer(params, args), words, targets,
            model.init_hidden(3), args, **reversed_text(params, words, targets),
        )
        norm = nn.utils.get_total_norm([p.grad for p in model.combiner.parameters()])
        assert 0 < norm < 0.0501
        after.append([p for name, p in params.named_parameters() if "combiner" not in name])
    assert all(map(torch.equal, *after))


def test_its_forward_half_alone(params):
    half = params[0].forward_half().double()
    words = torch.randint(V, (9, 2))
    torch.testing.assert_close(states(half, words), states(params[0], words))
