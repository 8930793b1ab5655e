"""The model: embedding -> regularized recurrent layers -> decoder; AR and TAR."""

from torch import nn

from attention import Attention
from embed_regularize import embedded_dropout
from locked_dropout import LockedDropout
from qrnn import QRNN
from weight_drop import WeightDrop

RNN_TYPES = ("LSTM", "GRU", "QRNN", "biLSTM", "biLM")
CELLS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "biLSTM": nn.LSTM, "biLM": nn.LSTM}
DROPOUTS = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")  # rates, see RNNModel
WINDOW = 2000  # tokens read at once in evaluation: long windows keep a GPU busy
# Notes on a model's perplexity, for the log and the checkpoint.
NOTES = {
    "biLSTM": "biLSTM, the report's model, sees the word that it predicts, because its backward "
    "direction reads from the window's end; its perplexity is not a language model's",
}


def check_architecture(rnn_type, ninp, nhid, attention="none"):
    """Raises ValueError, saying what to do, for a model that cannot be built."""
    if rnn_type not in RNN_TYPES:
        raise ValueError(f"model {rnn_type} is unknown; choose from {', '.join(RNN_TYPES)}")
    if rnn_type.startswith("bi") and attention != "none":
        raise ValueError(f"attention only looks back: leave it out with {rnn_type}")
    if rnn_type == "biLSTM" and (nhid % 2 or ninp % 2):
        raise ValueError(
            f"nhid {nhid}, emsize {ninp}: biLSTM needs even sizes, half for each direction"
        )


def training_settings(args):
    """RNNModel's dropout rates, `bf16` and `pad_to`, from the flags."""
    rates = {rate: getattr(args, rate) for rate in DROPOUTS}
    return {"bf16": args.precision == "bf16", "pad_to": args.pad_to, **rates}


