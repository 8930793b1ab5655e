"""Forward and backward pass of a training step as CUDA graphs, one for each length of a window.

cuDNN starts several kernels for each time step of each layer, roughly a thousand in a step. A graph
starts them all at once.
"""

import torch

from utils import map_hidden


def capture(function, pool):
    """Records the kernels of `function()` without running them.

    Returns (function that runs them, the tensor that they write). `pool` is the memory that all
    graphs share.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = function()
    return graph.replay, result


class GraphedFunction:
    """`compute`, which is train.compute_gradients, replayed from CUDA graphs.

    A replay runs the same kernels with the same constants on the same memory. So each window is
    copied to where its graph reads it; the hidden state stays in `self.hidden`, and the gradients
    in the parameters' `grad`. There is a graph for each length of a window, recorded when the
    length occurs for the second time, because one that is used only once is not worth it. When one
    of the flags `constants` changes, all are recorded anew.
    """

    def __init__(self, compute, constants):
        self.compute, self.constants = compute, constants
        self.hidden, self.values = None, None

    def __call__(self, objective, data, targets, hidden, args):
        values = [getattr(args, name) for name in self.constants]
        if values != self.values:
            self.forget_graphs()
            self.values = values
        length = len(data)
        if length not in self.seen:
            self.seen.add(length)
            return self.compute(objective, data, targets, hidden, args)
        if self.hidden is None:
            self.hidden = map_hidden(torch.clone, hidden)
        elif hidden is not self.hidden:
            map_hidden(torch.Tensor.copy_, self.hidden, hidden)
        if length not in self.graphs:
            self.graphs[length] = self.record(objective, data.clone(), targets.clone(), args)
        replay, inputs, loss = self.graphs[length]
        for old, new in zip(inputs, (data, targets)):
            old.copy_(new)
        replay()
        return loss.clone(), self.hidden

    def forget_graphs(self):
        torch.cuda.synchronize()  # no graph may be running when it is destroyed
        self.seen, self.graphs = set(), {}
        self.pool = torch.cuda.graph_pool_handle()  # the old one ends with its last graph

    def record(self, objective, data, targets, args):
        """(function, the tensors that it reads, the loss that it writes) of a step."""

        def step():
            loss, hidden = self.compute(objective, data, targets, self.hidden, args)
            map_hidden(torch.Tensor.copy_, self.hidden, hidden)
            return loss

        replay, loss = capture(step, self.pool)
        return replay, (data, targets), loss
