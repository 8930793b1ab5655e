"""The mathematics of training: one step, the windows it reads, one evaluation, the trigger."""

import math
from collections import deque
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_swa_multi_avg_fn

import parallel
from data import batchify_exact
from hidden import repackage_hidden

EVAL_BATCH_SIZE, TEST_BATCH_SIZE = 10, 1  # as in the reference
EVAL_TOKENS = 2000  # of an evaluation's window: long ones keep a GPU busy
LONGEST = 65_535  # the steps of a window that cuDNN takes
LONGER = 25  # than bptt a window can be: five standard deviations, one draw in 3.5 million
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.99)}),
}
RATES = ("lr", "bias_lr", "wdecay")  # the flags that an optimizer holds

# How CUDA makes float32 products in torch.matmul and in cuDNN's recurrent layers.
if hasattr(torch.backends.cudnn, "rnn"):  # torch 2.9 and later
    PRODUCTS = [
        (torch.backends.cuda.matmul, "fp32_precision"), (torch.backends.cudnn.rnn, "fp32_precision")
    ]
    FLOAT32, TF32 = "ieee", "tf32"
else:
    PRODUCTS = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    FLOAT32, TF32 = False, True


def perplexity(loss):
    """exp of a loss in nats; inf where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def random_seq_len(bptt):
    """The length of the next window (section 4.1 of Merity et al. 2017, 1708.02182), at least 5.

    N(bptt, 5) with probability 0.95, else N(bptt / 2, 5): the windows' borders fall elsewhere in
    each epoch. Capped at LONGER above bptt, so that memory is bounded.
    """
    mean = bptt if np.random.random() < 0.95 else bptt / 2
    return min(max(5, int(np.random.normal(mean, 5))), bptt + LONGER)


def activation_regularization(raw_output, output, alpha, beta):
    """AR + TAR of the last layer (Merity et al. 2017, 1708.01009), each a mean of squares.

    AR is alpha * mean(output^2), over the output after dropout; TAR is beta * mean((h_t+1 -
    h_t)^2), over the output before dropout. Both [T, B, H]; TAR is 0 where T is 1. The papers
    print norms; the published results were made with means of squares.
    """
    penalty = 0.0
    if alpha:
        penalty = penalty + alpha * output.pow(2).mean()
    if beta and len(raw_output) > 1:
        penalty = penalty + beta * (raw_output[1:] - raw_output[:-1]).pow(2).mean()
    return penalty


class Objective(nn.Module):
    """What a step minimizes, as one module: so it can be replicated, the criterion included.

    `params` is nn.ModuleList([model, criterion]).
    """

    def __init__(self, params):
        super().__init__()
        self.params = params

    def groups(self):
        """Lists of the parameters that learn together, whose gradient is clipped as one."""
        return [list(self.parameters())]

    def forward(self, data, targets, hidden, alpha, beta):
        """data [L, B], targets [L*B] -> (loss + AR + TAR, the loss in nats alone, hidden)."""
        model, criterion = self.params
        output, hidden, raw_outputs, outputs = model(data, hidden, return_h=True)
        loss = criterion(model.decoder.weight, model.decoder.bias, output, targets)
        penalty = activation_regularization(raw_outputs[-1], outputs[-1], alpha, beta)
        return loss + penalty, loss.detach(), hidden


def train_step(objective, optimizer, data, targets, hidden, args, rate_share=1.0, **more):
    """One step of truncated BPTT on `data` [L, B] and `targets` [L*B].

    `objective` is an Objective, or its replica; it gets `more` as well. The learning rate of this
    step is the optimizer's times `rate_share`, what a schedule leaves of it, and times L / bptt, so
    that short windows do not weigh as much as long ones. Returns the loss in nats without AR and
    TAR, a tensor that stays on its device, and the new hidden state.
    """
    hidden = repackage_hidden(hidden)
    optimizer.zero_grad()
    total, loss, hidden = objective(data, targets, hidden, args.alpha, args.beta, **more)
    total.backward()
    if args.clip:
        for parameters in getattr(objective, "module", objective).groups():  # of its replica
            clip_grad_norm_(parameters, args.clip)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate * rate_share * len(data) / args.bptt
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    return loss, hidden


class Average:
    """The plain mean of the weights after every step since it was made, in `params`.

    Polyak and Juditsky 1992; section 3 of Merity et al. 2017 (1708.02182). The count stays on the
    host, so that no step waits for the device.
    """

    def __init__(self, params):
        self.params = deepcopy(params).requires_grad_(False)
        self.params.zero_grad()  # the gradients were copied too
        for module in self.params.modules():
            if isinstance(module, nn.RNNBase):  # a copy's weights lie apart, which cuDNN warns of
                module.flatten_parameters()
        self.count = 0

    def update(self, params):
        """Takes the weights of `params` into the mean."""
        mean, weights = list(self.params.parameters()), list(params.parameters())
        with torch.no_grad():
            get_swa_multi_avg_fn()(mean, weights, self.count)
        self.count += 1

    def state_dict(self):
        return {"count": self.count, "params": self.params.state_dict()}

    def load_state_dict(self, state):
        self.count = state["count"]
        self.params.load_state_dict(state["params"])


def set_products(precision):
    """Has CUDA make products as `precision` says: "fp32", "tf32" (factors of 10 bits) or "bf16".

    With bf16 those of float32 are float32's; cuDNN, which then has none, must not be held to them:
    it would leave out the tensor cores.
    """
    for setting, lower in zip(PRODUCTS, [("tf32",), ("tf32", "bf16")]):
        setattr(*setting, TF32 if precision in lower else FLOAT32)


@contextmanager
def float32_products():
    """While it is held products are float32's, as for every perplexity that is reported."""
    before = [getattr(*setting) for setting in PRODUCTS]
    set_products("fp32")
    try:
        yield
    finally:
        for setting, value in zip(PRODUCTS, before):
            setattr(*setting, value)


