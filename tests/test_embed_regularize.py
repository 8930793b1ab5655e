"""Embedding dropout against a masked embedding matrix."""

import math

import pytest
import torch
from torch import nn

from embed_regularize import embedded_dropout


def test_it_looks_up_a_masked_and_scaled_embedding_matrix():
    embed, scale = nn.Embedding(20000, 2), torch.rand(20000, 1) + 0.5
    words = torch.cat([torch.randperm(20000) for _ in range(2)])
    found = embedded_dropout(embed, words, dropout=0.3, scale=scale)
    kept = torch.zeros(20000, 1)
    kept[words] = found.any(dim=1, keepdim=True).float()
    assert kept.mean() == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / 20000))
    torch.testing.assert_close(found, (embed.weight * kept / 0.7 * scale)[words])
    # The gradient reaches the embedding, and is zero for the words that were dropped.
    found.sum().backward()
    assert torch.equal(embed.weight.grad.any(dim=1), kept.squeeze(1).bool())
