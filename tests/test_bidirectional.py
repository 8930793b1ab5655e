"""biLM: its three losses against plain restatements, what each objective trains, a whole run."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bidirectional
import main
from bidirectional import BiObjective, evaluate_directions, make_model
from train import score
from conftest import arguments, invoke, make_params
from splitcross import SplitCrossEntropyLoss
from train import make_optimizer, train_step
from checkpoint import read_checkpoint

V, E = 20, 8


@pytest.fixture
def params():
    model = make_model("biLM", V, E, 12, 2, 0, 0, 0, 0, 0, tie_weights=True)
    return nn.ModuleList([model, SplitCrossEntropyLoss(E)]).double()


def states(model, words, backward=False):
    """[T, B, E]: the state after reading each of `words` [T, B], from a zero state."""
    read = model.read_backward if backward else model
    hidden = model.init_hidden(words.size(1))[2 * backward :][:2]
    return read(words, hidden)[0].view(*words.shape, E)


def nll(model, output, targets):
    return F.cross_entropy(model.decoder(output), targets)


def test_evaluation_is_over_the_whole_text(params):
    """In one column, whatever the window: every word from all before it, all after it, or both."""
    model, _ = params
    ids = torch.randint(V, (23,))
    before = states(model, ids[:, None])[:, 0]
    after = states(model, ids.flip(0)[:, None], backward=True)[:, 0].flip(0)
    nothing = torch.zeros(1, E, dtype=torch.float64)
    expected = {
        "forward": nll(model, before[:-1], ids[1:]),
        "backward": nll(model, after[1:], ids[:-1]),
        "cloze": nll(model, model.combine(before[:-1], torch.cat([after[2:], nothing])), ids[1:]),
    }
    for bptt in (3, 7, 40):
        found = evaluate_directions(params, ids, 1, bptt)
        assert found == {name: pytest.approx(loss.item()) for name, loss in expected.items()}
    for objective, names in bidirectional.OBJECTIVES.items():
        args = arguments(objective=objective)
        loss, parts = score(params, ids, args, batch_size=1)
        assert parts == pytest.approx(found)
        assert loss == pytest.approx(sum(found[name] for name in names) / len(names))


def test_the_combiner_begins_as_the_product_of_both_predictions():
    """p(w | before, after) ~ p(w | before) p(w | after) / p(w), as long as tanh is linear."""
    model = make_params("biLM", dtype=torch.float64)[0].eval()
    model.decoder.bias.data.normal_()
    before, after = 1e-4 * torch.randn(2, 5, model.decoder.in_features, dtype=torch.float64)
    prior = model.decoder.bias.log_softmax(0)
    both = model.decoder(before).log_softmax(-1) + model.decoder(after).log_softmax(-1)
    found = model.decoder(model.combine(before, after)).log_softmax(-1)
    torch.testing.assert_close(found, (both - prior).log_softmax(-1), rtol=1e-9, atol=1e-9)
    # It is not so for what the states do not say.
    assert (found - prior).abs().max() > 1e-6


@pytest.mark.parametrize("columns", [2, 5])
def test_evaluation_in_columns_predicts_every_word_once(params, columns, monkeypatch):
    predicted = {}
    real = bidirectional.Losses.add

    def add(self, loss, count):
        predicted[id(self)] = predicted.get(id(self), 0) + count
        return real(self, loss, count)

    monkeypatch.setattr(bidirectional.Losses, "add", add)
    ids = torch.randint(V, (48,))
    found = evaluate_directions(params, ids, columns, 7)
    assert sorted(predicted.values()) == [47] * 3
    whole = evaluate_directions(params, ids, 1, 7)
    for name in found:
        assert found[name] == pytest.approx(whole[name], abs=0.05)
        assert found[name] != whole[name]  # a column's context begins with the column


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("objective", ["lm", "cloze", "both"])
def test_a_step_minimizes_what_the_objective_names(params, objective, begins):
    model, _ = params
    length = 25
    text, turned = torch.randint(V, (length + 1, 3)), torch.randint(V, (length + 1, 3))
    before = states(model, text[:-1])
    after = states(model, text[1:].flip(0), backward=True).flip(0)
    first, last = (10 if begins else 0), length - 10
    # Target t is word t + 1: what follows it is read from word t + 2 on.
    combined = model.combine(before[first:last], after[first + 1 : last + 1])
    losses = {
        "forward": nll(model, before.flatten(0, 1), text[1:].flatten()),
        "backward": nll(
            model, states(model, turned[:-1], backward=True).flatten(0, 1), turned[1:].flatten()
        ),
        "cloze": nll(model, combined.flatten(0, 1), text[1:][first:last].flatten()),
    }
    names = bidirectional.OBJECTIVES[objective]
    whole = sum(losses[name] for name in names)
    gradients = torch.autograd.grad(whole, list(params.parameters()), allow_unused=True)
    total, loss, hidden = BiObjective(params, objective)(
        text[:-1], text[1:].flatten(), model.init_hidden(3), 0, 0,
        (turned[:-1], turned[1:].flatten()), begins,
    )
    assert loss.item() == pytest.approx(whole.item() / len(names))
    total.backward()
    for (name, parameter), expected in zip(params.named_parameters(), gradients):
        if "combiner" in name and objective == "lm":  # it learns, and changes nothing else
            assert expected is None
            assert parameter.grad.abs().sum() > 0
        else:
            torch.testing.assert_close(parameter.grad, expected)
    assert len(hidden) == 4
    moved = [not torch.equal(a[0], b[0]) for a, b in zip(hidden, model.init_hidden(3))]
    assert moved == [True, True, objective != "cloze", objective != "cloze"]


@pytest.mark.parametrize("objective", ["lm", "cloze"])
def test_with_lm_the_combiner_learns_and_the_language_models_do_not_notice(objective):
    """Not by its gradient's part in the norm that is clipped, nor by the split softmax."""
    after = []
    for scale in (1.0, 3.0):
        torch.manual_seed(0)
        params = make_params("biLM", ntoken=V, splits=[6], dtype=torch.float64)
        for parameter in params.parameters():
            nn.init.normal_(parameter, std=0.5)
        params[0].combiner.weight.data.mul_(scale)
        for name in ("dropout", "dropouth", "dropouti", "dropoute"):
            setattr(params[0], name, 0.0)
        for layer in [*params[0].rnns, *params[0].backward_rnns]:
            layer.dropout = 0.0
        before = {name: p.detach().clone() for name, p in params.named_parameters()}
        args = arguments(clip=0.05)
        words, turned = torch.randint(V, (22, 3)), torch.randint(V, (22, 3))
        train_step(
            BiObjective(params, objective), make_optimizer(params, args), words[:-1],
            words[1:].flatten(), params[0].init_hidden(3), args,
            backward=(turned[:-1], turned[1:].flatten()), begins=True,
        )
        assert not torch.equal(before["0.combiner.weight"], params[0].combiner.weight)
        norm = sum(p.grad.square().sum() for p in params[0].combiner.parameters()).sqrt()
        assert norm < 0.0501
        after.append({n: p for n, p in params.named_parameters() if "combiner" not in n})
    same = [torch.equal(parameter, after[1][name]) for name, parameter in after[0].items()]
    assert "1.tail_vectors" in after[0]
    assert all(same) if objective == "lm" else not any(same)


