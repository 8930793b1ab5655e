"""Scores texts with a trained model: per file, per line or per token.

    python evaluate.py --checkpoint PTB.pt my.txt
    echo "the company said it would not" | python evaluate.py --checkpoint PTB.pt --per-line
    python evaluate.py --checkpoint PTB.pt --per-token --format csv my.txt > tokens.csv

The format of a text is that of training: UTF-8, tokens separated by white space (for a model of
characters: plain text), one sentence per line; also compressed by gzip. Each line ends in <eos>,
which is predicted too; another <eos> precedes the first word. If a file or a line cannot be scored,
the others still are, and the exit code is 2.
"""

import csv
import math
import sys
from collections import Counter
from itertools import islice

from bidirectional import evaluate_directions, is_bilm
from checkpoint import load
from data import EOS, InputError, decode_line, encode, list_most_common, open_lines
from flags import Parser, add_model_flags, count, resolve_device, run_command
from model import NOTES, WINDOW
from utils import (
    json_line, log, log_parts, log_word_perplexity, loss_columns, note_explicit_eos, perplexity,
    set_up_device, warn, warn_about_unknown,
)

# The columns of a row for a file, a line and a token. log_prob is a natural logarithm, loss is its
# negative per token, and surprisal is in bits.
COLUMNS = {
    "file": ("file", "tokens", "unknown", "log_prob", "loss", "ppl"),
    "line": ("file", "line", "id", "tokens", "unknown", "log_prob", "loss", "ppl", "text"),
    "token": ("file", "line", "id", "token", "unknown", "log_prob", "surprisal"),
}
TEXT_COLUMNS = {
    "line": ("ppl", "loss", "tokens", "unknown", "text"),
    "token": ("log_prob", "surprisal", "unknown", "token"),
}


def load_for_use(path, args):
    """The LanguageModel at `path` on `args.device`, by default CUDA if available.

    Notes on stderr that only the forward half of a biLM is used. Raises InputError for biLSTM,
    which sees the word it predicts, and if a flag cannot be met.
    """
    resolve_device(args)
    set_up_device(args.device)
    lm = load(path, args.device, args.unk)
    model, _ = lm
    if args.model not in (None, model.rnn_type):
        raise InputError(
            f"--model {args.model}: {path} is of type {model.rnn_type}; leave the flag out"
        )
    if model.rnn_type == "biLSTM":
        raise InputError(f"{path}: {NOTES['biLSTM']}; use another model")
    if is_bilm(lm.params):
        warn(
            f"Note: {path} is a biLM: results are those of its forward language model; after "
            "training with --objective cloze they mean nothing"
        )
    return lm


