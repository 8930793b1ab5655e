"""Dynamic evaluation: the weights follow the text that has just been read.

Krause, Kahembwe, Murray and Renals 2017 (1709.07432). After each segment a step down its gradient
brings recent words and topics closer, and a decay pulls the weights back to the trained ones.
"""

from contextlib import contextmanager

import torch
from torch import nn

from data import batchify, get_batch
from utils import repackage_hidden

RULES = ("sgd", "rms")
STATISTICS = 100, 5  # columns and length of the windows of which the gradients are measured


class Rule:
    """How the weights w, trained to w0, move by the gradient g of a segment's mean loss:

        sgd:  w <- w - lr g + decay (w0 - w)
        rms:  w <- w - lr g / (R + epsilon) + min(decay R / mean(R), 1) (w0 - w)

    R, one number a weight, is the root mean square of its gradient on training text, so that each
    weight moves, and comes back, by as much as it moved in training. mean(R) is the mean over the
    parameter tensors of their means, as in the published code, whose rates therefore fit.

    params: nn.ModuleList([model, criterion]), on whose weights it works; `restored` puts them back.
    root_mean_square: R as of `root_mean_square`, None for sgd. Raises ValueError for a wrong one.
    """

    def __init__(self, params, name, lr, decay, epsilon=2e-5, root_mean_square=None):
        if name not in RULES:
            raise ValueError(f"rule {name} is unknown; choose from {', '.join(RULES)}")
        if (root_mean_square is None) != (name == "sgd"):
            raise ValueError("rms needs the gradients' root mean square, sgd has no use for it")
        self.lr = lr
        self.weights = list(params.parameters())
        self.trained = [weight.detach().clone() for weight in self.weights]
        self.scales = None
        self.decays = [decay] * len(self.weights)
        if name == "rms":
            self.scales = [r + epsilon for r in root_mean_square]
            mean = torch.stack([r.mean() for r in root_mean_square]).mean()
            ratios = [(r / mean).nan_to_num(0.0) for r in root_mean_square]  # 0 / 0: no gradient
            self.decays = [(decay * ratio).clamp(max=1) for ratio in ratios]

    @torch.no_grad()
    def step(self):
        """One step down the gradients that `backward` has left, which are used up."""
        for i, weight in enumerate(self.weights):
            gradient = weight.grad
            if gradient is None:  # no word of its tail of the vocabulary in this segment
                gradient = torch.zeros_like(weight)
            if self.scales is None:
                change = gradient.mul_(-self.lr)
            else:
                change = gradient.div_(self.scales[i]).mul_(-self.lr)
            # The decay is from where the weight was before the step.
            weight.lerp_(self.trained[i], self.decays[i]).add_(change)
            weight.grad = None

    @contextmanager
    def restored(self):
        """While it is held the weights may move; then they are the trained ones again."""
        try:
            yield self
        finally:
            with torch.no_grad():
                for weight, trained in zip(self.weights, self.trained):
                    weight.copy_(trained)
                    weight.grad = None


def evaluate_with_gradients(params):
    """Evaluation mode, but for the recurrent layers: cuDNN's have no backward pass in it.

    They have no dropout of their own, so they compute the same in both modes.
    """
    for module in params.eval().modules():
        if isinstance(module, nn.RNNBase):
            module.train()


def read_dynamically(params, ids, segment, rule):
    """Reads `ids` [N], segment by segment of `segment` words, the weights moving by `rule`.

    Yields for each the states before its words, [L, E], the words [L], and their log-probabilities
    in nats [L], from weights that have seen none of them. All N - 1 words that follow another.
    """
    model, criterion = params
    evaluate_with_gradients(params)
    device = model.encoder.weight.device
    ids = ids.to(device).unsqueeze(1)
    hidden = model.init_hidden(1)
    with rule.restored():
        for start in range(0, len(ids) - 1, segment):
            data, targets = get_batch(ids, start, None, seq_len=segment)
            # A pass without gradients in between would leave states that no backward may use.
            with torch.enable_grad():
                output, hidden = model(data, repackage_hidden(hidden))
                weight, bias = model.decoder.weight, model.decoder.bias
                logprob = criterion.target_logprob(weight, bias, output, targets)
                (-logprob.mean()).backward()
            yield output.detach(), targets, logprob.detach()
            rule.step()


def root_mean_square(params, ids, batches=None, batch_size=STATISTICS[0], bptt=STATISTICS[1]):
    """The root mean square of each weight's gradient over windows of the training text `ids`.

    A list of tensors, in the order of `params.parameters()`, shaped as they. As the paper has it,
    gradients of the mean loss of windows of `bptt` words in `batch_size` columns, in evaluation
    mode. At most `batches` of them.
    """
    model, criterion = params
    evaluate_with_gradients(params)
    device = model.encoder.weight.device
    batch_size = min(batch_size, len(ids) // 2)
    source = batchify(ids, batch_size).to(device)
    weights = list(params.parameters())
    squares = [torch.zeros_like(weight) for weight in weights]
    hidden = model.init_hidden(batch_size)
    starts = range(0, len(source) - 1, bptt)[:batches]
    for start in starts:
        data, targets = get_batch(source, start, None, seq_len=bptt)
        with torch.enable_grad():
            output, hidden = model(data, repackage_hidden(hidden))
            criterion(model.decoder.weight, model.decoder.bias, output, targets).backward()
        with torch.no_grad():
            for weight, square in zip(weights, squares):
                if weight.grad is not None:
                    square.addcmul_(weight.grad, weight.grad)
                weight.grad = None
    return [square.div_(len(starts)).sqrt_() for square in squares]