class RNNModel(nn.Module):
    """A weight-dropped recurrent language model (Merity et al. 2017, 1708.02182).

    rnn_type: "LSTM", "GRU", "QRNN" (its first layer reads two words per step, as in the reference)
    or "biLSTM" (each direction half as wide); for "biLM" see bidirectional.py. ntoken: vocabulary
    size V. ninp: embedding size E. nhid: hidden size of all layers but the last, whose size is E if
    the weights are tied (then `decoder.weight is encoder.weight`).

    Dropout rates, from input to output: `dropoute` drops words from the embedding, `dropouti` drops
    from the input of the first layer, `wdrop` from the hidden-to-hidden weights of each layer (both
    directions; from all weights of a QRNN), `dropouth` between layers, `dropout` from the output of
    the last layer.

    With `bf16`, training computes the matrix products of the recurrent layers and of the decoder in
    bfloat16, and returns `output`, the decoder's input, in bfloat16. Weights, states and everything
    else stay in float32. Evaluation is always in float32. For `pad_to` see weight_drop.py.

    With `attention` ("single" or "combined"), each state of the last layer attends to the
    `attention_window` states before it, see attention.py.

    biLSTM is the report's model. Its backward direction has read the word to be predicted, so its
    perplexity is not a language model's.

    Raises ValueError for a model that cannot be built, see check_architecture and Attention.
    """

    def __init__(
        self, rnn_type, ntoken, ninp, nhid, nlayers, dropout=0.5, dropouth=0.5, dropouti=0.5,
        dropoute=0.1, wdrop=0, tie_weights=False, bf16=False, pad_to=1, attention="none",
        attention_window=70,
    ):
        super().__init__()
        check_architecture(rnn_type, ninp, nhid, attention)
        # The arguments that rebuild this model, as plain data for checkpoints.
        self.architecture = {
            "rnn_type": rnn_type, "ntoken": ntoken, "ninp": ninp, "nhid": nhid,
            "nlayers": nlayers, "tie_weights": tie_weights, "attention": attention,
            "attention_window": attention_window,
        }
        self.rnn_type = rnn_type
        self.dropout, self.dropouth, self.dropouti = dropout, dropouth, dropouti
        self.dropoute, self.bf16 = dropoute, bf16
        self.wdrop, self.pad_to = wdrop, pad_to  # each layer has its own copy

        widths = [nhid] * (nlayers - 1) + [ninp if tie_weights else nhid]
        self.layer_sizes = list(zip([ninp, *widths], widths))  # (input, output) of each layer

        self.encoder = nn.Embedding(ntoken, ninp)
        self.lockdrop = LockedDropout()
        self.rnns = self.make_layers()
        self.attention = None
        if attention != "none":
            self.attention = Attention(widths[-1], attention, attention_window)
        self.decoder = nn.Linear(widths[-1], ntoken)
        if tie_weights:  # Press and Wolf 2016 (1608.05859), Inan et al. 2016 (1611.01462)
            self.decoder.weight = self.encoder.weight
        self.init_weights()

    def make_layers(self):
        """The recurrent layers, an nn.ModuleList."""
        if self.rnn_type == "QRNN":
            return nn.ModuleList(
                WeightDrop(QRNN(*sizes, window=1 if layer else 2), ["linear.weight"], self.wdrop)
                for layer, sizes in enumerate(self.layer_sizes)
            )
        cell = CELLS[self.rnn_type]
        dropped, directions = ["weight_hh_l0"], 1
        if self.rnn_type == "biLSTM":
            dropped, directions = ["weight_hh_l0", "weight_hh_l0_reverse"], 2
        return nn.ModuleList(
            WeightDrop(
                cell(input_width, width // directions, bidirectional=directions == 2),
                dropped, self.wdrop, pad_to=self.pad_to,
            )
            for input_width, width in self.layer_sizes
        )

    def init_weights(self):
        """Embedding and decoder uniform in [-0.1, 0.1], decoder bias 0 (section 5 of the paper).

        The recurrent layers keep torch's default, uniform in [-1/sqrt(H), 1/sqrt(H)], as in the
        paper.
        """
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, input, hidden, return_h=False):
        """input [T, B] int64, hidden as from `init_hidden` -> (output, hidden).

        output [T*B, E] is the last layer's output after dropout, the decoder's input. With
        `return_h`, returns (output, hidden, raw_outputs, outputs): the lists of all layers' outputs
        [T, B, H] before and after dropout. TAR uses the last raw output, AR the last output.
        Attention is applied between the two.
        """
        return self.read(self.rnns, input, hidden, return_h)

    def read(self, rnns, input, hidden, return_h=False):
        """As `forward`, with other layers: biLM's backward stack, or Cells in generation."""
        embedded = embedded_dropout(self.encoder, input, self.dropoute if self.training else 0)
        x = self.lockdrop(embedded, self.dropouti)  # [T, B, E]
        new_hidden, raw_outputs, outputs = [], [], []
        for layer, rnn in enumerate(rnns):
            is_last = layer == len(rnns) - 1
            x, state = rnn(x, hidden[layer], bf16=self.in_bf16())  # [T, B, H]
            new_hidden.append(state)
            raw_outputs.append(x)
            if self.attention is not None and is_last:
                x, memory = self.attention(x, hidden[len(rnns)])  # see init_hidden
                new_hidden.append(memory)
            x = self.lockdrop(x, self.dropout if is_last else self.dropouth)
            outputs.append(x)
        output = self.as_operand(x.flatten(0, 1))
        if return_h:
            return output, new_hidden, raw_outputs, outputs
        return output, new_hidden

    def in_bf16(self):
        """Whether to compute in bfloat16; never in evaluation."""
        return self.bf16 and self.training

    def as_operand(self, output):
        """`output` in the dtype of the decoder's matrix product."""
        return output.bfloat16() if self.in_bf16() else output

    def init_hidden(self, bsz):
        """A zero state for `bsz` columns, on the model's device: a list with one entry per layer.

        An entry is (h, c) for LSTMs, h for the GRU and c for the QRNN, each [directions, bsz, H];
        for the QRNN's first layer it is (c, the last input [1, bsz, E]). With attention, the empty
        memory of earlier states [0, bsz, E] follows.
        """
        directions = 2 if self.rnn_type == "biLSTM" else 1
        states = [
            self.encoder.weight.new_zeros(directions, bsz, rnn.module.hidden_size)
            for rnn in self.rnns
        ]
        if self.rnn_type == "QRNN":
            states[0] = states[0], self.encoder.weight.new_zeros(1, bsz, self.encoder.embedding_dim)
        elif isinstance(self.rnns[0].module, nn.LSTM):
            states = [(h, h.clone()) for h in states]
        if self.attention is not None:
            states.append(self.encoder.weight.new_zeros(0, bsz, self.decoder.in_features))
        return states


def activation_regularization(raw_output, output, alpha, beta):
    """AR + TAR of the last layer (section 4.6 of 1708.02182; 1708.01009), each a mean of squares.

    AR is alpha * mean(output^2), over the output after dropout. TAR is beta * mean((h_{t+1}
    - h_t)^2), over the raw output before dropout, and 0 if T is 1. Both outputs are [T, B, H]. The
    papers print norms; the published results used means of squares.
    """
    penalty = 0.0
    if alpha:
        penalty = penalty + alpha * output.pow(2).mean()
    if beta and len(raw_output) > 1:
        penalty = penalty + beta * (raw_output[1:] - raw_output[:-1]).pow(2).mean()
    return penalty