class Losses:
    """The losses of a pass, read without making the host wait for the step that is running.

    Each begins its way to the host as soon as it is added; `read` takes those that have arrived,
    and waits for the others, but for the newest `ahead`.
    """

    def __init__(self):
        self.on_the_way = deque()
        self.on_host = []  # (loss, tokens) pairs

    def add(self, loss, tokens):
        arrived = None
        if loss.is_cuda:  # .item() would wait for all that has been queued since
            loss = loss.to("cpu", non_blocking=True)
            arrived = torch.cuda.current_stream(loss.device).record_event()
        self.on_the_way.append((loss, arrived, tokens))

    def read(self, ahead=0):
        """Returns the losses, floats in nats, that no earlier call has returned."""
        known = len(self.on_host)
        while len(self.on_the_way) > ahead:
            loss, arrived, tokens = self.on_the_way.popleft()
            if arrived is not None:
                arrived.synchronize()
            self.on_host.append((loss.item(), tokens))
        return [loss for loss, _ in self.on_host[known:]]

    def mean(self, last=0):
        """The mean loss per token of the `last` batches read, or of all."""
        chosen = self.on_host[-last:]
        return math.fsum(loss * n for loss, n in chosen) / sum(n for _, n in chosen)


def loss_columns(loss, kind=""):
    """The columns of a log line: loss in nats, perplexity, bits per token."""
    return (
        f"{kind}loss {loss:5.2f} | {kind}ppl {perplexity(loss):8.2f} "
        f"| {kind}bpc {loss / math.log(2):8.3f}"
    )


@torch.no_grad()
@float32_products()
def evaluate(params, ids, batch_size, bptt, check=None):
    """Mean negative log-likelihood, in nats, of the N - 1 tokens of `ids` [N] that follow another.

    Each is predicted exactly once. Read in `batch_size` columns, whose first state is zero, in
    windows of `bptt` that carry the state along: the window does not change the result (but for
    biLSTM's, whose backward direction reads no further than its window). The columns are divided
    over the ranks, see parallel.py. `check`, a function, is called after each window: what it
    raises ends the evaluation.
    """
    model, criterion = params
    params.eval()
    device = model.encoder.weight.device
    inputs, targets, n = batchify_exact(ids, batch_size)
    mine = parallel.columns(batch_size)
    inputs, targets = inputs[:, mine].to(device), targets[:, mine].to(device)
    rows, rest = divmod(n, batch_size)  # the first `rest` columns have a prediction more
    width = inputs.size(1)
    n = rows * width + min(max(rest - mine.start, 0), width)
    hidden = model.init_hidden(width)
    losses = Losses()
    for i in range(0, len(inputs), bptt):
        if i * width < n:
            output, hidden = model(inputs[i : i + bptt], hidden)
            # All but the end of the last window is predicted; what follows n is padding.
            count = min(len(output), n - i * width)
            weight, bias = model.decoder.weight, model.decoder.bias
            window = targets[i : i + bptt].flatten()
            losses.add(criterion(weight, bias, output[:count], window[:count]), count)
        if check is not None:
            check()
    losses.read()
    losses.on_host = [pair for pairs in parallel.everyones(losses.on_host) for pair in pairs]
    return losses.mean()


def nonmonotone(logs, loss, nonmono):
    """The trigger of NT-ASGD: is `loss` worse than the best of `logs`, its last n left out?

    `logs` holds the validation losses of the earlier epochs. The paper's Algorithm 1 misprints
    the range; this is the published code's, which its authors confirmed.
    """
    return len(logs) > nonmono and loss > min(logs[: len(logs) - nonmono])


def make_optimizer(params, args):
    """SGD, Adam or AdamW over the parameters of model and criterion alike.

    AdamW (Loshchilov and Hutter 2017, 1711.05101) with betas of 0.8 and 0.99, the short recipe's:
    the means of the gradients and of their squares forget sooner than by default.

    The last of its two groups is the biases below the decoder (of recurrent layers, attention and
    combiner), whose rate is `args.bias_lr` times `args.lr`.
    """
    kind, settings = OPTIMIZERS[args.optimizer]
    below = [(name, p) for name, p in params[0].named_parameters() if name != "decoder.bias"]
    biases = [parameter for name, parameter in below if "bias" in name]
    known = set(biases)
    others = [parameter for parameter in params.parameters() if parameter not in known]
    groups = [{"params": others}, {"params": biases, "lr": args.lr * args.bias_lr}]
    # One pass over weights and gradients instead of several; torch has none for `meta`.
    fused = others[0].device.type in ("cpu", "cuda")
    return kind(groups, lr=args.lr, weight_decay=args.wdecay, fused=fused, **settings)


def change_rates(optimizer, args, changed):
    """Gives an optimizer of `make_optimizer`'s those RATES of `args` that are `changed`.

    The others stay as they are, which may be another way than in `args`.
    """
    others, biases = optimizer.param_groups
    if "wdecay" in changed:
        others["weight_decay"] = biases["weight_decay"] = args.wdecay
    share = args.bias_lr if "bias_lr" in changed else biases["lr"] / others["lr"]
    if "lr" in changed:
        others["lr"] = args.lr
    if changed & {"lr", "bias_lr"}:
        biases["lr"] = others["lr"] * share
