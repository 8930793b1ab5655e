"""Generates text with a trained model, token by token.

    python generate.py --checkpoint PTB.pt --words 100 --prompt "the company said"
    python generate.py --checkpoint PTB.pt --interactive

Needs only the checkpoint. The same seed gives the same text on the same machine. The prompt is read
as UTF-8 in any locale.
"""

import os
import sys
from contextlib import nullcontext
from itertools import chain

from data import EOS, UNK, InputError, decode_line, encode
from evaluate import load_for_use
from flags import Parser, add_model_flags, count, number, run_command
from utils import warn, warn_about_unknown


def write_text(lm, prompt, out, args):
    """Writes `prompt` and `args.words` generated tokens to `out`, one sentence per line.

    With --interactive stops after the first sentence. Reports progress on stderr if `out` is a
    file. Raises InputError for a prompt that the model cannot read.
    """
    prompt = lm.split(prompt)
    _, unknown = encode(prompt, lm.vocabulary)
    warn_about_unknown(unknown, lm.vocabulary.unk)
    shown = [lm.vocabulary.unk if word in unknown else word for word in prompt]
    words = lm.generate(
        prompt, args.words, args.seed, args.temperature, args.top_k, args.top_p, args.no_unk
    )
    in_sentence, space = False, "" if lm.vocabulary.level == "char" else " "
    for generated, word in enumerate(chain(shown, words), 1 - len(prompt)):
        out.write("\n" if word == EOS else space * in_sentence + word)
        out.flush()
        in_sentence = word != EOS
        if generated > 0 and out is not sys.stdout and generated % args.log_interval == 0:
            warn(f"| Generated {generated}/{args.words} tokens")
        if generated > 0 and args.interactive and not in_sentence:
            break
    if in_sentence:
        print(file=out, flush=True)


def read_prompt(lm, args):
    """The text of --prompt. Raises InputError if the model cannot read it."""
    try:
        prompt = decode_line(os.fsencode(args.prompt), 1)
        lm.ids(prompt)
    except InputError as error:
        raise InputError(f"--prompt: {error}") from None
    return prompt


def complete_prompts(lm, out, args):
    """Completes each line of standard input; returns whether all could be read.

    For a line that cannot be read writes an empty one.
    """
    succeeded = True
    for n, line in enumerate(read_prompts(), 1):
        try:
            write_text(lm, decode_line(line, n).rstrip("\r\n"), out, args)
        except InputError as error:
            warn(f"Error: line {n}: {error}")
            print(file=out, flush=True)
            succeeded = False
    return succeeded


def read_prompts():
    """Yields the lines of standard input, as bytes; shows a prompt if it is a terminal."""
    while True:
        print("> " if sys.stdin.isatty() and sys.stdout.isatty() else "", end="", flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        yield line


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="the trained model")
    add("--words", type=count, default=1000,
        help="tokens to write, including ends of sentences (default: 1000)")
    add("--prompt", default="", help="start of the text; a line break ends a sentence")
    add("--temperature", type=number(float, 1e-3), default=1.0,
        help="values below 1 make likely words likelier (default: 1)")
    add("--top-k", type=number(int, 0), default=0, metavar="K",
        help="draw only from the K likeliest words (default: 0, all words)")
    add("--top-p", type=number(float, 0, open_low=True), default=1.0,
        metavar="P",
        help="draw from the smallest set of likeliest words with a total probability of at least P "
             "(default: 1, all words)")
    add("--no-unk", action="store_true", help="never write the token for unknown words")
    add("--seed", type=number(int, 0, 2**32), default=1111, help="random seed (default: 1111)")
    add("--outf", default="-", metavar="FILE",
        help="file to write, which must not exist (default: -, standard output)")
    add("--log-interval", type=count, default=100, metavar="N",
        help="tokens between progress reports when writing to a file (default: 100)")
    add("--interactive", action="store_true",
        help="read prompts from standard input, and complete one sentence for each")
    add("--data", help="accepted for compatibility; the checkpoint holds the vocabulary")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if args.interactive and args.prompt:
        parser.error("--prompt: prompts come from standard input with --interactive; leave it out")
    return args


def main(argv=None):
    args = parse_args(argv)
    lm = load_for_use(args.checkpoint, args)
    if args.no_unk and lm.vocabulary.unk is None:
        warn(f"Note: --no-unk has no effect: the vocabulary of {args.checkpoint} has no {UNK}; "
             "--unk names another token")
    prompt = read_prompt(lm, args)
    succeeded, to_file = True, args.outf != "-"
    if to_file and os.path.exists(args.outf):
        raise InputError(f"--outf {args.outf}: already exists; choose another name or remove it")
    with open(args.outf, "x", encoding="utf-8") if to_file else nullcontext(sys.stdout) as out:
        if args.interactive:
            succeeded = complete_prompts(lm, out, args)
        else:
            write_text(lm, prompt, out, args)
    return 0 if succeeded else 2


if __name__ == "__main__":
    run_command(main)
