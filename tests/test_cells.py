"""Cells against the layers they stand for."""

import pytest
import torch
from torch import nn

from cells import Cell


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cell_is_its_layer(kind, dtype):
    layer = kind(5, 7).to(dtype)
    x = torch.randn(9, 1, 5, dtype=dtype)
    state = torch.randn(1, 1, 7, dtype=dtype)
    state = (state, torch.randn_like(state)) if kind is nn.LSTM else state
    with torch.no_grad():
        expected = layer(x, state)
        cell = Cell(layer)
        torch.testing.assert_close(cell(x, state), expected)
        outputs = []
        for x_t in x:
            output, state = cell(x_t.unsqueeze(0), state)
            outputs.append(output)
        torch.testing.assert_close((torch.cat(outputs), state), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_cell_is_on_its_layers_device(kind):
    layer = kind(5, 7).to("meta")
    state = torch.zeros(1, 1, 7, device="meta")
    state = (state, state) if kind is nn.LSTM else state
    with torch.no_grad():
        assert Cell(layer)(torch.zeros(2, 1, 5, device="meta"), state)[0].is_meta


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}])
def test_other_layers_are_refused(options):
    with pytest.raises(ValueError, match="one layer and one direction"):
        Cell(nn.LSTM(5, 7, **options))
