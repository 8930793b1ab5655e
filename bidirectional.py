"""Two language models, one in each direction, and words predicted from both contexts.

A forward and a backward stack never mix below the output, so neither has seen the word it predicts:
its perplexity is that of a language model, of the text as it stands or read from its end. For cloze
prediction a word's two contexts, all words before it and all after it, are combined.
"""

import torch
from torch import nn
from torch.func import functional_call

import distributed
from data import exact_windows
from model import RNNModel, activation_regularization
from utils import Losses, float32_products

CONTEXT = 10  # a window's word is scored in training with so many words of the window after it
# The losses of which each objective minimizes the sum and reports the mean.
OBJECTIVES = {
    "lm": ("forward", "backward"), "cloze": ("cloze",), "both": ("forward", "backward", "cloze")
}


class BiLM(RNNModel):
    """Two stacks of weight-dropped LSTMs that share the embedding and the tied decoder.

    As an RNNModel it is its forward half. `init_hidden` has the states of the forward stack, then
    those of the backward stack. The combiner of f [.., E], the forward state before a word, and b
    [.., E], the backward state after it, is tanh(W [f; b] + c), which the decoder reads. W begins
    as [I, I] and c at 0: as long as tanh is nearly linear, that is the product of both language
    models' predictions over the softmax of the decoder's bias, renormalized.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.backward_rnns = self.make_layers()
        size = self.decoder.in_features
        self.combiner = nn.Linear(2 * size, size)
        for half in self.combiner.weight.data.split(size, 1):
            nn.init.eye_(half)
        nn.init.zeros_(self.combiner.bias)

    def init_hidden(self, bsz):
        return super().init_hidden(bsz) + super().init_hidden(bsz)

    def read_backward(self, words, hidden, return_h=False):
        """The backward stack over `words` [T, B], in its own order: the text's last word first.

        As `forward` otherwise.
        """
        return self.read(self.backward_rnns, words, hidden, return_h)

    def forward_half(self):
        """The forward language model alone: an RNNModel of LSTMs, in evaluation mode."""
        half = RNNModel(**{**self.architecture, "rnn_type": "LSTM"})
        weights = self.state_dict()
        half.load_state_dict({name: weights[name] for name in half.state_dict()})
        return half.to(self.decoder.weight.device).eval()

    def combine(self, before, after):
        """[.., E], [.., E] -> [.., E]"""
        return self.as_operand(self.combiner(torch.cat([before, after], -1)).tanh())


class BiObjective(nn.Module):
    """What a step of BiLM minimizes: the sum of the losses that `objective` names.

    The backward language model reads a stream of its own, the text from its end, with a state of
    its own that is carried on. For cloze prediction the backward stack reads the forward stream's
    window from a zero state at its end, and the words with CONTEXT others after them in the window
    are scored (in an epoch's first window, with as many before them), or in a window shorter than
    twice that, with half of it. With "lm" the combiner alone learns from that, on states and a
    decoder that it does not change.
    """

    def __init__(self, params, objective):
        super().__init__()
        self.params = params
        self.objective = objective

    def groups(self):
        """Lists of the parameters that learn together, whose gradient is clipped as one."""
        if "cloze" in OBJECTIVES[self.objective]:
            return [list(self.parameters())]
        combiner = list(self.params[0].combiner.parameters())
        apart = {id(parameter) for parameter in combiner}
        return [[p for p in self.parameters() if id(p) not in apart], combiner]

    def forward(self, data, targets, hidden, alpha, beta, backward, begins):
        """data [L, B], targets [L*B]; backward: such a pair of the reversed stream.

        Returns (the sum + AR + TAR, the mean of the losses in nats, hidden).
        """
        model, criterion = self.params
        weight, bias = model.decoder.weight, model.decoder.bias
        parts = OBJECTIVES[self.objective]
        layers = len(model.rnns)
        passes, losses = [], {}
        output, states, *outputs = model(data, hidden[:layers], return_h=True)
        before = outputs[1][-1]  # [L, B, E]
        passes.append(outputs)
        states_back = hidden[layers:]
        if "forward" in parts:
            losses["forward"] = criterion(weight, bias, output, targets)
            words, words_after = backward
            output, states_back, *outputs = model.read_backward(words, states_back, return_h=True)
            losses["backward"] = criterion(weight, bias, output, words_after)
            passes.append(outputs)
        targets = targets.view(data.shape)
        with torch.set_grad_enabled("cloze" in parts and torch.is_grad_enabled()):
            zero = model.init_hidden(data.size(1))[layers:]
            _, _, *outputs = model.read_backward(targets.flip(0), zero, return_h=True)
        after = outputs[1][-1].flip(0)  # [L, B, E]: of the words from each to the window's end
        score_cloze = criterion
        if "cloze" in parts:
            passes.append(outputs)
        else:
            before, weight, bias = before.detach(), weight.detach(), bias.detach()
            fixed = {name: value.detach() for name, value in criterion.named_parameters()}

            def score_cloze(*inputs):
                return functional_call(criterion, fixed, inputs)

        after = torch.cat([after[1:], torch.zeros_like(after[:1])])  # nothing follows the last
        margin = min(CONTEXT, len(data) // 2)
        scored = slice(min(margin, len(data) - margin - 1) if begins else 0, len(data) - margin)
        cloze = score_cloze(
            weight, bias, model.combine(before[scored], after[scored]), targets[scored]
        )
        total = cloze
        if "cloze" in parts:
            losses["cloze"] = cloze
        for name in ("forward", "backward"):
            total = total + losses.get(name, 0.0)
        for raw, dropped in passes:
            total = total + activation_regularization(raw[-1], dropped[-1], alpha, beta)
        mean = sum(losses[part] for part in parts) / len(parts)
        return total, mean.detach(), [*states, *states_back]


@torch.no_grad()
@float32_products()
def evaluate_directions(params, ids, batch_size, bptt, check=None):
    """{"forward", "backward", "cloze": mean negative log-likelihood in nats} of `ids` [N].

    The language models predict all words but the first they read, as train.evaluate's. Cloze
    prediction is of the same words as the forward model's. All contexts are whole columns of the
    text, read in windows that carry the state along.
    """
    model, criterion = params
    params.eval()
    weight, bias = model.decoder.weight, model.decoder.bias
    layers = len(model.rnns)
    ids = ids.to(weight.device)
    places = torch.arange(len(ids), device=ids.device)
    columns = distributed.columns(batch_size)
    states = model.init_hidden(columns.stop - columns.start)

    def read_text(places, read, hidden, step, after_window):
        """The losses of predicting the word `step` places from each of `places`, in this order.

        `after_window(output, places, targets)` is called with what was read.
        """
        losses = Losses()
        for window, _, count in exact_windows(places, batch_size, bptt, columns):
            if count:
                output, hidden = read(ids[window], hidden)
                output, window = output[:count], window.flatten()[:count]
                targets = ids[window + step]
                losses.add(criterion(weight, bias, output, targets), count)
                after_window(output, window, targets)
            if check is not None:
                check()
        return losses

    # The state after reading each place of the text from its end; past the end, where nothing has
    # been read, zero.
    after = weight.new_zeros(len(ids) + 1, weight.size(1))
    cloze = Losses()

    def store(output, places, targets):
        after[places] = output

    def predict_cloze(output, places, targets):
        combined = model.combine(output, after[places + 2])
        cloze.add(criterion(weight, bias, combined, targets), len(places))

    backward = read_text(places.flip(0), model.read_backward, states[layers:], -1, store)
    after = distributed.total(after)
    forward = read_text(places, model, states[:layers], 1, predict_cloze)
    parts = {"forward": forward, "backward": backward, "cloze": cloze}
    return {name: losses.mean_of_all_ranks() for name, losses in parts.items()}


def make_model(rnn_type, *args, **kwargs):
    """An RNNModel, or its subclass for "biLM"."""
    return (BiLM if rnn_type == "biLM" else RNNModel)(rnn_type, *args, **kwargs)


def is_bilm(params):
    return isinstance(params[0], BiLM)
