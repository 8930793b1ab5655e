"""The loss against a float64 restatement, with no split, one, and several."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import splitcross
from cpu_kernels import has_onednn
from splitcross import SplitCrossEntropyLoss, default_splits


def setup(ntoken, splits, hidden_size=6, n=50):
    criterion = SplitCrossEntropyLoss(hidden_size, splits)
    for parameter in criterion.parameters():
        torch.nn.init.normal_(parameter)
    weight, bias = torch.randn(ntoken, hidden_size), torch.randn(ntoken)
    return criterion, weight, bias, torch.randn(n, hidden_size), torch.randint(ntoken, (n,))


def restated(criterion, weight, bias, hidden, word):
    """log p(word) in float64, by the definition: p(tombstone) * p(word within its tail)."""
    weight, bias, hidden = weight.double(), bias.double(), hidden.double()
    splits = [s for s in criterion.splits if s < len(weight)]
    scores = weight @ hidden + bias
    if not splits:
        return scores[word] - scores.logsumexp(0)
    tombstones = criterion.tail_vectors.double() @ hidden + criterion.tail_bias.double()
    tombstones = tombstones[: len(splits)]
    head = torch.cat([scores[: splits[0]], tombstones])
    if word < splits[0]:
        return scores[word] - head.logsumexp(0)
    k = max(k for k, split in enumerate(splits) if word >= split)
    end = [*splits, len(weight)][k + 1]
    tail = scores[splits[k] : end]
    return tombstones[k] - head.logsumexp(0) + scores[word] - tail.logsumexp(0)


# A vocabulary past the last split, ending inside a tail, at a split's edge, inside the head; with
# a tail of one word; and no split at all.
CASES = [(40, [10, 20, 30]), (25, [10, 20, 30]), (20, [10, 20, 30]), (7, [10, 20, 30]),
         (21, [10, 20]), (11, [1]), (12, [])]


@pytest.mark.parametrize(("ntoken", "splits"), CASES)
def test_distribution_and_loss(ntoken, splits):
    criterion, weight, bias, hiddens, targets = setup(ntoken, splits)
    logprob = criterion.logprob(weight, bias, hiddens)
    assert logprob.shape == (50, ntoken)
    torch.testing.assert_close(logprob.exp().sum(dim=1), torch.ones(50))
    expected = torch.stack(
        [restated(criterion, weight, bias, h, t) for h, t in zip(hiddens, targets)]
    )
    taken = logprob.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(taken.double(), expected, rtol=1e-5, atol=1e-5)
    loss = criterion(weight, bias, hiddens, targets)
    torch.testing.assert_close(loss.double(), -expected.mean(), rtol=1e-5, atol=1e-5)
    # [T, B, H] with [T, B] is accepted as well.
    again = criterion(weight, bias, hiddens.view(5, 10, -1), targets.view(5, 10))
    torch.testing.assert_close(again, loss)


@pytest.mark.parametrize(("ntoken", "splits"), CASES)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_gradients(ntoken, splits, chunked, onednn, monkeypatch):
    if not onednn:
        monkeypatch.setattr(splitcross, "has_onednn", lambda tensor: False)
    if chunked:
        monkeypatch.setattr(splitcross, "CHUNK_ABOVE", 0)
        monkeypatch.setattr(splitcross, "CHUNK_LOGITS", 64)
        monkeypatch.setattr(splitcross, "CPU_CHUNK_LOGITS", 64)
    criterion, weight, bias, hiddens, targets = setup(ntoken, splits)
    leaves = [weight, bias, hiddens, *criterion.parameters()]
    for leaf in leaves:
        leaf.requires_grad_(True)
    loss = criterion(weight, bias, hiddens, targets)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    reference = -torch.stack(
        [restated(criterion, weight, bias, h, t) for h, t in zip(hiddens, targets)]
    ).mean()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(reference, leaves, allow_unused=True)
    for a, b in zip(found, expected):
        if a is not None or b is not None:
            a, b = (torch.zeros(()) if g is None else g for g in (a, b))
            torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=1e-4, atol=1e-6)


def test_chunked_loss_of_words_that_are_all_but_impossible():
    """A probability below the smallest float32 has a finite loss, and its gradient."""
    weight = torch.tensor([[200.0], [0.0], [-300.0]], requires_grad=True)
    hiddens, targets = torch.ones(2, 1), torch.tensor([2, 1])
    loss = SplitCrossEntropyLoss(1)(weight, torch.zeros(3), hiddens, targets)
    loss.backward()
    assert loss.item() == (500 + 200) / 2
    torch.testing.assert_close(weight.grad, torch.tensor([[1.0], [-0.5], [-0.5]]))


@pytest.mark.skipif(not has_onednn(torch.empty(1)), reason="this torch has no oneDNN")
def test_chunked_gradient_is_used_once():
    criterion, weight, bias, hiddens, targets = setup(12, [])
    loss = criterion(weight.requires_grad_(), bias, hiddens, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()


def test_vectors_that_are_not_contiguous():
    criterion, weight, bias, hiddens, targets = setup(12, [])
    strided = torch.stack([bias, torch.randn(12)], 1)[:, 0]
    assert not strided.is_contiguous()
    loss = criterion(weight, strided, hiddens, targets)
    torch.testing.assert_close(loss, criterion(weight, bias, hiddens, targets))


def test_default_splits_are_the_reference_thresholds():
    assert default_splits(75_000) == []
    assert default_splits(75_001) == default_splits(500_000) == [2800, 20000, 76000]
    assert default_splits(500_001) == [4200, 35000, 180000]


def test_vocabulary_between_threshold_and_last_split():
    """75,500 words: the reference's third split, at 76,000, lies past the end."""
    criterion, weight, bias, hiddens, _ = setup(75_500, default_splits(75_500), n=2)
    logprob = criterion.logprob(weight, bias, hiddens)
    torch.testing.assert_close(logprob.exp().sum(dim=1), torch.ones(2))
    targets = torch.tensor([75_499, 2_799])
    loss = criterion(weight, bias, hiddens, targets)
    torch.testing.assert_close(loss, -logprob[[0, 1], targets].mean())


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            self.numel = max(self.numel, getattr(result, "numel", int)())
        return results


