"""The loss: cross-entropy over a softmax that may be split into a head and tails by frequency.

Grave et al. 2016 (1609.04309), in the form of Merity et al. 2018 (1803.08240).
"""

from itertools import pairwise

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cpu_kernels import Packed, has_onednn

# Above this many logits (256 MiB of float32) they are made and used chunk by chunk; below it one
# product is faster. On a CPU small chunks, which stay in its cache, are always the fastest.
CHUNK_ABOVE = 2**26
CHUNK_LOGITS = 2**24
CPU_CHUNK_LOGITS = 2**22


def default_splits(ntoken):
    """Where the vocabulary is split, by its size: the reference's thresholds."""
    if ntoken > 500_000:  # One Billion Words
        return [4200, 35000, 180000]
    if ntoken > 75_000:  # WikiText-103
        return [2800, 20000, 76000]
    return []


def linear_nll(hiddens, weight, bias, targets, reduction):
    """Cross-entropy (nats) of targets [N] under softmax(hiddens [N, H] @ weight.T [H, V] + bias).

    The products are made in the dtype of `hiddens`, everything else in that of `weight`. Where the
    logits are made in chunks, the gradient is made in the forward pass and can be used once: a
    second backward through the same loss raises RuntimeError.
    """
    if has_onednn(hiddens) or len(hiddens) * len(weight) > CHUNK_ABOVE:
        total = ChunkedNLL.apply(hiddens, weight, bias, targets, torch.is_grad_enabled())
        return total / len(targets) if reduction == "mean" else total
    if hiddens.dtype == weight.dtype:
        logits = F.linear(hiddens, weight, bias)
    else:
        logits = F.linear(hiddens, weight.to(hiddens.dtype)).to(weight.dtype) + bias
    return F.cross_entropy(logits, targets, reduction=reduction)


class ChunkedNLL(torch.autograd.Function):
    """The summed cross-entropy of a linear layer, whose logits never exist all at once.

    The gradient of the sum with respect to the logits is softmax(logits) - onehot(targets). On a
    CPU it is a quarter faster than torch's linear_cross_entropy: its products are oneDNN's.
    """

    @staticmethod
    def forward(ctx, hiddens, weight, bias, targets, with_gradient):
        """hiddens [N, H], weight [V, H], bias [V], targets [N] -> the sum of the losses."""
        chunk = CPU_CHUNK_LOGITS if hiddens.device.type == "cpu" else CHUNK_LOGITS
        if hiddens.dtype == torch.bfloat16:
            chunk *= 2  # as many bytes, and half as many additions to d_weight
        rows = max(1, chunk // len(weight))
        operand = weight.to(hiddens.dtype)
        to_logits, total = Packed(operand, rows), weight.new_zeros(())
        if with_gradient:
            to_hiddens = Packed(operand.t(), rows)
            d_hiddens, d_weight = torch.empty_like(hiddens), torch.zeros_like(weight)
            d_bias = torch.zeros_like(bias)
            ctx.gradients = d_hiddens, d_weight, d_bias
        for begin in range(0, len(hiddens), rows):
            x, y = hiddens[begin : begin + rows], targets[begin : begin + rows, None]
            logits = to_logits(x, bias)
            softmax = torch.softmax(logits, 1)
            # log(sum(exp(logits))), from the likeliest word: its probability is never near 0.
            normalizer = logits.amax(1) - softmax.amax(1).log()
            total += (normalizer - logits.gather(1, y).squeeze(1)).sum()
            if with_gradient:
                d_logits = softmax.scatter_add_(1, y, softmax.new_full(y.shape, -1.0))
                d_bias += d_logits.sum(0)
                d_logits = d_logits.to(hiddens.dtype)
                d_hiddens[begin : begin + rows] = to_hiddens(d_logits)
                if operand is weight:
                    d_weight.addmm_(d_logits.t(), x)
                else:
                    d_weight += d_logits.t() @ x
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total):
        if ctx.gradients is None:
            raise RuntimeError("a second backward through a chunked loss: its gradient is used up")
        gradients, ctx.gradients = ctx.gradients, None
        return *(gradient.mul_(d_total) for gradient in gradients), None, None


