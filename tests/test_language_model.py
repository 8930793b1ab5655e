"""LanguageModel: what a trained model says of texts, against one pass of the model in float64."""

import copy
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from conftest import make_params
from data import EOS, Dictionary, InputError
from language_model import LanguageModel, draw, truncate

WORDS = [EOS, "<unk>", *map(str, range(2, 50))]
KINDS = [
    ("LSTM", "none"), ("GRU", "none"), ("QRNN", "none"), ("biLM", "none"), ("LSTM", "single"),
    ("GRU", "combined"),
]
TEXT = "3 7 3\n9 12 49\n"


def make_lm(rnn_type="LSTM", attention="none", splits=(), dtype=torch.float64):
    """A small model with random weights, sharp enough that its likeliest word changes."""
    params = make_params(rnn_type, attention=attention, splits=splits, dtype=dtype)
    if params[0].attention is not None:
        params[0].attention.join.reset_parameters()  # the identity would saturate
    for weight in params.parameters():
        weight.data.mul_(8)
    return LanguageModel(params, Dictionary(WORDS))


@torch.no_grad()
def expected_log_probs(lm, text):
    """The next word's log-probabilities after an <eos> and after each word of a text: [T + 1, V].

    From one forward pass, and with a split softmax from its definition.
    """
    model, criterion = lm.params
    ids = torch.tensor([0, *(WORDS.index(w) for w in text.replace("\n", " <eos> ").split())])
    output, _ = model(ids.unsqueeze(1), model.init_hidden(1))
    logits = F.linear(output, model.decoder.weight, model.decoder.bias)
    if not criterion.splits:
        return logits.log_softmax(1)
    tombstones = F.linear(output, criterion.tail_vectors, criterion.tail_bias)
    first, second = criterion.splits
    head = torch.cat([logits[:, :first], tombstones], 1).softmax(1)
    tails = logits[:, first:second].softmax(1), logits[:, second:].softmax(1)
    parts = [head[:, first + i, None] * tail for i, tail in enumerate(tails)]
    return torch.cat([head[:, :first], *parts], 1).log()


@pytest.mark.parametrize("splits", [[], [10, 30]])
@pytest.mark.parametrize(("rnn_type", "attention"), KINDS)
def test_every_answer_agrees_with_one_pass_of_the_model(rnn_type, attention, splits):
    lm = make_lm(rnn_type, attention, splits)
    expected = expected_log_probs(lm, TEXT)
    torch.testing.assert_close(lm.log_probs(TEXT), expected[1:])

    tokens = lm.split(TEXT)
    assert tokens == ["3", "7", "3", EOS, "9", "12", "49", EOS]
    of_tokens = [expected[i, WORDS.index(token)].item() for i, token in enumerate(tokens)]
    score = lm.score(TEXT)
    assert score.log_prob == pytest.approx(sum(of_tokens))
    assert [token for token, _ in score.tokens] == tokens
    assert [log_prob for _, log_prob in score.tokens] == pytest.approx(of_tokens)

    likeliest = expected[-1].exp().topk(3)
    found = lm.next_words(TEXT, 3)
    assert [word for word, _ in found] == [WORDS[i] for i in likeliest.indices]
    assert [p for _, p in found] == pytest.approx(likeliest.values.tolist())

    generated = list(lm.generate("3 7", 30, top_k=1))
    assert len(set(generated)) > 1
    after = expected_log_probs(lm, " ".join(["3", "7", *generated]))
    assert generated == [WORDS[i] for i in after.argmax(1)[2:-1]]


@pytest.mark.parametrize(("rnn_type", "attention"), KINDS)
def test_a_context_continues_a_text(rnn_type, attention):
    lm = make_lm(rnn_type, attention)
    context = lm.context()
    parts = [lm.score(part, context) for part in ("3", "", "7 3\n", "9 12 49\n")]
    whole = lm.score(TEXT)
    assert sum(part.log_prob for part in parts) == pytest.approx(whole.log_prob)
    assert [t for part in parts for t, _ in part.tokens] == [t for t, _ in whole.tokens]

    place = copy.copy(context)
    after = lm.next_words(k=4, context=context)
    assert dict(after) == pytest.approx(dict(lm.next_words(TEXT, 4)))
    torch.testing.assert_close(lm.log_probs("5 6", context)[-1], lm.log_probs(TEXT + "5 6")[-1])
    continued = list(lm.generate("", 5, seed=1, context=place))
    assert continued == list(lm.generate(TEXT, 5, seed=1))
    # `place` has moved past what was generated, and no further.
    torch.testing.assert_close(
        lm.log_probs("8", place), lm.log_probs(f"{TEXT}{' '.join(continued)} 8")[-1:]
    )


