"""Attention against a float64 restatement, over windows, and in a model that trains with it."""

import pytest
import torch

import main
from attention import Attention
from conftest import arguments, invoke
from model import RNNModel
from splitcross import SplitCrossEntropyLoss
from train import Objective, make_optimizer, train_step
from checkpoint import read_checkpoint

KINDS = ("single", "combined")


def restated(attention, states):
    """h' of all states [T, B, H], one by one, by the definition, in float64."""
    joined = []
    for t, current in enumerate(states):
        earlier = states[max(0, t - attention.window) : t]
        context = torch.zeros_like(current)
        if t:
            keys = earlier @ attention.earlier.weight.T
            if attention.current is not None:
                keys = keys + current @ attention.current.weight.T
            scores = (keys.tanh() @ attention.score.weight.T).squeeze(-1)  # [i, B]
            weights = scores.exp() / scores.exp().sum(0)
            torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]))
            context = (weights.unsqueeze(-1) * earlier).sum(0)
        joined.append(attention.join(torch.cat([current, context], -1)).tanh())
    return torch.stack(joined)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 4, 30])
def test_it_is_the_definition_whatever_the_windows_read(kind, window):
    attention = Attention(6, kind, window).double()
    states = torch.randn(17, 3, 6, dtype=torch.float64, requires_grad=True)
    expected = restated(attention, states)
    torch.testing.assert_close(attention(states, states.new_zeros(0, 3, 6))[0], expected)
    memory, found, begin = states.new_zeros(0, 3, 6), [], 0
    for end in (1, 4, 5, 12, 17):
        joined, memory = attention(states[begin:end], memory)
        assert memory.shape == (min(window, end), 3, 6)
        assert not memory.requires_grad
        found.append(joined)
        begin = end
    torch.testing.assert_close(torch.cat(found), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_longer_than_the_text_costs_no_more_than_the_text(kind):
    attention = Attention(6, kind, 10**12)  # more than any memory
    states = torch.randn(7, 3, 6)
    joined, memory = attention(states[:4], states.new_zeros(0, 3, 6))
    assert torch.equal(memory, states[:4])
    attention.window = 7
    torch.testing.assert_close(joined, attention(states, states.new_zeros(0, 3, 6))[0][:4])


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_the_states_pass_as_they_are(kind):
    attention = Attention(6, kind, 3)
    states = torch.randn(1, 2, 6)  # none before them
    assert torch.equal(attention(states, states.new_zeros(0, 2, 6))[0], states.tanh())


@pytest.mark.parametrize("kind", KINDS)
def test_large_scores_stay_finite(kind):
    attention = Attention(4, kind, 5)
    torch.nn.init.constant_(attention.score.weight, 1e4)
    states = (100 * torch.randn(9, 2, 4)).requires_grad_()
    joined, _ = attention(states, states.new_zeros(0, 2, 4))
    joined.sum().backward()
    assert joined.isfinite().all()
    for tensor in (states, *attention.parameters()):
        assert tensor.grad.isfinite().all()


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="attention dot is unknown; choose from single, combined"):
        Attention(4, "dot", 5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU"])
def test_a_step_reaches_every_weight(rnn_type, kind, device):
    with torch.device(device):
        model = RNNModel(
            rnn_type, 20, 8, 12, 2, 0.1, 0.1, 0.1, 0.1, 0.1, True, attention=kind,
            attention_window=4,
        )
        words, targets = torch.randint(20, (5, 3)), torch.randint(20, (15,))
    params = torch.nn.ModuleList([model, SplitCrossEntropyLoss(8)])
    args = arguments()
    objective, optimizer = Objective(params), make_optimizer(params, args)
    hidden = model.init_hidden(3)
    for _ in range(2):
        loss, hidden = train_step(objective, optimizer, words, targets, hidden, args)
    assert hidden[-1].shape == (4, 3, 8)
    assert loss.device.type == device
    assert all(p.grad is not None for p in params.parameters())
    if device == "cpu":
        assert all(p.grad.abs().sum() > 0 for p in params.parameters())


def test_from_the_shell_with_fine_tuning_and_resume(corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    flags = ["--data", corpus_dir, *small, "--save", path, "--attention", "combined",
             "--attention-window", 13]
    status, out, err = invoke(main.main, *flags, "--epochs", 2, "--nonmono", 0, "--finetune", 1)
    assert (status, err) == (0, "")
    assert out.count("test ppl") == 4
    architecture = read_checkpoint(path)["architecture"]
    assert (architecture["attention"], architecture["attention_window"]) == ("combined", 13)
    status, _, err = invoke(main.main, "--resume", path, "--attention-window", 9)
    assert status == 2
    assert f"--attention-window 9: {path}.state has a model with --attention-window 13" in err
    status, _, err = invoke(
        main.main, "--data", corpus_dir, "--model", "biLSTM", "--attention", "single"
    )
    message = "main.py: error: --attention looks back only: leave it out with biLSTM\n"
    assert (status, err) == (2, message)
    status, _, err = invoke(main.main, "--data", corpus_dir, "--attention-window", 5)
    assert (status, err) == (2, "main.py: error: --attention-window 5: for --attention only\n")