class SplitCrossEntropyLoss(nn.Module):
    """Softmax over a vocabulary whose words are sorted, roughly, from frequent to rare.

    `splits`, increasing, cut the vocabulary into a head [0, splits[0]) and tails. The head's
    softmax holds one "tombstone" for each tail, and a word of a tail has

        p(word) = p(tombstone of its tail) * p(word within the tail).

    With no split this is the ordinary softmax. A split at or past the end of the vocabulary, as
    the default ones can be, makes no tail: probabilities sum to 1 whatever the size.

    `tail_vectors` [tails, hidden_size] and `tail_bias` [tails] are parameters of the loss and have
    to be trained with the model's.
    """

    def __init__(self, hidden_size, splits=()):
        super().__init__()
        self.splits = list(splits)
        if any(low >= high for low, high in pairwise([0, *self.splits])):
            raise ValueError(f"splits must be positive and increasing, not {self.splits}")
        if self.splits:
            self.tail_vectors = nn.Parameter(torch.zeros(len(self.splits), hidden_size))
            self.tail_bias = nn.Parameter(torch.zeros(len(self.splits)))

    def _cut(self, weight, bias):
        """Head weight and bias with the tombstones behind the words; the (start, end) of tails."""
        edges = [split for split in self.splits if split < len(weight)] + [len(weight)]
        tails = list(pairwise(edges))
        if not tails:
            return weight, bias, tails
        head_weight = torch.cat([weight[: edges[0]], self.tail_vectors[: len(tails)]])
        head_bias = torch.cat([bias[: edges[0]], self.tail_bias[: len(tails)]])
        return head_weight, head_bias, tails

    @torch.no_grad()
    def init_bias(self, frequencies, bias):
        """Sets `bias` [V] and the tails' so that `frequencies` [V] are what a state of 0 gives."""
        bias.copy_(frequencies.log().to(bias.dtype))  # on the host: MPS has no float64
        edges = [split for split in self.splits if split < len(bias)] + [len(bias)]
        for tail, (start, end) in enumerate(pairwise(edges)):
            self.tail_bias[tail] = frequencies[start:end].sum().log()

    def forward(self, weight, bias, hiddens, targets):
        """Mean negative log-likelihood in nats.

        weight [V, H], bias [V], hiddens [..., H], targets [...] int64 -> scalar. With tails, how
        many targets each has decides the shapes, so on a GPU the host waits for that count.
        """
        hiddens, targets = hiddens.flatten(0, -2), targets.flatten()
        head_weight, head_bias, tails = self._cut(weight, bias)
        if not tails:
            return linear_nll(hiddens, weight, bias, targets, "mean")
        head_targets, total = targets, 0.0
        head_size = tails[0][0]
        for tombstone, (start, end) in enumerate(tails, head_size):
            member = (targets >= start) & (targets < end)
            head_targets = torch.where(member, tombstone, head_targets)
            rows = member.nonzero().squeeze(1)
            if len(rows):
                total = total + linear_nll(
                    hiddens[rows], weight[start:end], bias[start:end], targets[rows] - start, "sum"
                )
        total = total + linear_nll(hiddens, head_weight, head_bias, head_targets, "sum")
        return total / len(targets)

    def target_logprob(self, weight, bias, hiddens, targets):
        """Log-probability (nats) of one word for each: hiddens [N, H], targets [N] -> [N]."""
        rows = max(1, CPU_CHUNK_LOGITS // len(weight))
        return torch.cat([
            self.logprob(weight, bias, h).gather(1, y.unsqueeze(1)).squeeze(1)
            for h, y in zip(hiddens.split(rows), targets.split(rows))
        ])

    def logprob(self, weight, bias, hiddens):
        """Log-probabilities (nats) of every word: hiddens [N, H] -> [N, V]."""
        head_weight, head_bias, tails = self._cut(weight, bias)
        head = F.log_softmax(F.linear(hiddens, head_weight, head_bias), dim=-1)
        if not tails:
            return head
        head_size = tails[0][0]
        words = [head[:, :head_size]]
        for tombstone, (start, end) in enumerate(tails, head_size):
            tail = F.log_softmax(F.linear(hiddens, weight[start:end], bias[start:end]), dim=-1)
            words.append(head[:, tombstone, None] + tail)
        return torch.cat(words, dim=-1)