@pytest.mark.parametrize(("at_once", "window"), [(2, 2000), (256, 6)])
def test_texts_are_read_in_parallel(at_once, window, monkeypatch):
    lm = make_lm()
    texts = ["3 7", "", "9 12 49 3 7\n", "5"]
    expected = [lm.score(text) for text in texts]
    monkeypatch.setattr("language_model.MAX_TEXTS", at_once)
    monkeypatch.setattr("language_model.WINDOW", window)
    for score, alone in zip(lm.score_each(texts), expected, strict=True):
        assert score.log_prob == pytest.approx(alone.log_prob)
        assert [token for token, _ in score.tokens] == [token for token, _ in alone.tokens]
    torch.testing.assert_close(lm.log_probs(lm.ids("3 7")), lm.log_probs("3 7"))
    ids = torch.randint(50, (6, 3))
    for column, found in zip(ids.t(), lm.log_probs(ids).unbind(1), strict=True):
        torch.testing.assert_close(found, lm.log_probs([WORDS[i] for i in column]))


def test_columns_after_the_first_begin_without_context():
    lm = make_lm()
    words = [WORDS[i] for i in torch.randint(50, (11,))]
    expected = []
    for start, end in ((0, 4), (4, 8), (8, 11)):  # the first columns are the longer ones
        before = words[start - 1] if start else EOS
        expected += expected_log_probs_from(lm, [before, *words[start:end]])
    found = [log_prob for _, log_prob in lm.score(words, columns=3).tokens]
    assert found == pytest.approx(expected)
    assert len(lm.score(words, columns=99).tokens) == 11


@torch.no_grad()
def expected_log_probs_from(lm, words):
    """The log-probabilities of all words but the first, which is read from a zero state."""
    model, _ = lm
    ids = torch.tensor([WORDS.index(word) for word in words])
    output, _ = model(ids[:-1].unsqueeze(1), model.init_hidden(1))
    return model.decoder(output).log_softmax(1).gather(1, ids[1:, None]).squeeze(1).tolist()


def test_a_long_text_is_read_in_windows(monkeypatch):
    lm = make_lm()
    words = [WORDS[i] for i in torch.randint(50, (40,))]
    whole, log_probs, states = lm.score(words), lm.log_probs(words), lm.embed(words)
    columns = lm.score(words, columns=9).log_prob
    monkeypatch.setattr("language_model.WINDOW", 7)
    assert lm.score(words).log_prob == pytest.approx(whole.log_prob)
    torch.testing.assert_close(lm.log_probs(words), log_probs)
    torch.testing.assert_close(lm.embed(words), states)
    assert lm.score(words, columns=9).log_prob == pytest.approx(columns)


@pytest.mark.parametrize(("rnn_type", "attention"), KINDS)
def test_embed_gives_the_states_of_each_layer(rnn_type, attention):
    lm = make_lm(rnn_type, attention)
    model, _ = lm
    ids = torch.tensor([[0], [3], [7]])
    with torch.no_grad():
        _, _, states, _ = model(ids, model.init_hidden(1), return_h=True)
    torch.testing.assert_close(lm.embed("3 7", 0), model.encoder.weight[[3, 7]].detach())
    for layer, expected in enumerate(states, 1):
        torch.testing.assert_close(lm.embed("3 7", layer), expected[1:, 0])
    torch.testing.assert_close(lm.embed("3 7"), states[-1][1:, 0])


