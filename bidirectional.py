"""Two language models, one in each direction, and words predicted from both contexts.

The forward and the backward stack never mix below the output, so neither has seen the word it
predicts: each has the perplexity of a language model, of the text or of the reversed text. Cloze
prediction combines a word's two contexts, all words before it and all words after it.
"""

import torch
from torch import nn
from torch.func import functional_call

import distributed
from data import exact_windows
from model import RNNModel, activation_regularization
from utils import Losses, float32_products

CONTEXT = 10  # in training, the number of words in the window that must follow a scored word
# The losses of each objective: training minimizes their sum and reports their mean.
OBJECTIVES = {
    "lm": ("forward", "backward"), "cloze": ("cloze",), "both": ("forward", "backward", "cloze")
}


class BiLM(RNNModel):
    """Two stacks of weight-dropped LSTMs that share the embedding and the tied decoder.

    Used as an RNNModel, it is the forward half. `init_hidden` returns the states of the forward
    stack, then those of the backward stack. The combiner joins f [.., E], the forward state before
    a word, and b [.., E], the backward state after it, to tanh(W [f; b] + c), the decoder's input.
    W starts as [I, I] and c as 0. Where tanh is nearly linear, this is the product of the two
    models' predictions divided by the softmax of the decoder's bias, renormalized.
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
        """As `forward`, but with the backward stack, over reversed text `words` [T, B]."""
        return self.read(self.backward_rnns, words, hidden, return_h)

    def forward_half(self):
        """The forward language model: an RNNModel of LSTMs, in evaluation mode."""
        half = RNNModel(**{**self.architecture, "rnn_type": "LSTM"})
        weights = self.state_dict()
        half.load_state_dict({name: weights[name] for name in half.state_dict()})
        return half.to(self.decoder.weight.device).eval()

    def combine(self, before, after):
        """Joins the forward and the backward states: [.., E], [.., E] -> [.., E]."""
        return self.as_operand(self.combiner(torch.cat([before, after], -1)).tanh())


class BiObjective(nn.Module):
    """The training objective of BiLM: the sum of the losses in OBJECTIVES[objective].

    The backward language model reads its own stream, the reversed text, and carries its own hidden
    state. For cloze prediction the backward stack reads the forward stream's window from a zero
    state at the window's end. Only words followed by CONTEXT words in the window are scored; in the
    first window of an epoch, they also need CONTEXT words before them. A window shorter than twice
    CONTEXT uses half its length instead. With "lm" the cloze loss is added, but only the combiner
    learns from it.
    """

    def __init__(self, params, objective):
        super().__init__()
        self.params = params
        self.objective = objective

    def clip_groups(self):
        """Lists of parameters; the gradient norm is clipped per list."""
        if "cloze" in OBJECTIVES[self.objective]:
            return [list(self.parameters())]
        others = [p for name, p in self.named_parameters() if "combiner" not in name]
        return [others, list(self.params[0].combiner.parameters())]

    def forward(self, data, targets, hidden, alpha, beta, backward, is_first_window):
        """data [L, B], targets [L*B]; backward: (data, targets) of the reversed stream.

        Returns (the sum of all losses + AR + TAR, the mean loss of the objective in nats, hidden).
        """
        model, criterion = self.params
        weight, bias = model.decoder.weight, model.decoder.bias
        parts = OBJECTIVES[self.objective]
        layers = len(model.rnns)
        output, states, raw, dropped = model(data, hidden[:layers], return_h=True)
        before = dropped[-1]  # [L, B, E]
        passes, losses = [(raw[-1], before)], {}  # the last layer's outputs, for AR and TAR
        backward_states = hidden[layers:]
        if "forward" in parts:
            losses["forward"] = criterion(weight, bias, output, targets)
            words, words_after = backward
            output, backward_states, raw, dropped = model.read_backward(
                words, backward_states, return_h=True
            )
            losses["backward"] = criterion(weight, bias, output, words_after)
            passes.append((raw[-1], dropped[-1]))
        targets = targets.view(data.shape)
        with torch.set_grad_enabled("cloze" in parts and torch.is_grad_enabled()):
            zero = model.init_hidden(data.size(1))[layers:]
            _, _, raw, dropped = model.read_backward(targets.flip(0), zero, return_h=True)
        after = dropped[-1].flip(0)  # [L, B, E]: after reading from the window's end to a word
        score_cloze = criterion
        if "cloze" in parts:
            passes.append((raw[-1], dropped[-1]))
        else:
            before, weight, bias = before.detach(), weight.detach(), bias.detach()
            fixed = {name: value.detach() for name, value in criterion.named_parameters()}

            def score_cloze(*inputs):
                return functional_call(criterion, fixed, inputs)

        after = torch.cat([after[1:], torch.zeros_like(after[:1])])  # nothing follows the last word
        margin = min(CONTEXT, len(data) // 2)
        first = min(margin, len(data) - margin - 1) if is_first_window else 0
        scored = slice(first, len(data) - margin)
        losses["cloze"] = score_cloze(
            weight, bias, model.combine(before[scored], after[scored]), targets[scored]
        )
        total = sum(losses.values())
        for raw_output, output in passes:
            total = total + activation_regularization(raw_output, output, alpha, beta)
        mean = sum(losses[part] for part in parts) / len(parts)
        return total, mean.detach(), [*states, *backward_states]


@torch.no_grad()
@float32_products()
def evaluate_directions(params, ids, batch_size, bptt, check=None):
    """{"forward", "backward", "cloze": mean negative log-likelihood in nats} of `ids` [N].

    Each language model predicts all words but the first one it reads, as in train.evaluate. Cloze
    prediction scores the same words as the forward model. A context extends to the end of its
    column of the text; the columns are read in windows that carry the hidden state.
    """
    model, criterion = params
    params.eval()
    weight, bias = model.decoder.weight, model.decoder.bias
    layers = len(model.rnns)
    ids = ids.to(weight.device, torch.int64)
    columns = distributed.columns(batch_size)
    states = model.init_hidden(columns.stop - columns.start)
    losses = {name: Losses() for name in ("forward", "backward", "cloze")}

    def read_windows(order, read, hidden, step):
        """Yields (outputs, places, the words `step` away) for each window of the places `order`."""
        for window, _, count in exact_windows(order, batch_size, bptt, columns):
            if count:
                output, hidden = read(ids[window], hidden)
                places = window.flatten()[:count]
                yield output[:count], places, ids[places + step]
            if check is not None:
                check()

    def add_loss(name, output, words):
        losses[name].add(criterion(weight, bias, output, words), len(words))

    forwards = torch.arange(len(ids), device=ids.device)
    backwards = forwards.flip(0)
    # The backward state after reading each place; zero past the end, where nothing has been read.
    after = weight.new_zeros(len(ids) + 1, weight.size(1))
    for output, places, words in read_windows(backwards, model.read_backward, states[layers:], -1):
        after[places] = output
        add_loss("backward", output, words)
    after = distributed.total(after)
    for output, places, words in read_windows(forwards, model, states[:layers], 1):
        add_loss("forward", output, words)
        add_loss("cloze", model.combine(output, after[places + 2]), words)
    return {name: part.mean_of_all_ranks() for name, part in losses.items()}


def make_model(rnn_type, *args, **kwargs):
    """An RNNModel, or a BiLM for "biLM"."""
    return (BiLM if rnn_type == "biLM" else RNNModel)(rnn_type, *args, **kwargs)


def is_bilm(params):
    return isinstance(params[0], BiLM)
