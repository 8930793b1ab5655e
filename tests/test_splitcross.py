"""The loss against a float64 restatement, with no split, one, and several."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import splitcross
from cpu_kernels import has_onednn
from splitcross import SplitCrossEntropyLoss, default_splits


def setup(ntoken, splits):
    """A criterion with random parameters, and what it is called with."""
    criterion = SplitCrossEntropyLoss(6, splits)
    for parameter in criterion.parameters():
        nn.init.normal_(parameter)
    weight, bias = torch.randn(ntoken, 6), torch.randn(ntoken, 2)[:, 0]  # not contiguous
    return criterion, weight, bias, torch.randn(50, 6), torch.randint(ntoken, (50,))


def restated(criterion, weight, bias, hiddens):
    """log p(every word) in float64, by the definition: p(tombstone) * p(word within its tail)."""
    scores = nn.functional.linear(hiddens.double(), weight.double(), bias.double())
    splits = [split for split in criterion.splits if split < len(weight)]
    if not splits:
        return scores.log_softmax(1)
    head, *tails = scores.tensor_split(splits, dim=1)
    tombstones = nn.functional.linear(
        hiddens.double(), criterion.tail_vectors.double(), criterion.tail_bias.double()
    )
    head = torch.cat([head, tombstones[:, : len(splits)]], 1).log_softmax(1)
    parts = [head[:, : splits[0]]]
    for number, tail in enumerate(tails, splits[0]):
        parts.append(head[:, [number]] + tail.log_softmax(1))
    return torch.cat(parts, 1)


# A vocabulary past the last split, ending inside a tail, at a split's edge, inside the head; with
# a tail of one word; and no split at all.
CASES = [(40, [10, 20, 30]), (25, [10, 20, 30]), (20, [10, 20, 30]), (7, [10, 20, 30]),
         (21, [10, 20]), (11, [1]), (12, [])]


@pytest.mark.parametrize(("ntoken", "splits"), CASES)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_distribution_loss_and_gradients(ntoken, splits, chunked, onednn, monkeypatch):
    if not onednn:
        monkeypatch.setattr(splitcross, "has_onednn", lambda tensor: False)
    if chunked:
        monkeypatch.setattr(splitcross, "CHUNK_ABOVE", 0)
        monkeypatch.setattr(splitcross, "CHUNK_LOGITS", 64)
        monkeypatch.setattr(splitcross, "CPU_CHUNK_LOGITS", 64)
    criterion, weight, bias, hiddens, targets = setup(ntoken, splits)
    leaves = [leaf.requires_grad_() for leaf in (weight, bias, hiddens, *criterion.parameters())]
    logprob = criterion.logprob(weight, bias, hiddens)
    expected = restated(criterion, weight, bias, hiddens)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)
    # [T, B, H] with [T, B] is accepted, as [T * B, H] with [T * B].
    loss = criterion(weight, bias, hiddens.view(5, 10, -1), targets.view(5, 10))
    nll = nn.functional.nll_loss(expected, targets)
    torch.testing.assert_close(loss.double(), nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(criterion(weight, bias, hiddens, targets), loss)
    gradients = (
        torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        for value in (loss, nll)
    )
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_loss_of_words_that_are_all_but_impossible():
    """A probability below the smallest float32 has a finite loss, and its gradient."""
    weight = torch.tensor([[200.0], [0.0], [-300.0]], requires_grad=True)
    hiddens, targets = torch.ones(2, 1), torch.tensor([2, 1])
    loss = SplitCrossEntropyLoss(1)(weight, torch.zeros(3), hiddens, targets)
    loss.backward()
    assert loss.item() == (500 + 200) / 2
    torch.testing.assert_close(weight.grad, torch.tensor([[1.0], [-0.5], [-0.5]]))


@pytest.mark.skipif(not has_onednn(torch.empty(1)), reason="this torch has no oneDNN")
def test_chunked_gradient_is_used_once():
    criterion, weight, *others = setup(12, [])
    loss = criterion(weight.requires_grad_(), *others)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_default_splits_are_the_reference_thresholds():
    assert default_splits(75_000) == []
    assert default_splits(75_001) == default_splits(500_000) == [2800, 20000, 76000]
    assert default_splits(500_001) == [4200, 35000, 180000]


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            self.numel = max(self.numel, getattr(result, "numel", int)())
        return results


@pytest.mark.parametrize("grad", [False, True])
def test_the_logits_of_a_long_window_never_exist_all_at_once(grad):
    """20,000 words of WikiText-2's vocabulary would be 2.7 GB of them."""
    with torch.device("meta"):
        weight, bias = nn.Parameter(torch.empty(33_278, 40)), torch.empty(33_278)
        hiddens, targets = torch.empty(20_000, 40), torch.empty(20_000, dtype=torch.int64)
    with Largest() as largest, torch.set_grad_enabled(grad):
        loss = SplitCrossEntropyLoss(40)(weight, bias, hiddens, targets)
    assert loss.requires_grad == grad
    assert 0 < largest.numel <= splitcross.CHUNK_ABOVE


@pytest.mark.parametrize("splits", [[0, 5], [5, 5]])
def test_splits_must_increase(splits):
    with pytest.raises(ValueError, match="increasing"):
        SplitCrossEntropyLoss(4, splits)


@pytest.mark.parametrize("splits", [[], [5, 9], [5, 20], [5, 12, 40]])
def test_it_begins_at_the_words_frequencies(splits):
    frequencies = torch.rand(12) + 0.1
    frequencies /= frequencies.sum()
    criterion, weight, bias, hiddens, _ = setup(12, splits)
    criterion.init_bias(frequencies, bias)
    found = criterion.logprob(weight, bias, hiddens * 0)
    torch.testing.assert_close(found.exp(), frequencies.expand_as(found))
