"""Training steps on a GPU without the host's cost: CUDA graphs, one for each length of a window.

cuDNN starts several kernels for each time step of each layer, about a thousand in a training step.
A graph starts them all at once.
"""

import torch

from utils import map_hidden


def capture(function, pool):
    """(a function that repeats the kernels of `function()`, the result that they will write).

    Nothing is computed yet. `pool` is the memory that all graphs share.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = function()
    return graph.replay, result


class Recorded:
    """`compute`, a function like train.compute_gradients, from graphs.

    A graph repeats the same kernels with the same numbers on the same memory. So the input is
    copied to where the graph reads it, the hidden state stays in `self.hidden`, the gradients in
    the parameters' `grad`, and each length and each set of `constants` has a graph. It is made when
    they occur for the second time: while the regularizers change in each step, it would not pay.
    """

    def __init__(self, compute, constants):
        self.compute, self.constants = compute, constants  # names of flags
        self.hidden = None
        self.seen, self.graphs = set(), {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, objective, data, targets, hidden, args):
        key = len(data), *(getattr(args, name) for name in self.constants)
        if key not in self.seen:
            self.seen.add(key)
            return self.compute(objective, data, targets, hidden, args)
        if self.hidden is None:
            self.hidden = map_hidden(torch.clone, hidden)
        elif hidden is not self.hidden:
            map_hidden(torch.Tensor.copy_, self.hidden, hidden)
        if key not in self.graphs:
            self.graphs[key] = self.record(objective, data.clone(), targets.clone(), args)
        replay, inputs, loss = self.graphs[key]
        for old, new in zip(inputs, (data, targets)):
            old.copy_(new)
        replay()
        return loss.clone(), self.hidden

    def record(self, objective, data, targets, args):
        """(function, the tensors that it reads, the loss that it writes) of a step."""

        def step():
            loss, hidden = self.compute(objective, data, targets, self.hidden, args)
            map_hidden(torch.Tensor.copy_, self.hidden, hidden)
            return loss

        replay, loss = capture(step, self.pool)
        return replay, (data, targets), loss
