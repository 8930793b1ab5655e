"""Scores text with a trained model: its perplexity, of a whole file or line by line.

    python evaluate.py --checkpoint PTB.pt my.txt
    echo "the company said it would not" | python evaluate.py --checkpoint PTB.pt --per-line

Text is as for training: UTF-8, tokens separated by white space, a sentence a line. Each line ends
in <eos>, which is predicted too; before the first word stands an <eos>.
"""

import sys
from argparse import Namespace
from collections import Counter
from itertools import islice

import torch

from bidirectional import is_bilm
from data import InputError, words_of_lines
from flags import Parser, count, run
from train import score
from trained import add_flags, begin_of_text, encode, some, trained, warn_of_unknown
from utils import log, log_parts, loss_columns, perplexity

TOKENS = 2**15  # in a batch of lines, padding included, unless a single one has more
BPTT = 2000  # words read at once
LINES = 1024  # read, scored, and printed together


@torch.no_grad()
def score_lines(params, lines):
    """The log-probability in nats of each of `lines`, a list of floats in their order.

    A line is a list of ids: an <eos>, its words, an <eos>; all but the first are predicted, from
    a zero state. A biLM predicts each from the words on both its sides (cloze).
    """
    params.eval()
    result = [0.0] * len(lines)
    # Combined attention has a vector for each pair of a word and a state that it attends.
    tokens = BPTT if params[0].architecture["attention"] == "combined" else TOKENS
    order = sorted(range(len(lines)), key=lambda i: len(lines[i]))
    while order:
        longest = len(lines[order[-1]])
        chosen = order[-max(1, tokens // longest) :]  # of much the same length
        del order[-len(chosen) :]
        lengths = torch.tensor([len(lines[i]) - 1 for i in chosen])
        words = torch.zeros(longest, len(chosen), dtype=torch.int64)
        for column, i in enumerate(chosen):
            words[: len(lines[i]), column] = torch.tensor(lines[i])
        # Summed on the host, in float64, which MPS has not.
        sums = score_columns(params, words, lengths).cpu().double().sum(0)
        for i, value in zip(chosen, sums.tolist()):
            result[i] = value
    return result


def score_columns(params, words, lengths):
    """The log-probabilities [T, B] of words [T + 1, B], of which column b predicts 1 to lengths[b].

    0 past those.
    """
    model, criterion = params
    device = model.encoder.weight.device
    words, lengths = words.to(device), lengths.to(device)
    layers = len(model.rnns)
    hidden = model.init_hidden(words.size(1))
    after = states_after(model, words, lengths, hidden[layers:]) if is_bilm(params) else None
    result = []
    steps = len(words) - 1
    for start in range(0, steps, BPTT):
        window = slice(start, min(start + BPTT, steps))
        output, hidden = model(words[window], hidden)
        targets = words[window.start + 1 : window.stop + 1]
        if after is not None:
            output = model.combine(output, after[window].flatten(0, 1))
        weight, bias = model.decoder.weight, model.decoder.bias
        logprob = criterion.target_logprob(weight, bias, output, targets.flatten())
        predicted = torch.arange(window.start, window.stop, device=device)[:, None] < lengths
        result.append(logprob.view_as(targets).where(predicted, 0.0))
    return torch.cat(result)


def states_after(model, words, lengths, hidden):
    """The backward states from the words after each that is predicted: [T, B, E].

    Row t is for the word t + 1: the state after reading a column from its last word down to the
    word t + 2; zero where there is none.
    """
    places = torch.arange(len(words), device=words.device).unsqueeze(1)
    backward = words.gather(0, (lengths - places).clamp(min=0))  # each column from its last word
    outputs = []
    for start in range(0, len(words), BPTT):
        output, hidden = model.read_backward(backward[start : start + BPTT], hidden)
        outputs.append(output.view(-1, words.size(1), output.size(1)))
    read = lengths - 2 - places[:-1]  # [T, B]: how many were read before the last of them
    states = torch.cat(outputs).gather(
        0, read.clamp(min=0).unsqueeze(2).expand(-1, -1, outputs[0].size(2))
    )
    return states.where((read >= 0).unsqueeze(2), 0.0)


def open_text(path):
    """The lines of a file, or of standard input for "-", as bytes. Raises InputError."""
    if path == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed; name a file")
        return sys.stdin.buffer
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def score_text(params, dictionary, path, args):
    """Logs the loss of a whole text, read as one stream."""
    ids, unknown, blank = [begin_of_text(dictionary)], Counter(), True
    with open_text(path) as lines:
        for words in words_of_lines(lines, path):
            found, missing = encode(words, dictionary, args.checkpoint)
            ids += [*found, begin_of_text(dictionary)]
            unknown += missing
            blank = blank and not words
    if blank:
        raise InputError(f"{path}: holds no words")
    settings = Namespace(bptt=BPTT, objective="cloze")
    columns = min(args.batch_size, len(ids) - 1)
    loss, parts = score(params, torch.tensor(ids), settings, batch_size=columns)
    named = f" ({some(unknown)})" if unknown else ""
    log(f"| {path} | {loss_columns(loss)} | {len(ids) - 1:,} tokens, "
        f"{unknown.total():,} unknown{named}")
    log_parts(parts)


def score_each_line(params, dictionary, path, args):
    """Prints a line for each line of a text: perplexity, loss, tokens, unknown words, the text."""
    every = Counter()
    with open_text(path) as lines:
        texts = words_of_lines(lines, path)
        while block := list(islice(texts, LINES)):
            encoded = [encode(words, dictionary, args.checkpoint) for words in block]
            eos = begin_of_text(dictionary)
            logprobs = score_lines(params, [[eos, *ids, eos] for ids, _ in encoded])
            for words, (ids, unknown), logprob in zip(block, encoded, logprobs):
                tokens = len(ids) + 1
                every += unknown
                loss = -logprob / tokens
                print(
                    f"{perplexity(loss):.2f}\t{loss:.4f}\t{tokens}\t{unknown.total()}\t"
                    f"{' '.join(words)}", flush=True,
                )
    warn_of_unknown(every)


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("text", nargs="*", default=["-"], help="text files (default: -, standard input)")
    add("--checkpoint", required=True, help="the trained model")
    add("--per-line", action="store_true",
        help="score each line on its own, and print for each: perplexity, loss in nats a token, "
             "tokens, unknown words, the line; separated by tabs")
    add("--batch_size", type=count, default=1, metavar="N",
        help="parts in which a whole text is read side by side; more are faster, but each but the "
             "first begins without its context (default: 1)")
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.text.count("-") > 1:
        parser.error("-: standard input can be read once; name it once")
    return args


def main(argv=None):
    args = parse_args(argv)
    params, dictionary = trained(args.checkpoint, args, both=True)
    if args.per_line:
        print("ppl\tloss\ttokens\tunknown\ttext", flush=True)
    for path in args.text:
        (score_each_line if args.per_line else score_text)(params, dictionary, path, args)
    return 2 if log.failed else 0


if __name__ == "__main__":
    run(main)
