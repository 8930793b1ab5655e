"""The experiments of "Regularizing and Optimizing RNN Language Models", and ours, as plain data.

They share main.py's defaults, which are the report's. The flags of an experiment override those of
its corpus, and the flags of the scale override both.
"""

from typing import NamedTuple

CORPORA = {  # an experiment's name starts with its corpus
    "ptb": "--data data/penn --batch_size 20 --seed 141 --epochs 500",
    "wt2": "--data data/wikitext-2 --batch_size 80 --seed 1882 --epochs 750",
}


class Experiment(NamedTuple):
    """A run of main.py or, if it has a base, of finetune.py on the base's model.

    The numbers are the report's; None if it has none, as for all our experiments.
    """

    label: str  # of its curve
    flags: str
    parameters: int | None = None
    seconds: float | None = None  # per epoch, on a GTX 1080 Ti
    valid: float | None = None  # best perplexity
    test: float | None = None  # perplexity
    base: str | None = None


# Section 4 of the report. As in the report, the GRU has the LSTM's learning rate, at which it
# diverges. The report's "LSTM without dropout" keeps wdrop, dropout and dropoute; it is called
# lightly regularized here.
EXPERIMENTS = {
    "ptb-lstm": Experiment(
        "LSTM", "--dropouti 0.4 --dropouth 0.25", 24_221_600, 48, 61.48, 58.98),
    "ptb-lstm-finetune": Experiment(
        "LSTM, fine-tuned", "", 24_221_600, 48, 59.04, base="ptb-lstm"),
    "ptb-lstm-lightly-regularized": Experiment(
        "LSTM, lightly regularized", "--dropouti 0 --dropouth 0", 24_221_600, 48, 72.64, 70.58),
    "ptb-gru-3": Experiment(
        "GRU, 3 layers, rate 30",
        "--recipe published --model GRU --dropouti 0.4 --dropouth 0.25 --on-divergence continue",
        19_168_700, 41, 695.88, 655.29),
    "ptb-gru-5": Experiment(
        "GRU, 5 layers, rate 30",
        "--recipe published --model GRU --nlayers 5 --dropouti 0.3 --dropouth 0.25 "
        "--on-divergence continue",
        35_052_500, 76, 700.43, 667.26),
    "ptb-bilstm": Experiment(
        "biLSTM (has seen its answer)",
        "--model biLSTM --dropouti 0.4 --dropouth 0.25 --epochs 12",
        18_611_600, 58, 1.21),
    "wt2-lstm": Experiment("LSTM", "--dropouth 0.2", 33_556_078, 91, 68.85, 65.67),
    "wt2-lstm-finetune": Experiment(
        "LSTM, fine-tuned", "", 33_556_078, 98, 67.41, 64.45, base="wt2-lstm"),
    "wt2-lstm-lightly-regularized": Experiment(
        "LSTM, lightly regularized", "--dropouth 0", 33_556_078, 91, 74.92, 71.78),
    "wt2-gru-3": Experiment(
        "GRU, 3 layers, rate 30",
        "--recipe published --model GRU --dropouth 0.2 --on-divergence continue",
        28_503_178, 77, 1064.51, 1013.37),
    "wt2-bilstm": Experiment(
        "biLSTM (has seen its answer)", "--model biLSTM --dropouth 0.2",
        27_946_078, 93, 1.09, 1.09),
    # Ours: corrections and extensions of the report, and the LSTM with the same corrections.
    "ptb-lstm-ours": Experiment(
        "LSTM, slow biases",
        "--bias-lr 0.01 --decoder-bias unigram --dropouti 0.4 --dropouth 0.25"),
    "ptb-gru-3-ours": Experiment(
        "GRU, 3 layers, own rates", "--model GRU --dropouti 0.4 --dropouth 0.25"),
    "ptb-gru-5-ours": Experiment(
        "GRU, 5 layers, own rates", "--model GRU --nlayers 5 --dropouti 0.3 --dropouth 0.25"),
    "ptb-bilm": Experiment(
        "biLM, all three losses",
        "--model biLM --objective both --dropouti 0.4 --dropouth 0.25"),
    "ptb-lstm-attention": Experiment(
        "LSTM with attention", "--attention single --dropouti 0.4 --dropouth 0.25"),
}


class Scale(NamedTuple):
    """The size of the models and the length of their training."""

    about: str
    flags: str
    finetune: str  # flags of fine-tuning
    time_ratio: dict  # approximate time of an epoch over the report's, by corpus


SCALES = {
    "full": Scale("the published size", "", "", {"ptb": 1, "wt2": 1}),  # on the report's GPU
    # On two CPU cores:
    "small": Scale(
        "emsize 64, nhid 128, batch 40, 10 epochs",
        "--emsize 64 --nhid 128 --batch_size 40 --epochs 10", "--epochs 3",
        {"ptb": 1, "wt2": 5.5}),
    "tiny": Scale(
        "emsize 64, nhid 96, batch 10, bptt 35, 30 epochs; the sample in place of both corpora",
        "--data sample --emsize 64 --nhid 96 --batch_size 10 --bptt 35 --epochs 30", "--epochs 8",
        {"ptb": 0.03, "wt2": 0.016}),
}

# Each row gives two figures, training loss and validation loss. Rows 1 to 4 are the report's eight
# figures. (Its Figure 8 shows the validation loss, contrary to its caption.)
FIGURES = {
    "ptb, LSTM": ["ptb-lstm", "ptb-lstm-finetune", "ptb-lstm-lightly-regularized"],
    "ptb, GRU and biLSTM": ["ptb-gru-3", "ptb-gru-5", "ptb-bilstm"],
    "wt2, LSTM": ["wt2-lstm", "wt2-lstm-finetune", "wt2-lstm-lightly-regularized"],
    "wt2, GRU and biLSTM": ["wt2-gru-3", "wt2-bilstm"],
    "ptb, ours": ["ptb-lstm", "ptb-lstm-ours", "ptb-gru-3-ours", "ptb-gru-5-ours",
                  "ptb-lstm-attention", "ptb-bilm"],
}


def flags_of(name, scale):
    """The flags of an experiment, {flag: value}, both strings."""
    experiment, size = EXPERIMENTS[name], SCALES[scale]
    finetune = size.finetune if experiment.base else ""
    words = f"{CORPORA[name[:3]]} {experiment.flags} {size.flags} {finetune}".split()
    return dict(zip(words[::2], words[1::2]))


def estimated_hours(name, scale):
    """The estimated time of an experiment, in hours."""
    epochs = int(flags_of(name, scale)["--epochs"])
    seconds = EXPERIMENTS[name].seconds or 60  # the average of our experiments
    return epochs * seconds * SCALES[scale].time_ratio[name[:3]] / 3600


def model_path(out, name):
    """The checkpoint of an experiment; its log is in the same folder."""
    return out / "runs" / name / "model.pt"


def command(name, scale, out):
    """The command line of an experiment, a list that starts with main.py or finetune.py."""
    script, flags, base = "main.py", flags_of(name, scale), EXPERIMENTS[name].base
    if base:  # finetune.py takes all other flags from the base
        flags = {flag: flags[flag] for flag in ("--seed", "--epochs")}
        script, flags["--resume"] = "finetune.py", str(model_path(out, base))
    flags["--save"] = str(model_path(out, name))
    return [script, *(word for flag in flags.items() for word in flag)]
