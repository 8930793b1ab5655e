"""cuda_graphs.py on a CPU, where calling a function again stands for repeating its kernels.

What CUDA itself makes of it is tested in test_cuda.py.
"""

from collections import Counter

import numpy as np
import pytest
import torch

import cuda_graphs
import main
import train
from conftest import MODELS, arguments, make_corpus, make_params, make_trainer
from data import InputError
from model import DROPOUTS


@pytest.fixture
def captured(monkeypatch):
    """The functions of the graphs that were made. Like kernels, they write to a fixed place."""
    made = []

    def capture(function, pool):
        result = torch.full((), torch.nan)
        made.append(function)
        return lambda: result.copy_(function()), result

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


def run_epochs(number, model="LSTM", **flags):
    """A Trainer after that many epochs, with every dropout, and its losses."""
    torch.manual_seed(0)
    np.random.seed(0)
    args = arguments(epochs=number, **{**dict.fromkeys(DROPOUTS, 0.3), **flags})
    params = make_params(**MODELS[model], rate=0.3)
    ids = torch.randint(50, (2000,))
    trainer = make_trainer(params, make_corpus(ids, ids[:200], 50), args)
    places = set()
    for _ in range(number):
        trainer.train_epoch()
        trainer.epoch, trainer.row = trainer.epoch + 1, 0
        places.add(tuple(p.grad.data_ptr() for p in params.parameters()))
    assert len(places) == 1 or not args.cuda_graphs  # graphs write where the optimizer reads
    return trainer, trainer.losses.read()


@pytest.mark.parametrize(
    "change",
    [
        {}, {"optimizer": "adamw", "lr": 0.01}, {"clip": 0.0},
        {"regularization_ramp": [0.3, 1.0], "alpha": 2.0},  # a graph holds alpha's value
    ],
)
@pytest.mark.parametrize("model", ["LSTM", "GRU", "QRNN", "biLSTM"])
def test_a_run_is_the_same_with_graphs(model, change, captured):
    (plain, losses), (recorded, found) = (
        run_epochs(2, model, cuda_graphs=graphs, **change) for graphs in (False, True)
    )
    assert captured
    assert found == losses and len(set(losses)) == len(losses)
    for parameter, expected in zip(recorded.params.parameters(), plain.params.parameters()):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=0)


def test_a_length_has_one_graph_from_its_second_window_on(captured, monkeypatch):
    lengths, step = Counter(), train.train_step

    def counting_step(objective, optimizer, data, *rest):
        lengths[len(data)] += 1
        return step(objective, optimizer, data, *rest)

    monkeypatch.setattr(train, "train_step", counting_step)
    trainer, _ = run_epochs(2, cuda_graphs=True)
    repeated = {length for length, times in lengths.items() if times > 1}
    assert trainer.compute.graphs.keys() == repeated != lengths.keys()
    assert len(captured) == len(repeated)


def test_graphs_are_made_anew_when_the_regularizers_change(captured):
    run_epochs(1, cuda_graphs=True)
    first = len(captured)
    trainer, _ = run_epochs(2, cuda_graphs=True, regularization_ramp=[0.3, 2.0])
    assert len(captured) == 2 * first + len(trainer.compute.graphs) > 2 * first > 0


@pytest.mark.parametrize(
    ("argv", "torchrun"),
    [("--device cpu", False), ("--model biLM", False), ("--attention single", False), ("", True)],
)
def test_where_there_are_no_graphs(argv, torchrun, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("distributed.is_distributed", lambda: torchrun)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"^--cuda-graphs: requires CUDA"):
        main.parse_args([*argv.split(), "--cuda-graphs"])


def test_no_graphs_of_a_split_softmax(captured):
    params = make_params(splits=(20, 30))
    with pytest.raises(InputError, match=r"^--cuda-graphs: not for more than 75,000 words"):
        train.make_compute(params, arguments(cuda_graphs=True))
