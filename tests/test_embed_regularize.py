"""Embedding dropout against a masked embedding matrix."""

import math

import pytest
import torch
from torch import nn

from embed_regularize import embedded_dropout


@pytest.mark.parametrize("scaled", [False, True])
def test_it_looks_up_a_masked_embedding_matrix(scaled):
    embed = nn.Embedding(40, 6)
    words = torch.randint(40, (30, 8))
    scale = torch.rand(40, 1) + 0.5 if scaled else None
    found = embedded_dropout(embed, words, dropout=0.3, scale=scale)
    kept = torch.zeros(40, 1)
    kept[words[found.any(dim=-1)]] = 1
    assert 0 < kept[words.unique()].mean() < 1
    masked = embed.weight * kept / 0.7 * (1 if scale is None else scale)
    torch.testing.assert_close(found, masked[words])
    # The gradient reaches the embedding, and is zero for the words that were dropped.
    found.sum().backward()
    assert torch.equal(embed.weight.grad.any(dim=1), kept.squeeze(1).bool())


def test_its_rate_and_its_absence():
    embed = nn.Embedding(20000, 2)
    words = torch.arange(20000)
    dropped = (embedded_dropout(embed, words, dropout=0.1) == 0).all(dim=1).double()
    assert dropped.mean() == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 20000))
    assert torch.equal(embedded_dropout(embed, words, dropout=0), embed(words))