class Scorer:
    """Scores texts and writes the results to standard output, a row per file, line or token."""

    def __init__(self, lm, args):
        self.lm, self.args = lm, args
        self.failed = False  # whether a file or a line could not be scored
        self.unknown = Counter()
        self.explicit_eos = 0  # lines that end in one
        self.totals = []  # (tokens, unknown tokens, log-probability) of each file
        self.kind = "token" if args.per_token else "line" if args.per_line else "file"
        self.columns = COLUMNS[self.kind]
        if args.format == "text" and self.kind != "file":
            self.columns = ("id",) * args.ids + TEXT_COLUMNS[self.kind]
            print(*self.columns, sep="\t", flush=True)
        if args.format == "csv":
            # Readers take an unquoted carriage return, which csv would write, for a line's end.
            self.csv = csv.writer(sys.stdout, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
            self.csv.writerow(self.columns)

    def score(self, path):
        """Scores a file. Raises InputError for a file that cannot be scored."""
        if self.args.per_line:
            self.score_lines(path)
            return
        rows = list(self.lines(path))
        words = [word for row in rows for word in row["words"]]
        if set(words) <= {EOS}:
            raise InputError(f"{path}: holds no words")
        score = self.lm.score(words, columns=self.args.batch_size)
        if self.kind == "file":
            self.write({"file": path}, score)
            if self.args.format == "text":
                self.log_other_losses(score, words)
            return
        tokens = iter(score.tokens)
        for row in rows:
            self.write(row, score._replace(tokens=list(islice(tokens, len(row["words"])))))

    def score_lines(self, path):
        """Scores each line by itself, as soon as a batch has been read."""
        batch = []
        try:
            for row in self.lines(path):
                batch.append(row)
                if len(batch) == self.args.batch_size:
                    rows, batch = batch, []
                    self.write_lines(rows)
        finally:  # score what could be read of a damaged file
            self.write_lines(batch)

    def write_lines(self, rows):
        """Writes a row per line; a bad line has no score."""
        scores = iter(self.lm.score_each([row["words"] for row in rows if row["words"]]))
        for row in rows:
            if row["words"]:
                self.write(row, next(scores))
            else:
                self.write_row(row)

    def lines(self, path):
        """Yields a row for each line of a file, with its words, which for a bad line are [].

        Without --per-line raises InputError for a bad line.
        """
        try:
            with open_lines(path) as lines:
                for number, line in enumerate(lines, 1):
                    yield self.read_line(path, number, line)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None

    def read_line(self, path, number, line):
        """The row of one line. See `lines`."""
        row = {"file": path, "line": number, "id": "", "text": "", "words": []}
        try:
            text = decode_line(line, number)
            if self.args.ids:
                row["id"], text = (*text.split(maxsplit=1), "", "")[:2]
            words = self.lm.vocabulary.split(text)
            row["text"] = self.lm.vocabulary.join(words)
            _, unknown = encode(words, self.lm.vocabulary)
            row["words"] = [*words, EOS]
            self.unknown.update(unknown)
            self.explicit_eos += words[-1:] == [EOS]
        except InputError as error:
            message = f"{path}: line {number}: {error}"
            if not self.args.per_line:
                raise InputError(message) from None
            self.fail(message)
        return row

    def fail(self, message):
        warn(f"Error: {message}")
        self.failed = True

    def log_other_losses(self, score, words):
        """Logs the perplexity per word of a model of characters, and the other losses of a biLM."""
        ids = self.lm.ids([EOS, *words])
        log_word_perplexity(-score.log_prob / len(words), ids[1:].cpu(), self.lm.vocabulary)
        if is_bilm(self.lm.params):
            columns = min(self.args.batch_size, len(words))
            log_parts(evaluate_directions(self.lm.params, ids, columns, max(1, WINDOW // columns)))

    def write(self, row, score):
        """Writes the row of a file or a line, or one for each token."""
        if self.kind == "token":
            for token, log_prob in score.tokens:
                self.write_row({
                    **row, "token": token, "unknown": int(token in score.unknown),
                    "log_prob": log_prob, "surprisal": -log_prob / math.log(2),
                })
            return
        self.totals.append((len(score.tokens), score.unknown.total(), score.log_prob))
        self.write_row({**row, **results(*self.totals[-1])}, score.unknown)

    def write_total(self):
        """Writes the row of all files."""
        if self.kind == "file" and len(self.totals) > 1:
            self.write_row({"file": "total", **results(*map(sum, zip(*self.totals)))})

    def write_row(self, row, unknown=()):
        values = [row.get(column) for column in self.columns]
        if self.args.format == "json":
            print(json_line(dict(zip(self.columns, values))), flush=True)
        elif self.args.format == "csv":
            self.csv.writerow(values)
            sys.stdout.flush()
        elif self.kind == "file":
            named = f" ({list_most_common(unknown)})" if unknown else ""
            log(f"| {row['file']} | {loss_columns(row['loss'])} | {row['tokens']:,} tokens, "
                f"{row['unknown']:,} unknown{named}")
        else:
            shown = (f"{value:.4f}" if isinstance(value, float) else value for value in values)
            shown = ("" if value is None else str(value).replace("\t", "\\t") for value in shown)
            print(*shown, sep="\t", flush=True)


def results(tokens, unknown, log_prob):
    """The columns of a file or a line."""
    loss = -log_prob / tokens
    return {
        "tokens": tokens, "unknown": unknown, "log_prob": log_prob, "loss": loss,
        "ppl": perplexity(loss),
    }


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("text", nargs="*", default=["-"], help="text files (default: -, standard input)")
    add("--checkpoint", required=True, help="the trained model")
    add("--per-line", action="store_true",
        help="score each line by itself, and write a row for each as soon as it has been read")
    add("--per-token", action="store_true",
        help="write a row for each token: its log-probability (natural logarithm) given all before "
             "it, in the file or with --per-line in the line, and its surprisal in bits")
    add("--format", choices=["text", "json", "csv"], default="text",
        help="text (rows of lines and tokens are separated by tabs), json (an object per row) or "
             "csv; json and csv have all columns, in full precision (default: text)")
    add("--ids", action="store_true",
        help="the first word of each line is an identifier: it is written, and not scored")
    add("--batch_size", type=count, default=1, metavar="N",
        help="read N parts of a text, or with --per-line N lines, in parallel. This is faster, but "
             "all parts except the first start without context, and no result is written until N "
             "lines have been read (default: 1)")
    add_model_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    lm = load_for_use(args.checkpoint, args)
    scorer = Scorer(lm, args)
    for path in args.text:
        try:
            scorer.score(path)
        except InputError as error:
            scorer.fail(error)
    scorer.write_total()
    note_explicit_eos(scorer.explicit_eos, warn)
    if args.format != "text" or args.per_line or args.per_token:
        warn_about_unknown(scorer.unknown, lm.vocabulary.unk)
    return 2 if scorer.failed or log.failed else 0


if __name__ == "__main__":
    run_command(main)
