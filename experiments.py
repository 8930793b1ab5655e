"""The experiments of "Regularizing and Optimizing RNN Language Models", and ours, as plain data.

What all have in common is what main.py does when it is not told otherwise: emsize 400, nhid 1150,
three layers, bptt 70, SGD with a rate of 30 and then NT-ASGD, clip 0.25, dropout 0.4, dropoute 0.1,
wdrop 0.5, alpha 2, beta 1, wdecay 1.2e-6.
"""

from typing import NamedTuple

CORPORA = {
    "ptb": "--data data/penn --batch_size 20 --seed 141",
    "wt2": "--data data/wikitext-2 --batch_size 80 --seed 1882",
}
TITLES = {"ptb": "Penn Treebank", "wt2": "WikiText-2"}


class Experiment(NamedTuple):
    """One run: of main.py, or, where it has a base, of finetune.py on the base's model."""

    label: str  # of the curve
    flags: str
    # The report's: parameters (of ours without a report: None, as all), seconds an epoch on a GTX
    # 1080 Ti, best validation and test perplexity.
    parameters: int | None = None
    seconds: float | None = None
    valid: float | None = None
    test: float | None = None
    base: str | None = None
    epochs: int | None = None  # the report's, where they are not those of the corpus
    like: str | None = None  # the report's model whose time an epoch of this one is estimated by


# The report's section 4. Its GRU was trained at the LSTM's rate, where it diverges: kept, to show
# it. What it calls "LSTM without dropout" keeps wdrop, dropout and dropoute: lightly regularized.
EXPERIMENTS = {
    "ptb-lstm": Experiment(
        "LSTM", "--dropouti 0.4 --dropouth 0.25", 24_221_600, 48, 61.48, 58.98),
    "ptb-lstm-finetune": Experiment(
        "LSTM, fine-tuned", "", 24_221_600, 48, 59.04, base="ptb-lstm"),
    "ptb-lstm-lightly-regularized": Experiment(
        "LSTM, lightly regularized", "--dropouti 0 --dropouth 0", 24_221_600, 48, 72.64, 70.58),
    "ptb-gru-3": Experiment(
        "GRU, 3 layers, rate 30",
        "--model GRU --lr 30 --dropouti 0.4 --dropouth 0.25 --on-divergence continue",
        19_168_700, 41, 695.88, 655.29),
    "ptb-gru-5": Experiment(
        "GRU, 5 layers, rate 30",
        "--model GRU --nlayers 5 --lr 30 --dropouti 0.3 --dropouth 0.25 --on-divergence continue",
        35_052_500, 76, 700.43, 667.26),
    "ptb-bilstm": Experiment(
        "biLSTM (has seen its answer)", "--model biLSTM --dropouti 0.4 --dropouth 0.25",
        18_611_600, 58, 1.21, epochs=12),
    "wt2-lstm": Experiment("LSTM", "--dropouth 0.2", 33_556_078, 91, 68.85, 65.67),
    "wt2-lstm-finetune": Experiment(
        "LSTM, fine-tuned", "", 33_556_078, 98, 67.41, 64.45, base="wt2-lstm"),
    "wt2-lstm-lightly-regularized": Experiment(
        "LSTM, lightly regularized", "--dropouth 0", 33_556_078, 91, 74.92, 71.78),
    "wt2-gru-3": Experiment(
        "GRU, 3 layers, rate 30",
        "--model GRU --lr 30 --dropouth 0.2 --on-divergence continue",
        28_503_178, 77, 1064.51, 1013.37),
    "wt2-bilstm": Experiment(
        "biLSTM (has seen its answer)", "--model biLSTM --dropouth 0.2",
        27_946_078, 93, 1.09, 1.09),
    # Ours: what the report got wrong, or left open; and the LSTM with what the others need.
    "ptb-lstm-ours": Experiment(
        "LSTM, slow biases",
        "--bias-lr 0.01 --decoder-bias unigram --dropouti 0.4 --dropouth 0.25", like="ptb-lstm"),
    "ptb-gru-3-ours": Experiment(
        "GRU, 3 layers, own rates", "--model GRU --dropouti 0.4 --dropouth 0.25", like="ptb-gru-3"),
    "ptb-gru-5-ours": Experiment(
        "GRU, 5 layers, own rates", "--model GRU --nlayers 5 --dropouti 0.3 --dropouth 0.25",
        like="ptb-gru-5"),
    "ptb-bilm": Experiment(
        "biLM, all three losses",
        "--model biLM --objective both --dropouti 0.4 --dropouth 0.25", like="ptb-gru-5"),
    "ptb-lstm-attention": Experiment(
        "LSTM with attention", "--attention single --dropouti 0.4 --dropouth 0.25",
        like="ptb-lstm"),
}


def epochs_of(name, scale):
    """For how many epochs an experiment trains, or fine-tunes at most."""
    experiment, size = EXPERIMENTS[name], SCALES[scale]
    if scale == "full" and experiment.epochs:
        return experiment.epochs
    return (size.finetune if experiment.base else size.epochs)[corpus_of(name)]


def corpus_of(name):
    """The corpus of an experiment, a key of CORPORA."""
    return name.partition("-")[0]


class Scale(NamedTuple):
    """How large the models are, and how long they are trained."""

    about: str
    flags: str  # these come last, and win
    epochs: dict  # by corpus
    finetune: dict  # the most epochs of fine-tuning, by corpus
    seconds: dict  # an epoch of the LSTM, by corpus; but for the report's, a rough guess
    machine: str  # on which


SCALES = {
    "full": Scale(
        "the published size", "", {"ptb": 500, "wt2": 750}, {"ptb": 500, "wt2": 750},
        {"ptb": 48, "wt2": 91}, "the report's GTX 1080 Ti"),
    "small": Scale(
        "emsize 64, nhid 128, batch 40, 10 epochs", "--emsize 64 --nhid 128 --batch_size 40",
        {"ptb": 10, "wt2": 10}, {"ptb": 3, "wt2": 3}, {"ptb": 47, "wt2": 500}, "two CPU cores"),
    "tiny": Scale(
        "emsize 64, nhid 96, batch 10, bptt 35, 30 epochs; the sample in place of both corpora",
        "--data sample --emsize 64 --nhid 96 --batch_size 10 --bptt 35",
        {"ptb": 30, "wt2": 30}, {"ptb": 8, "wt2": 8}, {"ptb": 1.5, "wt2": 1.5}, "two CPU cores"),
}

# The report's figures come in pairs, the training loss and then the validation loss of the same
# runs (the caption of its Figure 8 repeats that of Figure 7, but it shows validation loss).
# The last pair is ours.
LSTMS = ["lstm", "lstm-finetune", "lstm-lightly-regularized"]
PAIRS = [
    ("ptb", "LSTM", LSTMS), ("ptb", "GRU and biLSTM", ["gru-3", "gru-5", "bilstm"]),
    ("wt2", "LSTM", LSTMS), ("wt2", "GRU and biLSTM", ["gru-3", "bilstm"]),
    ("ptb", "ours", ["lstm", "lstm-ours", "gru-3-ours", "gru-5-ours", "lstm-attention", "bilm"]),
]
