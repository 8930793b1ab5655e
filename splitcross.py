"""The loss: cross-entropy of a softmax that can be split by word frequency into head and tails.

Grave et al. 2016 (1609.04309), in the form of Merity et al. 2018 (1803.08240).
"""

from itertools import pairwise

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cpu_kernels import Packed, has_onednn

# Above this many logits (256 MiB of float32) the loss is computed in chunks; below it a single
# matrix product is faster. On a CPU small chunks, which stay in its cache, are always faster.
CHUNK_ABOVE = 2**26
CHUNK_LOGITS = 2**24
CPU_CHUNK_LOGITS = 2**22


def default_splits(ntoken):
    """Where to split a vocabulary of that size: the reference's thresholds."""
    if ntoken > 500_000:  # One Billion Words
        return [4200, 35000, 180000]
    if ntoken > 75_000:  # WikiText-103
        return [2800, 20000, 76000]
    return []


def linear_nll(hiddens, weight, bias, targets):
    """The summed cross-entropy (nats) of targets [N] under softmax(hiddens @ weight.T + bias).

    hiddens [N, H], weight [V, H], bias [V]. Matrix products use the dtype of `hiddens`, everything
    else that of `weight`. If the logits are computed in chunks, the forward pass also computes the
    gradient, which can be used only once: a second backward raises RuntimeError.
    """
    if has_onednn(hiddens) or len(hiddens) * len(weight) > CHUNK_ABOVE:
        return ChunkedNLL.apply(hiddens, weight, bias, targets, torch.is_grad_enabled())
    if hiddens.dtype == weight.dtype:
        logits = F.linear(hiddens, weight, bias)
    else:
        logits = F.linear(hiddens, weight.to(hiddens.dtype)).to(weight.dtype) + bias
    return F.cross_entropy(logits, targets, reduction="sum")


class ChunkedNLL(torch.autograd.Function):
    """The summed cross-entropy of a linear layer, without holding all logits in memory at once.

    The gradient of the sum with respect to the logits is softmax(logits) - onehot(targets). On a
    CPU it is a quarter faster than torch's linear_cross_entropy because it uses oneDNN's products.
    """

    @staticmethod
    def forward(ctx, hiddens, weight, bias, targets, with_gradient):
        """hiddens [N, H], weight [V, H], bias [V], targets [N] -> the sum of the losses."""
        chunk = CPU_CHUNK_LOGITS if hiddens.device.type == "cpu" else CHUNK_LOGITS
        if hiddens.dtype == torch.bfloat16:
            chunk *= 2  # the same size in bytes, and half as many additions to d_weight
        rows = max(1, chunk // len(weight))
        operand = weight.to(hiddens.dtype)
        to_logits, total = Packed(operand, rows), weight.new_zeros(())
        if with_gradient:
            to_hiddens = Packed(operand.t(), rows)
            d_hiddens, d_weight = torch.empty_like(hiddens), torch.zeros_like(weight)
            d_bias = torch.zeros_like(bias)
            ctx.gradients = d_hiddens, d_weight, d_bias
        for start in range(0, len(hiddens), rows):
            x, y = hiddens[start : start + rows], targets[start : start + rows, None]
            logits = to_logits(x, bias)
            softmax = torch.softmax(logits, 1)
            # log(sum(exp(logits))), via the likeliest word, whose probability is never near 0.
            normalizer = logits.amax(1) - softmax.amax(1).log()
            total += (normalizer - logits.gather(1, y).squeeze(1)).sum()
            if with_gradient:
                d_logits = softmax.scatter_add_(1, y, softmax.new_full(y.shape, -1.0))
                d_bias += d_logits.sum(0)
                d_logits = d_logits.to(hiddens.dtype)
                d_hiddens[start : start + rows] = to_hiddens(d_logits)
                if operand is weight:
                    d_weight.addmm_(d_logits.t(), x)
                else:
                    d_weight += d_logits.t() @ x
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total):
        if ctx.gradients is None:
            raise RuntimeError("backward through a chunked loss works only once; compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(gradient.mul_(d_total) for gradient in gradients), None, None


class SplitCrossEntropyLoss(nn.Module):
    """Softmax over a vocabulary whose words are roughly sorted from frequent to rare.

    The increasing `splits` divide the vocabulary into a head [0, splits[0]) and tails. The head's
    softmax has one "tombstone" per tail, and a word of a tail has

        p(word) = p(tombstone of its tail) * p(word within the tail).

    Without splits this is the ordinary softmax. A split at or past the end of the vocabulary, as
    the default splits can be, adds no tail, so probabilities sum to 1 for any vocabulary size.

    `tail_vectors` [tails, hidden_size] and `tail_bias` [tails] are parameters of the loss and must
    be trained together with the model's.
    """

    def __init__(self, hidden_size, splits=()):
        super().__init__()
        self.splits = list(splits)
        if any(low >= high for low, high in pairwise([0, *self.splits])):
            raise ValueError(f"splits must be positive and increasing, not {self.splits}")
        if self.splits:
            self.tail_vectors = nn.Parameter(torch.zeros(len(self.splits), hidden_size))
            self.tail_bias = nn.Parameter(torch.zeros(len(self.splits)))

    def _tails(self, ntoken):
        """The (start, end) of each tail of a vocabulary of `ntoken` words."""
        return list(pairwise([*(split for split in self.splits if split < ntoken), ntoken]))

    def _cut(self, weight, bias):
        """Head weight and bias (words, then tombstones), and the (start, end) of each tail."""
        tails = self._tails(len(weight))
        if not tails:
            return weight, bias, tails
        head_size = tails[0][0]
        head_weight = torch.cat([weight[:head_size], self.tail_vectors[: len(tails)]])
        head_bias = torch.cat([bias[:head_size], self.tail_bias[: len(tails)]])
        return head_weight, head_bias, tails

    @torch.no_grad()
    def init_bias(self, frequencies, bias):
        """Sets `bias` [V] and `tail_bias` so that a zero state predicts `frequencies` [V]."""
        bias.copy_(frequencies.log().to(bias.dtype))  # on the host: MPS has no float64
        for tail, (start, end) in enumerate(self._tails(len(bias))):
            self.tail_bias[tail] = frequencies[start:end].sum().log()

    def forward(self, weight, bias, hiddens, targets):
        """Mean negative log-likelihood in nats.

        weight [V, H], bias [V], hiddens [..., H], targets [...] int64 -> scalar. With tails, the
        shapes depend on the number of targets per tail, so on a GPU the host waits for that count.
        """
        hiddens, targets = hiddens.flatten(0, -2), targets.flatten()
        head_weight, head_bias, tails = self._cut(weight, bias)
        head_targets, total = targets, 0.0
        for tombstone, (start, end) in enumerate(tails, len(head_weight) - len(tails)):
            member = (targets >= start) & (targets < end)
            head_targets = torch.where(member, tombstone, head_targets)
            rows = member.nonzero().squeeze(1)
            if len(rows):
                total = total + linear_nll(
                    hiddens[rows], weight[start:end], bias[start:end], targets[rows] - start
                )
        total = total + linear_nll(hiddens, head_weight, head_bias, head_targets)
        return total / len(targets)

    def target_logprob(self, weight, bias, hiddens, targets):
        """Log-probabilities (nats) of the targets: hiddens [N, H], targets [N] -> [N]."""
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