def test_unknown_words_are_read_as_the_unknown_token_and_counted():
    lm = make_lm()
    score = lm.score("3 zebra 7 zebra yak")
    assert score.unknown == {"zebra": 2, "yak": 1}
    assert score.log_prob == pytest.approx(lm.score("3 <unk> 7 <unk> <unk>").log_prob)
    assert score.tokens[1][0] == "zebra"
    assert "<unk>" in list(lm.generate(words=400, seed=1, temperature=9))
    assert "<unk>" not in list(lm.generate(words=400, seed=1, temperature=9, no_unk=True))
    lm.vocabulary.unk = "7"
    assert lm.score("3 zebra").log_prob == lm.score("3 7").log_prob
    lm.vocabulary.unk = None
    with pytest.raises(InputError, match="'zebra'"):
        lm.score("3 zebra")


def test_empty_and_short_texts():
    lm = make_lm()
    assert lm.score_each([]) == []
    assert lm.score("") == (0.0, [], {})
    assert lm.log_probs("").shape == (0, len(WORDS))
    assert lm.score(word for word in ["3", "7"]) == lm.score("3 7")
    assert len(lm.next_words("3", 1000)) == len(WORDS)
    lm.vocabulary.unk = None
    assert len(list(lm.generate("3", 5, no_unk=True))) == 5


def test_bad_settings_and_contexts_are_refused():
    lm = make_lm()
    for settings in ({"temperature": 0}, {"top_p": 0}, {"top_k": -1}):
        with pytest.raises(InputError, match=next(iter(settings))):
            list(lm.generate("3", 5, **settings))
    for query in (lm.score, lm.next_words, lm.log_probs):
        with pytest.raises(InputError, match="the context is of 2 texts, not of 1"):
            query("3 7", context=lm.context(2))
    lm.vocabulary.unk = "absent"
    with pytest.raises(InputError, match="zebra"):
        lm.score("zebra")


def test_answers_are_those_of_evaluation_whatever_the_mode():
    lm = make_lm()
    model, _ = lm
    expected = lm.score(TEXT).log_prob
    model.dropout = model.dropouti = 0.5
    model.train()
    assert lm.score(TEXT).log_prob == expected


def test_bilstm_is_refused_at_every_use():
    lm = make_lm("biLSTM")
    uses = [
        lm.context, lambda: lm.log_probs("3"), lambda: lm.score("3"), lambda: lm.score_each(["3"]),
        lambda: lm.next_words("3"), lambda: list(lm.generate("3", 1)), lambda: lm.embed("3"),
    ]
    for use in uses:
        with pytest.raises(InputError, match="biLSTM"):
            use()


# ------------------------------------------------------------ drawing


@pytest.mark.parametrize(
    ("temperature", "truncation"),
    [(0.5, {}), (1.0, {"top_k": 40}), (2.0, {"top_p": 0.9})],
)
def test_words_are_drawn_with_their_probability_and_never_with_none(temperature, truncation):
    log_prob = torch.randn(50).log_softmax(0)
    expected = log_prob.double().exp() ** (1 / temperature)
    expected[[3, 5]] = 0
    expected = truncate(expected / expected.sum(), **truncation)
    rows = log_prob.expand(100_000, 50)
    draws = [draw(rows, temperature, banned=[3, 5], **truncation) for _ in range(5)]
    found = torch.cat(draws).bincount(minlength=50) / 5e5
    assert found[expected == 0].sum() == 0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4e-3)


def test_a_seed_gives_the_same_text():
    lm = make_lm(dtype=torch.float32)
    first = list(islice(lm.generate(seed=1), 50))
    assert list(islice(lm.generate(seed=1), 50)) == first
    assert list(islice(lm.generate(seed=2), 50)) != first
    assert list(islice(lm.generate(), 50)) != list(islice(lm.generate(), 50))


def test_a_split_softmax_draws_from_its_tails():
    lm = LanguageModel(make_params(splits=[10, 30]), Dictionary(WORDS))
    lm.params[1].tail_bias.data += 5
    assert any(WORDS.index(word) >= 30 for word in lm.generate(words=50))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.9}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # of what top_k leaves, 0.4 of 0.65 is more than 0.6
    ],
)
def test_truncation(settings, kept):
    probability = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=torch.float64)
    expected = torch.zeros_like(probability)
    expected[kept] = probability[kept] / probability[kept].sum()
    torch.testing.assert_close(truncate(probability, **settings), expected)
