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
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from bidirectional import is_bilm
from data import EOS, InputError, encode, name_commonest, words_of_lines
from flags import Parser, add_device_flags, load_for_use, count, run_command
from train import score
from utils import log, log_parts, loss_columns, perplexity, warn_of_unknown

BPTT = 2000  # words of a whole text that are read at once
LINES = 32  # read, scored and printed at once


@torch.no_grad()
def score_lines(params, lines):
    """The log-probability in nats of each of `lines`, side by side: [B] float64, on the CPU.

    A line is a list of at least two ids. All but the first are predicted, from a zero state; a biLM
    predicts each from the words on both of its sides (cloze).
    """
    model, criterion = params.eval()
    weight, bias = model.decoder.weight, model.decoder.bias
    words = pad_sequence([torch.tensor(line) for line in lines]).to(weight.device)  # [T + 1, B]
    hidden = model.init_hidden(len(lines))
    output, _ = model(words[:-1], hidden)  # [T * B, E]
    if is_bilm(params):
        output = model.combine(output, states_after(model, lines, hidden).flatten(0, 1))
    targets = words[1:]
    logprob = criterion.target_logprob(weight, bias, output, targets.flatten())
    lengths = torch.tensor([len(line) - 1 for line in lines], device=weight.device)
    padding = torch.arange(len(targets), device=weight.device).unsqueeze(1) >= lengths
    logprob = logprob.view_as(targets).masked_fill(padding, 0.0)
    return logprob.cpu().double().sum(0)  # MPS has no float64


def states_after(model, lines, hidden):
    """The backward states from the words after each one that is predicted: [T, B, E].

    Row t is for word t + 1 of a line: the state after reading from its last word back to word
    t + 2, or 0 if it has none.
    """
    reversed_lines = [torch.tensor(line[::-1]) for line in lines]
    words = pad_sequence(reversed_lines).to(model.decoder.weight.device)  # [T + 1, B]
    output, _ = model.read_backward(words, hidden[len(model.rnns) :])
    states = output.view(*words.shape, -1)  # row s: after reading s + 1 words
    columns = [states[: len(line) - 2, i].flip(0) for i, line in enumerate(lines)]
    return F.pad(pad_sequence(columns), (0, 0, 0, 0, 0, 1))  # nothing follows the last word


def score_text(params, dictionary, path, lines, args):
    """Logs the loss of a whole text, read as one stream."""
    words = [word for line in words_of_lines(lines, path) for word in (*line, EOS)]
    if set(words) <= {EOS}:
        raise InputError(f"{path}: holds no words")
    ids, unknown = encode([EOS, *words], dictionary, args.checkpoint)
    columns = min(args.batch_size, len(ids) - 1)
    settings = Namespace(bptt=max(1, BPTT // columns), objective="cloze")
    loss, parts = score(params, torch.tensor(ids), settings, batch_size=columns)
    named = f" ({name_commonest(unknown)})" if unknown else ""
    log(f"| {path} | {loss_columns(loss)} | {len(words):,} tokens, "
        f"{unknown.total():,} unknown{named}")
    log_parts(parts)


def score_each_line(params, dictionary, path, lines, args):
    """Prints for each line of a text: perplexity, loss, tokens, unknown words, the line."""
    texts, all_unknown = words_of_lines(lines, path), Counter()
    while block := list(islice(texts, LINES)):
        encoded = [encode([EOS, *words, EOS], dictionary, args.checkpoint) for words in block]
        logprobs = score_lines(params, [ids for ids, _ in encoded])
        for words, (_, unknown), logprob in zip(block, encoded, logprobs.tolist()):
            tokens = len(words) + 1
            loss = -logprob / tokens
            row = (f"{perplexity(loss):.2f}", f"{loss:.4f}", tokens, unknown.total())
            print(*row, " ".join(words), sep="\t", flush=True)
            all_unknown += unknown
    warn_of_unknown(all_unknown)


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
    add_device_flags(parser)
    args = parser.parse_args(argv)
    if args.text.count("-") > 1:
        parser.error("-: standard input can be read once; name it once")
    return args


def main(argv=None):
    args = parse_args(argv)
    params, dictionary = load_for_use(args.checkpoint, args, keep_bilm=True)
    score_file = score_each_line if args.per_line else score_text
    if args.per_line:
        print("ppl\tloss\ttokens\tunknown\ttext", flush=True)
    for path in args.text:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as lines:
            score_file(params, dictionary, path, lines, args)
    return 2 if log.failed else 0


if __name__ == "__main__":
    run_command(main)
