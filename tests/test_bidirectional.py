"""biLM: its three losses against plain restatements, what each objective trains, a whole run."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bidirectional
import main
from bidirectional import OBJECTIVES, BiObjective, evaluate_directions
from conftest import NO_DROPOUT, arguments, invoke, make_params
from data import SPLITS
from train import make_optimizer, score, train_step

V, E = 20, 8
objectives = pytest.mark.parametrize("objective", OBJECTIVES)


@pytest.fixture
def params():
    return make_params("biLM", V, dtype=torch.float64)


def states(model, words, backward=False):
    """[T, B, E]: the state after reading each of `words` [T, B], from a zero state."""
    read = model.read_backward if backward else model
    return read(words, model.init_hidden(words.size(1))[:2])[0].view(*words.shape, E)


def nll(model, output, targets):
    return F.cross_entropy(model.decoder(output).flatten(0, -2), targets.flatten())


def step(params, objective, words, turned, args):
    """A training step on the first window of two texts [T + 1, B]; returns (loss, hidden)."""
    return train_step(
        BiObjective(params, objective), make_optimizer(params, args), words[:-1],
        words[1:].flatten(), params[0].init_hidden(words.size(1)), args,
        backward=(turned[:-1], turned[1:].flatten()), is_first_window=True,
    )


def test_evaluation_is_over_the_whole_text(params):
    """In one column, whatever the window: every word from all before it, all after it, or both."""
    model, _ = params
    ids = torch.randint(V, (23, 1))
    before, after = states(model, ids), states(model, ids.flip(0), backward=True).flip(0)
    beyond = torch.cat([after[2:], torch.zeros_like(after[:1])])
    expected = {
        "forward": nll(model, before[:-1], ids[1:]),
        "backward": nll(model, after[1:], ids[:-1]),
        "cloze": nll(model, model.combine(before[:-1], beyond), ids[1:]),
    }
    expected = {name: pytest.approx(loss.item()) for name, loss in expected.items()}
    for bptt in (3, 7, 40):
        found = evaluate_directions(params, ids.flatten(), 1, bptt)
        assert found == expected
    for objective, names in OBJECTIVES.items():
        loss, parts = score(params, ids.flatten(), arguments(objective=objective), batch_size=1)
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


@pytest.mark.parametrize("columns", [2, 5])
def test_evaluation_in_columns_predicts_every_word_once(params, columns, monkeypatch):
    predicted, add = [], bidirectional.Losses.add

    def count(self, loss, tokens):
        predicted.append(tokens)
        add(self, loss, tokens)

    monkeypatch.setattr(bidirectional.Losses, "add", count)
    ids = torch.randint(V, (48,))
    found = evaluate_directions(params, ids, columns, 7)
    assert sum(predicted) == 3 * 47
    for name, loss in evaluate_directions(params, ids, 1, 7).items():
        assert found[name] == pytest.approx(loss, abs=0.05)
        assert found[name] != loss  # a column's context begins with the column


@objectives
@pytest.mark.parametrize("is_first_window", [False, True])
def test_a_step_minimizes_what_the_objective_names(params, objective, is_first_window):
    model, _ = params
    length = 25
    text, turned = torch.randint(V, (2, length + 1, 3))
    before = states(model, text[:-1])
    after = states(model, text[1:].flip(0), backward=True).flip(0)
    # Target t is word t + 1: what follows it is read from word t + 2 on.
    first, last = (10 if is_first_window else 0), length - 10
    combined = model.combine(before[first:last], after[first + 1 : last + 1])
    losses = {
        "forward": nll(model, before, text[1:]),
        "backward": nll(model, states(model, turned[:-1], backward=True), turned[1:]),
        "cloze": nll(model, combined, text[1:][first:last]),
    }
    names = OBJECTIVES[objective]
    whole = sum(losses[name] for name in names)
    gradients = torch.autograd.grad(whole, list(params.parameters()), allow_unused=True)
    total, loss, hidden = BiObjective(params, objective)(
        text[:-1], text[1:].flatten(), model.init_hidden(3), 0, 0,
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


@pytest.mark.parametrize("objective", ["lm", "cloze"])
def test_with_lm_the_combiner_learns_and_the_language_models_do_not_notice(objective):
    """Not by its gradient's part in the norm that is clipped, nor by the split softmax."""
    after = []
    for scale in (1, 3):
        torch.manual_seed(0)
        params = make_params("biLM", V, splits=[6], dtype=torch.float64)
        for parameter in params.parameters():
            nn.init.normal_(parameter, std=0.5)
        combiner = params[0].combiner
        combiner.weight.data.mul_(scale)
        before = combiner.weight.clone()
        step(params, objective, *torch.randint(V, (2, 22, 3)), arguments(clip=0.05))
        assert not torch.equal(before, combiner.weight)
        assert nn.utils.get_total_norm([p.grad for p in combiner.parameters()]) < 0.0501
        after.append([p for name, p in params.named_parameters() if "combiner" not in name])
    same = [torch.equal(a, b) for a, b in zip(*after)]
    assert all(same) if objective == "lm" else not any(same)


def test_its_forward_half_alone(params):
    half = params[0].forward_half().double()
    assert half.rnn_type == "LSTM"
    words = torch.randint(V, (9, 2))
    torch.testing.assert_close(states(half, words), states(params[0], words))


@objectives
@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_windows_and_the_meta_device(objective, length):
    with torch.device("meta"):
        params = make_params("biLM", V, rate=0.2)
        texts = torch.randint(V, (2, length + 1, 3))
    loss, hidden = step(params, objective, *texts, arguments())
    assert all(tensor.is_meta for tensor in [loss, *sum(hidden, ())])
    assert all(p.grad is not None for p in params.parameters())


@pytest.mark.slow
def test_cloze_is_better_than_either_side_where_both_tell(tmp_path):
    """Lines whose middle word tells both its neighbours, and needs both to be told."""
    for split, count in zip(SPLITS, (4000, 300, 300)):
        pairs = torch.randint(4, (count, 2)).tolist()
        (tmp_path / f"{split}.txt").write_text("".join(f"l{a} m{a}{b} r{b}\n" for a, b in pairs))
    flags = "--emsize 16 --nhid 32 --nlayers 1 --batch_size 8 --bptt 35 --lr 10 --nonmono 50 " \
        "--model biLM --objective both --epochs 6"
    status, _, err = invoke(main.main, "--data", tmp_path, *flags.split(), *NO_DROPOUT,
                            "--save", tmp_path / "m.pt")
    assert (status, err) == (0, "")
    last = json.loads((tmp_path / "m.pt.jsonl").read_text().splitlines()[-1])
    # One side leaves two words of a line's four to chance, of 4 each: exp(2 ln(4) / 4) = 2.
    assert last["forward_ppl"] == pytest.approx(2, rel=0.1)
    assert last["backward_ppl"] == pytest.approx(2, rel=0.1)
    assert last["cloze_ppl"] < 1.2