def test_its_forward_half_alone():
    params = make_params("biLM", ntoken=V, dtype=torch.float64).eval()
    half = params[0].double().forward_half().double()
    assert half.rnn_type == "LSTM"
    assert not any("backward" in name or "combiner" in name for name, _ in half.named_parameters())
    words = torch.randint(V, (9, 2))
    torch.testing.assert_close(
        half(words, half.init_hidden(2))[0], params[0](words, half.init_hidden(2))[0]
    )


@pytest.mark.parametrize("objective", ["lm", "cloze", "both"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_windows_and_the_meta_device(objective, length):
    with torch.device("meta"):
        model = make_model("biLM", V, E, 12, 2, 0.2, 0.2, 0.2, 0.2, 0.2, tie_weights=True)
        words, targets = torch.randint(V, (length, 3)), torch.randint(V, (length * 3,))
    params = nn.ModuleList([model, SplitCrossEntropyLoss(E)])
    args = arguments()
    optimizer, step = make_optimizer(params, args), BiObjective(params, objective)
    loss, hidden = train_step(
        step, optimizer, words, targets, model.init_hidden(3), args, backward=(words, targets),
        begins=True,
    )
    assert {t.device.type for t in [loss, *sum(hidden, ())]} == {"meta"}
    assert all(p.grad is not None for p in params.parameters())


@pytest.mark.parametrize("objective", ["lm", "cloze", "both"])
def test_from_the_shell_with_averaging_and_fine_tuning(objective, corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    status, out, err = invoke(
        main.main, "--data", corpus_dir, *small, "--model", "biLM", "--objective", objective,
        "--epochs", 3, "--nonmono", 0, "--finetune", 1, "--save", path,
    )
    assert (status, err) == (0, "")
    records = [json.loads(line) for line in (tmp_path / "m.pt.jsonl").read_text().splitlines()]
    for name in ("forward", "backward", "cloze"):
        assert out.count(f"| {name} ") == 3 + 1 + 1 + 2  # epochs, base model, fine-tuning, tests
        if name in bidirectional.OBJECTIVES[objective]:
            assert records[-1][f"{name}_ppl"] < 15
    checkpoint = read_checkpoint(path)
    assert checkpoint["architecture"]["rnn_type"] == "biLM"
    assert checkpoint["flags"]["objective"] == objective


def test_cloze_is_better_than_either_side_where_both_tell(tmp_path):
    """Lines whose middle word tells both its neighbours, and needs both to be told."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for split, count in (("train", 4000), ("valid", 300), ("test", 300)):
        a, b = torch.randint(4, (2, count), generator=generator).tolist()
        (folder / f"{split}.txt").write_text(
            "\n".join(f"l{x} m{x}{y} r{y}" for x, y in zip(a, b)) + "\n"
        )
    flags = "--emsize 16 --nhid 32 --nlayers 1 --batch_size 8 --bptt 35 --lr 10 --nonmono 50"
    none = [word for name in ("", "h", "i", "e") for word in (f"--dropout{name}", "0")]
    status, _, err = invoke(
        main.main, "--data", folder, *flags.split(), *none, "--wdrop", 0, "--model", "biLM",
        "--objective", "both", "--epochs", 6, "--save", tmp_path / "m.pt",
    )
    assert (status, err) == (0, "")
    last = json.loads((tmp_path / "m.pt.jsonl").read_text().splitlines()[-1])
    # One side leaves two words of a line's four to chance, of 4 each: exp(2 ln(4) / 4) = 2.
    assert last["forward_ppl"] == pytest.approx(2, rel=0.1)
    assert last["backward_ppl"] == pytest.approx(2, rel=0.1)
    assert last["cloze_ppl"] < 1.2


def test_the_objective_is_bilms_alone(corpus_dir):
    status, _, err = invoke(main.main, "--data", corpus_dir, "--objective", "cloze")
    assert (status, err) == (2, "main.py: error: --objective cloze: for --model biLM only\n")
