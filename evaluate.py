"""Computes a trained model's perplexity on text files, per file or per line.

    python evaluate.py --checkpoint PTB.pt my.txt
    echo "the company said it would not" | python evaluate.py --checkpoint PTB.pt --per-line

The format is that of training: UTF-8, tokens separated by white space, one sentence per line. Each
line ends in <eos>, which is predicted too; another <eos> precedes the first word.
"""

import gzip
import sys
from argparse import Namespace
from collections import Counter
from contextlib import nullcontext

import torch

from checkpoint import build_params, read_checkpoint
from data import EOS, Dictionary, InputError, encode, list_most_common, words_of_lines
from flags import Parser, add_device_flags, count, resolve_device, run_command
from model import NOTES
from train import score
from utils import (
    log, log_parts, loss_columns, perplexity, set_up_device, warn, warn_about_unknown, write_utf8,
)

BPTT = 2000  # words read at once


def load_for_use(path, args, keep_bilm=False):
    """Loads the checkpoint at `path` on `args.device`, by default CUDA if available.

    Returns (nn.ModuleList([model, criterion]) in evaluation mode and float32, data.Dictionary).
    Unless `keep_bilm`, a biLM is reduced to its forward language model, with a note on stderr.
    Raises InputError for an unsatisfiable flag, and for biLSTM, which sees the word it predicts.
    """
    resolve_device(args)
    args.precision = "fp32"
    set_up_device(args)
    checkpoint = read_checkpoint(path, args.device)
    params = build_params(checkpoint).eval()
    found = params[0].rnn_type
    if args.model not in (None, found):
        raise InputError(f"--model {args.model}: {path} is of type {found}; leave the flag out")
    if found == "biLSTM":
        raise InputError(f"{path}: {NOTES[found]}; use another model")
    if found == "biLM" and not keep_bilm:
        params[0] = params[0].forward_half()
        cloze = checkpoint["flags"].get("objective") == "cloze"
        warn(
            f"Note: only the forward language model of the biLM {path} is used"
            + (", and it was not trained (--objective cloze)" if cloze else "")
        )
    return params, Dictionary(checkpoint["vocabulary"])


def score_words(params, dictionary, words, args):
    """Scores `words` after an <eos>, in at most `args.batch_size` columns.

    Returns (mean loss in nats, {name: loss} of a biLM's parts, Counter of the unknown words). A
    biLM's loss is its cloze loss.
    """
    ids, unknown = encode([EOS, *words], dictionary)
    columns = min(args.batch_size, len(words))
    settings = Namespace(bptt=max(1, BPTT // columns), objective="cloze")
    return *score(params, torch.tensor(ids), settings, batch_size=columns), unknown


def score_text(params, dictionary, path, lines, args):
    """Logs the loss of a text, read as one stream."""
    words = [word for line in lines for word in (*line, EOS)]
    if set(words) <= {EOS}:
        raise InputError(f"{path}: holds no words")
    loss, parts, unknown = score_words(params, dictionary, words, args)
    named = f" ({list_most_common(unknown)})" if unknown else ""
    log(f"| {path} | {loss_columns(loss)} | {len(words):,} tokens, "
        f"{unknown.total():,} unknown{named}")
    log_parts(parts)


def score_each_line(params, dictionary, path, lines, args):
    """Prints each line's perplexity, loss, number of tokens, number of unknown words, and text."""
    all_unknown = Counter()
    for words in lines:
        loss, _, unknown = score_words(params, dictionary, [*words, EOS], args)
        row = f"{perplexity(loss):.2f}", f"{loss:.4f}", len(words) + 1, unknown.total()
        print(*row, " ".join(words), sep="\t", flush=True)
        all_unknown += unknown
    warn_about_unknown(all_unknown, dictionary.unk)


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("text", nargs="*", default=["-"], help="text files, .gz too (default: -, standard input)")
    add("--checkpoint", required=True, help="the trained model")
    add("--per-line", action="store_true",
        help="score each line separately and print, separated by tabs: perplexity, loss in nats "
             "per token, number of tokens, number of unknown words, the line")
    add("--batch_size", type=count, default=1, metavar="N",
        help="number of parts of a text that are read in parallel; more parts are faster, but all "
             "parts except the first start without context (default: 1)")
    add_device_flags(parser)
    args = parser.parse_args(argv)
    if args.per_line and args.batch_size > 1:
        parser.error("--batch_size: has no effect with --per-line, which reads one line at a time")
    return args


def main(argv=None):
    args = parse_args(argv)
    write_utf8()
    params, dictionary = load_for_use(args.checkpoint, args, keep_bilm=True)
    score_file = score_each_line if args.per_line else score_text
    if args.per_line:
        print("ppl\tloss\ttokens\tunknown\ttext", flush=True)
    for path in args.text:
        open_file = gzip.open if path.endswith(".gz") else open
        with nullcontext(sys.stdin.buffer) if path == "-" else open_file(path, "rb") as lines:
            score_file(params, dictionary, path, words_of_lines(lines, path), args)
    return 2 if log.failed else 0


if __name__ == "__main__":
    run_command(main)
