"""Generates text with a trained model, word by word.

    python generate.py --checkpoint PTB.pt --words 100 --prompt "the company said"
    python generate.py --checkpoint PTB.pt --interactive

Needs only the checkpoint. The same seed gives the same text on the same machine. A prompt is UTF-8
in any locale.
"""

import math
import os
import sys
from contextlib import nullcontext
from itertools import chain, islice

import torch

from cpu_kernels import Cell
from data import EOS, UNK, encode, words_of_lines
from evaluate import load_for_use
from flags import Parser, add_device_flags, count, number, run_command
from utils import warn, warn_about_unknown, write_utf8


def truncate(probability, top_k=0, top_p=1.0):
    """Keeps the `top_k` likeliest words (0: all), then the nucleus of `top_p`.

    The nucleus is the smallest set of likeliest words with a total probability of at least `top_p`
    (Holtzman et al. 2019, 1904.09751). probability [.., V] -> [.., V], rescaled to a sum of 1.
    """
    ranked, words = probability.sort(descending=True)
    if top_k:
        ranked[..., top_k:] = 0
    ranked /= ranked.sum(-1, keepdim=True)
    before = ranked.cumsum(-1) - ranked  # the total probability of the likelier words
    ranked = ranked.masked_fill(before >= top_p, 0)  # always keeps the likeliest word
    kept = ranked / ranked.sum(-1, keepdim=True)
    return torch.zeros_like(probability).scatter_(-1, words, kept)


class Generator:
    """Draws words from a model; `text` yields an endless stream of ids.

    The next word's log-probabilities are divided by `temperature`, then truncated; the ids in
    `banned` are never drawn. Words are drawn on the model's device, in float64 if it supports that.
    """

    def __init__(self, params, seed, temperature=1.0, top_k=0, top_p=1.0, banned=()):
        self.params = params.eval()
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.banned = list(banned)
        device = params[0].encoder.weight.device
        self.random = torch.Generator(device).manual_seed(seed)

    @torch.inference_mode()
    def text(self, prompt):
        """Yields the ids that follow `prompt`, a list of at least one id."""
        model, criterion = self.params
        weight, bias = model.decoder.weight, model.decoder.bias
        layers = model.rnns
        # nn.LSTM on a CPU would pack its weights for every word.
        if weight.device.type == "cpu" and model.rnn_type in ("LSTM", "GRU"):
            layers = [Cell(rnn.module) for rnn in layers]
        hidden, words = model.init_hidden(1), torch.tensor(prompt, device=weight.device)
        while True:
            output, hidden = model.read(layers, words.unsqueeze(1), hidden)
            words = self.draw(criterion.logprob(weight, bias, output[-1:]))
            yield words.item()

    def draw(self, logprob):
        """Draws an id for each row: log-probabilities [.., V] -> [..]."""
        logits = logprob.to(torch.float32 if logprob.is_mps else torch.float64, copy=True)
        logits[..., self.banned] = -torch.inf
        probability = (logits / self.temperature).softmax(-1)
        if self.top_k or self.top_p < 1:
            probability = truncate(probability, self.top_k, self.top_p)
        # The word with the shortest exponential waiting time at rate p. torch.multinomial has drawn
        # words of probability 0 on some devices.
        times = torch.empty_like(probability).exponential_(generator=self.random)
        return (probability / times.clamp_(min=torch.finfo(times.dtype).tiny)).argmax(-1)


def write_text(prompt, generator, dictionary, out, args):
    """Writes `prompt` and `args.words` generated words to `out`, one sentence per line.

    With --interactive stops after the first sentence. Reports progress on stderr if `out` is a
    file.
    """
    ids, unknown = encode([EOS, *prompt], dictionary)
    warn_about_unknown(unknown, dictionary.unk)
    in_sentence = False
    text = chain(ids[1:], islice(generator.text(ids), args.words))
    for generated, idx in enumerate(text, 1 - len(prompt)):
        word = dictionary.idx2word[idx]
        out.write("\n" if word == EOS else " " * in_sentence + word)
        out.flush()
        in_sentence = word != EOS
        if generated > 0 and out is not sys.stdout and generated % args.log_interval == 0:
            warn(f"| Generated {generated}/{args.words} words")
        if generated > 0 and args.interactive and not in_sentence:
            break
    if in_sentence:
        print(file=out, flush=True)


def read_prompts():
    """Yields the lines of standard input, as bytes; shows a prompt if it is a terminal."""
    while True:
        print("> " if sys.stdin.isatty() else "", end="", flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        yield line


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="the trained model")
    add("--words", type=count, default=1000,
        help="words to write, including ends of sentences (default: 1000)")
    add("--prompt", default="", help="start of the text; a line break ends a sentence")
    add("--temperature", type=number(float, 1e-3), default=1.0,
        help="values below 1 make likely words likelier (default: 1)")
    add("--top-k", type=number(int, 0), default=0, metavar="K",
        help="draw only from the K likeliest words (default: 0, all words)")
    add("--top-p", type=number(float, 0, math.nextafter(1, 2), open_low=True), default=1.0,
        metavar="P",
        help="draw from the smallest set of likeliest words with a total probability of at least P "
             "(default: 1, all words)")
    add("--no-unk", action="store_true", help=f"never write {UNK}")
    add("--seed", type=number(int, 0, 2**32), default=1111, help="random seed (default: 1111)")
    add("--outf", default="-", metavar="FILE",
        help="file to write, which must not exist (default: -, standard output)")
    add("--log-interval", type=count, default=100, metavar="N",
        help="words between progress reports when writing to a file (default: 100)")
    add("--interactive", action="store_true",
        help="read prompts from standard input, and complete one sentence for each")
    add("--data", help="accepted for compatibility; the checkpoint holds the vocabulary")
    add_device_flags(parser)
    args = parser.parse_args(argv)
    if args.interactive and args.prompt:
        parser.error("--prompt: prompts come from standard input with --interactive; leave it out")
    return args


def main(argv=None):
    args = parse_args(argv)
    write_utf8()
    params, dictionary = load_for_use(args.checkpoint, args)
    banned = [dictionary.word2idx[UNK]] if args.no_unk and UNK in dictionary.word2idx else []
    generator = Generator(params, args.seed, args.temperature, args.top_k, args.top_p, banned)
    prompt = args.prompt.replace("\n", f" {EOS} ")  # one prompt, of several sentences
    lines = read_prompts() if args.interactive else [os.fsencode(prompt)]
    to_file = args.outf != "-"
    with open(args.outf, "x", encoding="utf-8") if to_file else nullcontext(sys.stdout) as out:
        for prompt in words_of_lines(lines, "prompt"):
            write_text(prompt, generator, dictionary, out, args)
    return 0


if __name__ == "__main__":
    run_command(main)
