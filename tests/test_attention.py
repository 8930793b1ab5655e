"""Attention against a restatement, over windows."""

import pytest
import torch

from attention import KINDS, Attention

kinds = pytest.mark.parametrize("kind", KINDS[1:])


def restated(attention, states):
    """h' of all states [T, B, H], one by one, by the definition."""
    joined = []
    for t, current in enumerate(states):
        context = torch.zeros_like(current)
        if t:
            earlier = states[max(0, t - attention.window) : t]
            keys = attention.earlier(earlier)
            if attention.current is not None:
                keys = keys + attention.current(current)
            context = (attention.score(keys.tanh()).softmax(0) * earlier).sum(0)
        joined.append(attention.join(torch.cat([current, context], -1)).tanh())
    return torch.stack(joined)


@kinds
@pytest.mark.parametrize("window", [1, 4, 30, 10**12])  # the last is more than any memory
def test_it_is_the_definition_whatever_the_windows_read(kind, window):
    attention = Attention(6, kind, window).double()
    states = torch.randn(17, 3, 6, dtype=torch.float64, requires_grad=True)
    nothing = states.new_zeros(0, 3, 6)
    expected = restated(attention, states)
    torch.testing.assert_close(attention(states, nothing)[0], expected)
    memory, found, begin = nothing, [], 0
    for end in (1, 4, 5, 12, 17):
        joined, memory = attention(states[begin:end], memory)
        assert torch.equal(memory, states[max(0, end - window) : end])
        assert not memory.requires_grad
        found.append(joined)
        begin = end
    torch.testing.assert_close(torch.cat(found), expected)
    # At first the states pass as they are.
    assert torch.equal(found[0], states[:1].tanh())


@kinds
def test_large_scores_stay_finite(kind):
    attention = Attention(4, kind, 5)
    torch.nn.init.constant_(attention.score.weight, 1e4)
    states = (100 * torch.randn(9, 2, 4)).requires_grad_()
    joined, _ = attention(states, states.new_zeros(0, 2, 4))
    joined.sum().backward()
    for tensor in (joined, states.grad, *(p.grad for p in attention.parameters())):
        assert tensor.isfinite().all()


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="attention dot is unknown; choose from single, combined"):
        Attention(4, "dot", 5)