def test_the_logits_of_a_long_window_never_exist_all_at_once():
    """20,000 words of WikiText-2's vocabulary would be 2.7 GB of them."""
    with torch.device("meta"):
        weight, bias = nn.Parameter(torch.empty(33_278, 40)), torch.empty(33_278)
        hiddens, targets = torch.empty(20_000, 40), torch.empty(20_000, dtype=torch.int64)
    for grad in (False, True):
        with Largest() as largest, torch.set_grad_enabled(grad):
            loss = SplitCrossEntropyLoss(40)(weight, bias, hiddens, targets)
        assert loss.requires_grad == grad
        assert 0 < largest.numel <= splitcross.CHUNK_ABOVE


@pytest.mark.parametrize("splits", [[0, 5], [5, 5], [7, 3]])
def test_splits_must_increase(splits):
    with pytest.raises(ValueError, match="increasing"):
        SplitCrossEntropyLoss(4, splits)


@pytest.mark.parametrize("splits", [[], [5, 9], [5, 20], [5, 12, 40]])
def test_it_begins_at_the_words_frequencies(splits):
    frequencies = torch.rand(12, dtype=torch.float64) + 0.1
    frequencies /= frequencies.sum()
    criterion = SplitCrossEntropyLoss(3, splits).double()
    bias = nn.Parameter(torch.ones(12, dtype=torch.float64))
    criterion.init_bias(frequencies, bias)
    weight = torch.randn(12, 3, dtype=torch.float64)
    found = criterion.logprob(weight, bias, torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(found.exp(), frequencies.expand(2, 12))
