"""Writes text with a trained model, word by word.

    python generate.py --checkpoint PTB.pt --words 100 --prompt "the company said"
    python generate.py --checkpoint PTB.pt --interactive

The checkpoint is all that is needed. The same seed writes the same text on the same machine.
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

import torch

from cpu_kernels import Cell, Packed
from data import EOS, InputError
from flags import Parser, count, number, run
from trained import UNK, add_flags, begin_of_text, encode, trained, warn_of_unknown
from utils import warn


def truncate(probability, top_k=0, top_p=1.0):
    """Keeps the `top_k` likeliest words (0: all), then the nucleus of `top_p`.

    The nucleus is the fewest likeliest words that have the probability `top_p` together (Holtzman
    et al. 2019, 1904.09751). probability [.., V] -> [.., V], what is left scaled to a sum of 1.
    """
    ranked, words = probability.sort(descending=True)
    if top_k:
        ranked[..., top_k:] = 0
    ranked /= ranked.sum(-1, keepdim=True)
    before = ranked.cumsum(-1) - ranked  # of the words that are likelier
    ranked = ranked.masked_fill(before >= top_p, 0)  # never the likeliest
    kept = ranked / ranked.sum(-1, keepdim=True)
    return torch.zeros_like(probability).scatter_(-1, words, kept)


class Generator:
    """Draws words from a model; `text` is a stream of ids that goes on and on.

    The next word's log-probabilities are divided by `temperature`, then truncated; `banned` is an
    iterable of ids that are never drawn. Draws are made on the model's device, in float64 where it
    has that.
    """

    def __init__(self, params, seed, temperature=1.0, top_k=0, top_p=1.0, banned=()):
        self.params = params.eval()
        model, criterion = params
        device = model.encoder.weight.device
        self.layers = model.rnns
        with torch.no_grad():
            if device.type == "cpu":
                self.layers = [Cell(rnn.module) for rnn in model.rnns]
            self.logits = None if criterion.splits else Packed(model.decoder.weight, 1)
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.banned = list(banned)
        self.random = torch.Generator(device).manual_seed(seed)

    @torch.inference_mode()
    def text(self, prompt):
        """Yields ids that follow those in `prompt`, of which there has to be one at least."""
        model, criterion = self.params
        weight, bias = model.decoder.weight, model.decoder.bias
        hidden, words = model.init_hidden(1), torch.tensor(prompt, device=weight.device)
        while True:
            output, hidden = model.read(self.layers, words.unsqueeze(1), hidden)
            if self.logits is None:
                logits = criterion.logprob(weight, bias, output[-1:])
            else:
                logits = self.logits(output[-1:], bias)
            words = self.draw(logits)
            yield words.item()

    def draw(self, logits):
        """An id for each row: log-probabilities [.., V], up to a constant, -> [..]."""
        logits = logits.to(torch.float32 if logits.is_mps else torch.float64, copy=True)
        logits[..., self.banned] = -torch.inf
        probability = (logits / self.temperature).softmax(-1)
        if self.top_k or self.top_p < 1:
            probability = truncate(probability, self.top_k, self.top_p)
        # The word whose waiting time at its rate is the shortest: never one of probability 0, which
        # torch.multinomial has drawn on some devices.
        times = torch.empty_like(probability).exponential_(generator=self.random)
        return (probability / times.clamp_(min=torch.finfo(times.dtype).tiny)).argmax(-1)


def write(ids, dictionary, out, begun=False, every=0, words=0):
    """Writes words to the file `out` as they come, a sentence a line.

    `begun`: the line has words already. `every`: how often progress is reported, of `words`.
    """
    for number_, idx in enumerate(ids, 1):
        word = dictionary.idx2word[idx]
        if word == EOS:
            out.write("\n")
        else:
            out.write(f" {word}" if begun else word)
        begun = word != EOS
        out.flush()
        if every and number_ % every == 0:
            warn(f"| Generated {number_}/{words} words")
    if begun:
        out.write("\n")
        out.flush()


def open_output(path):
    """A file for writing, standard output for "-". Raises InputError where there is one already."""
    if path == "-":
        return sys.stdout
    try:
        if Path(path).is_file() and Path(path).stat().st_size:
            raise InputError(f"--outf {path}: exists; remove it, or name another")
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--outf {path}: cannot be written ({error.strerror})") from None


def mass(text):
    """An argparse type: a probability above 0, and 1 too."""
    value = number(float, 0, open_low=True)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be a number of 1 or less, not {text}")
    return value


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="the trained model")
    add("--words", type=count, default=1000,
        help="words to write, ends of sentences included (default: 1000)")
    add("--prompt", default="", help="what the text begins with")
    add("--temperature", type=number(float, 1e-3), default=1.0,
        help="below 1 likely words become likelier (default: 1)")
    add("--top-k", type=number(int, 0), default=0, metavar="K",
        help="draw from the K likeliest words only (default: 0, from all)")
    add("--top-p", type=mass, default=1.0, metavar="P",
        help="draw from the fewest words that have the probability P (default: 1, from all)")
    add("--no-unk", action="store_true", help=f"never write {UNK}")
    add("--seed", type=number(int, 0, 2**32), default=1111, help="random seed (default: 1111)")
    add("--outf", default="-", metavar="FILE", help="file to write (default: -, standard output)")
    add("--log-interval", type=count, default=100, metavar="N",
        help="words between reports when writing to a file (default: 100)")
    add("--interactive", action="store_true",
        help="ask for prompts, and go on with each to the sentence's end")
    add("--data", help="accepted as in the reference; the checkpoint holds the vocabulary")
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.interactive and (args.prompt or args.outf != "-"):
        parser.error(
            "--interactive: asks for the prompt, writes to the terminal; leave out --prompt, --outf"
        )
    return args


def converse(generator, dictionary, args):
    """Asks for a prompt, goes on with it to the end of the sentence; until the end of input."""
    if sys.stdin is None:
        raise InputError("--interactive: standard input is closed; open it")
    with suppress(ImportError):
        import readline  # noqa: F401 - arrow keys in input()
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        words, unknown = encode(prompt.split(), dictionary, args.checkpoint)
        warn_of_unknown(unknown)
        print(" ".join(dictionary.idx2word[word] for word in words), end="", flush=True)
        ids = generator.text([begin_of_text(dictionary), *words])
        write(sentence(ids, dictionary, args.words), dictionary, sys.stdout, begun=bool(words))


def sentence(ids, dictionary, most):
    """The ids up to the end of a sentence, `most` at most."""
    for _, idx in zip(range(most), ids):
        yield idx
        if dictionary.idx2word[idx] == EOS:
            return


def main(argv=None):
    args = parse_args(argv)
    params, dictionary = trained(args.checkpoint, args)
    prompt, unknown = encode(args.prompt.split(), dictionary, args.checkpoint)
    warn_of_unknown(unknown)
    banned = [dictionary.word2idx[UNK]] if args.no_unk and UNK in dictionary.word2idx else []
    generator = Generator(
        params, args.seed, args.temperature, args.top_k, args.top_p, banned
    )
    if args.interactive:
        converse(generator, dictionary, args)
        return 0
    out = open_output(args.outf)
    every = 0 if out is sys.stdout else args.log_interval
    out.write(" ".join(dictionary.idx2word[word] for word in prompt))
    ids = generator.text([begin_of_text(dictionary), *prompt])
    drawn = (idx for _, idx in zip(range(args.words), ids))
    write(drawn, dictionary, out, bool(prompt), every, args.words)
    if out is not sys.stdout:
        out.close()
    return 0


if __name__ == "__main__":
    run(main)
