"""A trained model as a distribution over texts: scores, next words, generated text."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import islice, repeat
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from cpu_kernels import Cell
from data import EOS, InputError, encode
from model import NOTES, WINDOW
from utils import float32_products, map_hidden

MAX_TEXTS = 256  # texts read in parallel by score_each, to bound memory


class Score(NamedTuple):
    """The score of a text. Log-probabilities are natural logarithms."""

    log_prob: float  # of the whole text
    tokens: list  # (token, its log-probability given all before it), in order
    unknown: Counter  # the tokens outside the vocabulary, read as its `unk`


@dataclass
class Context:
    """A position in B texts. Methods that take one continue from it and advance it.

    `copy.copy` keeps the old position.

    last [B]: the ids of the last tokens; hidden: the model's state before it reads them.
    """

    last: torch.Tensor
    hidden: list


class LanguageModel:
    """A trained model as a distribution over texts; `model, vocabulary = lm` unpacks it.

    A text is a list of tokens, or a string, in which a line break is an <eos> and the other tokens
    are separated by white space, or for a model of characters are single characters. It begins
    after an <eos>, as in training, or continues a `context`, which moves to its end. Unknown tokens
    are read as `vocabulary.unk`; if that is None, they raise InputError. So does every use of
    biLSTM, which sees the word that it predicts. biLM reads forwards.

    params: nn.ModuleList([model, criterion]); vocabulary: data.Dictionary.
    """

    def __init__(self, params, vocabulary):
        self.params, self.vocabulary = params.eval(), vocabulary

    def __iter__(self):
        return iter((self.params[0], self.vocabulary))

    # -------------------------------------------------------- queries

    def log_probs(self, words, context=None):
        """The log-probability of every word of the vocabulary after each of `words`: [T, V].

        `words` is a text, its ids [T] or, for several at once, ids [T, B]; these give [T, B, V].
        """
        is_ids = isinstance(words, torch.Tensor)
        words = words.to(self.params[0].encoder.weight.device) if is_ids else self.ids(words)
        ids = words if words.dim() == 2 else words.unsqueeze(1)
        context = context or self.context(ids.size(1))
        before = self._read_on(ids, context)
        # One step later: without the outputs before the first word, with those after the last.
        output = torch.cat([before, self._output(context)])[ids.size(1) :]
        return self._log_probs(output).view(*words.shape, len(self.vocabulary))

    def score(self, text, context=None, columns=1):
        """The Score of a text.

        `columns`: parts of the text that are read in parallel. More are faster, but all parts
        except the first begin without context. Has no effect with a `context`.
        """
        tokens = self.split(text)
        ids = self.ids(tokens)
        if context:
            parts = [ids]
        else:
            parts = ids.tensor_split(max(1, min(columns, len(ids))))
            context = self.context(len(parts))
            context.last[1:] = torch.tensor([part[-1] for part in parts[:-1]])
        log_probs = self._score_parts(parts, context)
        return self._make_score(tokens, [p for part in log_probs for p in part])

    def score_each(self, texts):
        """A list with the Score of each of `texts`, which are read in parallel."""
        texts = [self.split(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        log_probs = {}
        for start in range(0, len(order), MAX_TEXTS):
            batch = order[start : start + MAX_TEXTS]
            parts = [self.ids(texts[i]) for i in batch]
            log_probs |= zip(batch, self._score_parts(parts, self.context(len(batch))))
        return [self._make_score(text, log_probs[i]) for i, text in enumerate(texts)]

    def next_words(self, text="", k=10, context=None):
        """The `k` likeliest words after a text: [(word, probability), ...], likeliest first."""
        context = context or self.context()
        self._read_on(self.ids(text).unsqueeze(1), context)
        log_probs = self._log_probs(self._output(context))[0]
        top, ids = log_probs.exp().topk(min(k, len(log_probs)))
        return [(self.vocabulary.idx2word[i], p) for i, p in zip(ids.tolist(), top.tolist())]

    def generate(
        self, text="", words=None, seed=None, temperature=1.0, top_k=0, top_p=1.0, no_unk=False,
        context=None,
    ):
        """Yields `words` tokens, or an endless stream, that continue a text.

        See `draw`; with `no_unk` the vocabulary's `unk` is never drawn. Without a `seed`, torch's
        own generator is used.
        """
        model, _ = self.params
        device = model.encoder.weight.device
        random = None if seed is None else torch.Generator(device).manual_seed(seed)
        if not (temperature > 0 and top_k >= 0 and top_p > 0):
            raise InputError("temperature and top_p must be above 0, top_k 0 or more")
        word2idx, unk = self.vocabulary.word2idx, self.vocabulary.unk
        banned = [word2idx[unk]] if no_unk and unk in word2idx else []
        context = context or self.context()
        self._read_on(self.ids(text).unsqueeze(1), context)
        layers = model.rnns
        # nn.LSTM on a CPU would pack its weights for every word.
        if device.type == "cpu" and isinstance(layers[0].module, nn.LSTM | nn.GRU):
            layers = [Cell(rnn.module) for rnn in layers]
        for _ in islice(repeat(None), words):
            output, context.hidden = self._read(context.last.unsqueeze(0), context.hidden, layers)
            log_prob = self._log_probs(output)
            context.last = draw(log_prob, temperature, top_k, top_p, banned, random)
            yield self.vocabulary.idx2word[context.last.item()]

    def embed(self, text, layer=-1):
        """The vectors of a text's tokens: [T, H].

        layer 0 is the embedding; layers 1, 2, ... are the states of the recurrent layers after each
        token, given all before it (-1: the last).
        """
        model, _ = self.params.eval()
        context, vectors = self.context(), []
        stream = torch.cat([context.last, self.ids(text)]).unsqueeze(1)
        with torch.no_grad(), float32_products():
            for window in stream.split(WINDOW):
                _, context.hidden, states, _ = model(window, context.hidden, return_h=True)
                vectors.append([model.encoder(window), *states][layer])
        return torch.cat(vectors)[1:, 0]

    # -------------------------------------------------------- reading

    def context(self, batch=1):
        """The beginning of `batch` texts, where only an <eos> has been read."""
        model, _ = self.params
        if model.rnn_type == "biLSTM":
            raise InputError(f"{NOTES['biLSTM']}; use another model")
        return Context(self.ids([EOS] * batch), model.init_hidden(batch))

    def split(self, text):
        """The list of a text's tokens."""
        if not isinstance(text, str):
            return list(text)
        first, *lines = [self.vocabulary.split(line) for line in text.split("\n")]
        return [*first, *(token for line in lines for token in (EOS, *line))]

    def ids(self, text):
        """The ids of a text's tokens, [T], on the model's device."""
        ids, _ = encode(self.split(text), self.vocabulary)
        return torch.tensor(ids, dtype=torch.long, device=self.params[0].encoder.weight.device)

    @torch.no_grad()
    @float32_products()
    def _read(self, ids, hidden, layers=None):
        """ids [T, B], hidden -> (the decoder's inputs after each of them [T*B, E], hidden)."""
        model, _ = self.params.eval()
        return model.read(layers or model.rnns, ids, hidden)

    def _check_context(self, context, batch):
        if len(context.last) != batch:
            raise InputError(f"the context is of {len(context.last)} texts, not of {batch}")

    def _output(self, context):
        """The decoder's inputs [B, E] at `context`."""
        return self._read(context.last.unsqueeze(0), context.hidden)[0]

    def _read_on(self, ids, context):
        """Moves `context` past `ids` [T, B]; returns the decoder's inputs before each, [T*B, E]."""
        self._check_context(context, ids.size(1))
        stream, outputs = torch.cat([context.last.unsqueeze(0), ids]), []
        for window in stream[:-1].split(WINDOW) if len(ids) else []:
            output, context.hidden = self._read(window, context.hidden)
            outputs.append(output)
        context.last = stream[-1]
        return torch.cat(outputs) if outputs else self.params[0].decoder.weight[:0]

    @torch.no_grad()
    @float32_products()
    def _log_probs(self, output, targets=None):
        """Log-probabilities at `output` [N, E]: of all words [N, V], or of `targets` [N] only."""
        model, criterion = self.params
        weights = model.decoder.weight, model.decoder.bias
        if targets is None:
            return criterion.logprob(*weights, output)
        return criterion.target_logprob(*weights, output, targets)

    def _score_parts(self, parts, context):
        """For each of `parts`, vectors of ids, the list of their log-probabilities.

        Part i continues column i of `context`. Parts must not be longer than those before them:
        columns that have ended are read no further.
        """
        self._check_context(context, len(parts))
        found, ids, start = [[] for _ in parts], pad_sequence(parts), 0
        while start < len(ids):
            rest = sum(len(part) > start for part in parts)
            context.last = context.last[:rest]
            context.hidden = map_hidden(
                lambda h, rest=rest: h[:, :rest].contiguous(), context.hidden
            )
            window = ids[start : start + max(1, WINDOW // rest), :rest]
            log_probs = self._log_probs(self._read_on(window, context), window.flatten())
            for column, part in zip(log_probs.view_as(window).t().tolist(), found):
                part += column
            start += len(window)
        return [log_probs[: len(part)] for log_probs, part in zip(found, parts)]

    def _make_score(self, tokens, log_probs):
        unknown = Counter(token for token in tokens if token not in self.vocabulary.word2idx)
        return Score(math.fsum(log_probs), list(zip(tokens, log_probs)), unknown)


def draw(log_prob, temperature=1.0, top_k=0, top_p=1.0, banned=(), generator=None):
    """Draws an id for each row: log-probabilities [.., V] -> [..].

    They are divided by `temperature`, then truncated, see `truncate`; the ids in `banned` are never
    drawn. Computes in float64 if the device supports that.
    """
    logits = log_prob.to(torch.float32 if log_prob.is_mps else torch.float64, copy=True)
    logits[..., banned] = -torch.inf
    probability = (logits / temperature).softmax(-1)
    if top_k or top_p < 1:
        probability = truncate(probability, top_k, top_p)
    # time / p is exponential with rate p, so p / time is largest for word w with probability p(w).
    # torch.multinomial has drawn words of probability 0 on some devices.
    times = torch.empty_like(probability).exponential_(generator=generator)
    return (probability / times.clamp_(min=torch.finfo(times.dtype).tiny)).argmax(-1)


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
