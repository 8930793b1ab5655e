"""Dynamic evaluation: the weights adapt to the text read so far.

Krause, Kahembwe, Murray and Renals 2017 (1709.07432). After each segment, a gradient step makes
recent words and topics more likely, and a decay pulls the weights back to the trained ones.
"""

from itertools import islice

import torch
from torch import nn

from data import batchify, get_batch
from utils import repackage_hidden


class Rule:
    """The update of the weights w, trained to w0, by the gradient g of a segment's mean loss:

        sgd:  w <- w - lr g + decay (w0 - w)
        rms:  w <- w - lr g / (R + epsilon) + min(decay R / mean(R), 1) (w0 - w)

    R is the root mean square of each weight's gradient on the training text: a weight with large
    gradients is pulled back faster. mean(R) is the mean over the parameter tensors of their means,
    as in the published code, so that its settings apply here.

    params: nn.ModuleList([model, criterion]), changed in place. root_mean_square: R, as from the
    function of that name; without it the rule is sgd.
    """

    def __init__(self, params, lr, decay, epsilon=2e-5, root_mean_square=None):
        self.lr = lr
        self.weights = list(params.parameters())
        self.trained = [weight.detach().clone() for weight in self.weights]
        if root_mean_square is None:  # sgd is rms with R = 1 and no epsilon
            root_mean_square, epsilon = [self.trained[0].new_ones(())] * len(self.weights), 0.0
        self.scales = [r + epsilon for r in root_mean_square]
        mean = torch.stack([r.mean() for r in root_mean_square]).mean()
        ratios = [(r / mean).nan_to_num(0.0) for r in root_mean_square]  # 0 / 0 if no gradient
        self.decays = [(decay * ratio).clamp(max=1) for ratio in ratios]

    @torch.no_grad()
    def step(self, gradients):
        """Updates the weights with `gradients`, in the order of the parameters."""
        weights = zip(self.weights, gradients, self.trained, self.scales, self.decays)
        for weight, gradient, trained, scale, decay in weights:
            weight.lerp_(trained, decay).addcdiv_(gradient, scale, value=-self.lr)

    @torch.no_grad()
    def restore(self):
        """Restores the trained weights."""
        for weight, trained in zip(self.weights, self.trained):
            weight.copy_(trained)


def read_columns(params, columns, length, with_gradients):
    """Reads `columns` [T, B] in windows of `length` L that carry the state, in evaluation mode.

    Yields for each window (states [L*B, E], the next words [L*B], their log-probabilities in nats
    [L*B], the gradients of their mean loss in the order of `params.parameters()`, or None).
    """
    model, criterion = params
    for module in params.eval().modules():
        # cuDNN's recurrent layers have no backward pass in evaluation mode. These layers have no
        # dropout of their own, so both modes compute the same.
        if isinstance(module, nn.RNNBase):
            module.train(with_gradients)
    columns = columns.to(model.encoder.weight.device)
    hidden, gradients = model.init_hidden(columns.size(1)), None
    for start in range(0, len(columns) - 1, length):
        data, words = get_batch(columns, start, None, seq_len=length)
        with torch.set_grad_enabled(with_gradients):
            output, hidden = model(data, repackage_hidden(hidden))
            weight, bias = model.decoder.weight, model.decoder.bias
            logprob = criterion.target_logprob(weight, bias, output, words)
            if with_gradients:
                gradients = torch.autograd.grad(-logprob.mean(), list(params.parameters()))
        yield output.detach(), words, logprob.detach(), gradients


def read(params, ids, length, rule=None):
    """Reads `ids` [N] in pieces of `length` L; after each, `rule`, if given, updates the weights.

    Yields for each piece (states [L, E], the next words [L], their log-probabilities in nats [L]),
    computed before the weights adapt to these words; N - 1 words in total. Restores the weights
    when the generator ends or is closed.
    """
    try:
        for *piece, gradients in read_columns(params, ids.unsqueeze(1), length, bool(rule)):
            yield piece
            if rule:
                rule.step(gradients)
    finally:
        if rule:
            rule.restore()


def root_mean_square(params, ids, windows=None, batch_size=100, bptt=5):
    """The root mean square of each weight's gradient on the training text `ids` [N].

    Returns a list of tensors in the order and the shapes of `params.parameters()`. As in the paper,
    a gradient is that of the mean loss of a window of `bptt` words in `batch_size` columns. Uses
    the first `windows` windows, or all.
    """
    columns = batchify(ids, min(batch_size, len(ids) // 2))
    squares, count = [torch.zeros_like(weight) for weight in params.parameters()], 0
    for *_, gradients in islice(read_columns(params, columns, bptt, True), windows):
        count += 1
        for square, gradient in zip(squares, gradients):
            square.addcmul_(gradient, gradient)
    return [(square / count).sqrt() for square in squares]
