"""The continuous cache against a restatement word by word, its search, and the command."""

import math
import re
from itertools import product

import pytest
import torch

import main
import pointer
from conftest import invoke, make_params
from data import Corpus
from dynamic_evaluation import Rule, read, root_mean_square
from pointer import evaluate_cache, tune_cache
from train import evaluate
from checkpoint import build_params, read_checkpoint

V = 12


def make_varied_params(**kwargs):
    """A model in float64 whose states differ, so that theta matters."""
    params = make_params(ntoken=V, dtype=torch.float64, **kwargs)
    params[0].encoder.weight.data.mul_(20)
    return params.eval()


def loss_word_by_word(params, ids, theta, lambdasm, window):
    """The mean -log p of the words but the first, from their whole distributions."""
    model, criterion = params
    with torch.no_grad():
        states, _ = model(ids[:-1].unsqueeze(1), model.init_hidden(1))
        ps = criterion.logprob(model.decoder.weight, model.decoder.bias, states).exp()
    total = 0.0
    for t, p in enumerate(ps):
        if t:
            pairs = slice(max(0, t - window), t)
            weights = (theta * states[pairs] @ states[t]).softmax(0)
            p_cache = torch.zeros_like(p).index_add(0, ids[1:][pairs], weights)
            p = (1 - lambdasm) * p + lambdasm * p_cache
        assert p.sum().item() == pytest.approx(1)
        total -= p[ids[t + 1]].log().item()
    return total / len(ps)


@pytest.mark.parametrize(
    "model",
    [
        {}, {"rnn_type": "GRU"}, {"rnn_type": "QRNN"}, {"rnn_type": "biLM"},
        {"attention": "combined"}, {"splits": [4, 8]},
    ],
)
@pytest.mark.parametrize(
    ("window", "bptt", "theta"), [(1, 4, 3.0), (5, 1000, 0.0), (30, 4, 3.0), (200, 1000, 3.0)]
)
def test_the_cache_matches_the_paper(window, bptt, theta, model, monkeypatch):
    """With attention, the states that it has joined are cached."""
    monkeypatch.setattr(pointer, "CHUNK", 7)
    params, ids = make_varied_params(**model), torch.randint(V, (60,))
    with_cache, without = evaluate_cache(read(params, ids, bptt), theta, 0.4, window)
    assert with_cache == pytest.approx(loss_word_by_word(params, ids, theta, 0.4, window), rel=1e-9)
    assert without == pytest.approx(evaluate(params, ids, 1, 70), rel=1e-9)
    assert with_cache != pytest.approx(without, rel=1e-3)
    assert evaluate_cache(read(params, ids, bptt), theta, 0.0, window) == (without, without)


def test_the_search_finds_the_best_of_what_it_tries():
    params, ids = make_varied_params(), torch.randint(V, (30,)).repeat(2)  # so that a cache helps
    pieces, thetas, windows = list(read(params, ids, 1000)), (0.5, 2.0), (5, 40)
    loss, *best = tune_cache(pieces, thetas, windows)
    theta, lambdasm, window = best
    assert loss == pytest.approx(evaluate_cache(pieces, theta, lambdasm, window)[0], rel=1e-9)
    for theta, lambdasm, window in product(thetas, (0.0, 0.05, 0.2, 0.5), windows):
        assert loss <= evaluate_cache(pieces, theta, lambdasm, window)[0] + 1e-9


@pytest.fixture
def run(trained, corpus_dir):
    """Runs pointer.py on the trained model; returns (status, stdout, stderr)."""
    return lambda *flags: invoke(
        lambda: pointer.main(["--data", str(corpus_dir), "--save", str(trained), *flags])
    )


def ppls(out, name):
    """The perplexities, [valid, test], of lines, which have more digits than the losses."""
    return [float(ppl) for ppl in re.findall(rf"\| {name} \|.* (?:valid|test) ppl +(\S+)", out)]


def test_the_published_command(run, trained, corpus_dir):
    before = {path: path.stat().st_mtime_ns for path in trained.parent.rglob("*")}
    flags = "--lambdasm 0.1279 --theta 0.662 --window 3785 --bptt 2000 --model LSTM"
    status, out, err = run(*flags.split())
    assert (status, err) == (0, "")
    pieces = read(build_params(read_checkpoint(trained)), Corpus(corpus_dir).test, 70)
    losses = evaluate_cache(pieces, 0.662, 0.1279, 3785)
    found = [ppls(out, name)[-1] for name in ("with cache", "model alone")]
    assert found == pytest.approx([math.exp(loss) for loss in losses], abs=0.006)
    assert ppls(out, "End of training") == found[:1]
    assert before == {path: path.stat().st_mtime_ns for path in trained.parent.rglob("*")}


def test_other_text_is_read_with_the_models_words(trained_with_unk, corpus_dir, run):
    status, out, err = run("--save", str(trained_with_unk), "--dynamic", "sgd", "--lr", "0.1")
    assert (status, err) == (0, "")
    checkpoint = read_checkpoint(trained_with_unk)
    words = checkpoint["vocabulary"]
    text = (corpus_dir / "test.txt").read_text().replace("\n", " <eos> ").split()
    ids = torch.tensor([words.index(word if word in words else "<unk>") for word in text])
    loss = evaluate(build_params(checkpoint), ids, 1, 70)
    assert ppls(out, "model alone")[1] == pytest.approx(math.exp(loss), abs=0.006)
    assert re.match(f"Text read with the vocabulary of {trained_with_unk}, 8 words: .* as <unk>: ",
                    out)


@pytest.mark.parametrize(("rule", "lr"), [("rms", "0.001"), ("sgd", "1")])
def test_dynamic_evaluation_with_the_cache(rule, lr, run):
    status, out, err = run("--dynamic", rule, "--lr", lr)
    assert (status, err) == (0, "")
    alone, dynamic, both = (ppls(out, n) for n in ("model alone", "dynamic", "dynamic and cache"))
    assert alone != dynamic != both
    status, _, err = run("--dynamic", rule, "--lr", "1e10", "--split", "test")
    assert status == 2 and "--lr 1e+10: the adapting weights diverged" in err
    _, out, _ = run("--dynamic", rule, "--lr", "0", "--decay", "0", "--lambdasm", "0")
    assert ppls(out, "dynamic") == ppls(out, "model alone") == alone
    assert "cache" not in out


def test_the_flags_of_dynamic_evaluation_reach_its_rule(run, trained, corpus_dir):
    given = "--lr 0.01 --decay 0.05 --epsilon 0.005 --statistics 1 --segment 7 --split valid"
    status, out, err = run("--dynamic", *given.split(), "--lambdasm", "0")
    assert (status, err) == (0, "")
    params, corpus = build_params(read_checkpoint(trained)), Corpus(corpus_dir)
    rule = Rule(params, 0.01, 0.05, 0.005, root_mean_square(params, corpus.train, 1))
    loss = pointer.mean_loss(read(params, corpus.valid, 7, rule))
    assert ppls(out, "dynamic") == pytest.approx([math.exp(loss)], abs=0.006)


def test_dynamic_evaluation_is_tuned_first(run):
    status, out, err = run(
        "--dynamic", "sgd", "--tune", "--tune-words", "60", "--split", "valid", "--segment", "10"
    )
    assert (status, err) == (0, "")
    tried = re.findall(r"\| lr +(\S+) \| decay +(\S+) \|.* valid ppl +(\S+)", out)
    rates = {"0.006", "0.01", "0.02", "0.06", "0.2"}  # the default, and twice those of 5 words
    assert {lr for lr, _, _ in tried} == rates
    assert len(tried) == len(rates) * 4
    found = re.search("Best on 60 words of valid: --lr (.*) --decay (.*)", out).groups()
    ppl = {row[:2]: float(row[2]) for row in tried}
    assert ppl[found] == min(ppl.values())
    assert "Best on valid: --theta" in out
    assert ppls(out, "dynamic and cache") <= ppls(out, "dynamic")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_reading_that_is_cut_short_reports_what_was_read(dynamic, run, trained, corpus_dir):
    """After so little time it is one window, or one segment; the weights are restored."""
    flags = ["--dynamic", "sgd", "--segment", "15", "--tune", "--tune-words", "30"] * dynamic
    status, out, err = run(*flags, "--bptt", "20", "--split", "test", "--seconds", "1e-9")
    assert (status, err) == (0, "")
    ids, words = Corpus(corpus_dir).test, 15 if dynamic else 20
    assert out.count(f" | {words} of {len(ids) - 1:,} tokens") == 3 + dynamic
    alone = math.exp(evaluate(build_params(read_checkpoint(trained)), ids[: words + 1], 1, 70))
    assert ppls(out, "model alone") == pytest.approx([alone], abs=0.006)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--save", "absent.pt"], "absent.pt"),
        (["--data", "absent"], "absent/train.txt"),
        (["--data", "sample"], "sample (documentation of Python"),  # the model has no <unk>
        (["--lambdasm", "1.5"], "--lambdasm"),
        (["--decay", "0.1"], "--decay: has no effect without --dynamic"),
        (["--dynamic", "sgd", "--epsilon", "3"], "--epsilon: has no effect without --dynamic rms"),
        (["--tune-words", "9"], "--tune-words"),
        (["--dynamic", "--tune-words", "9"], "--tune-words: has no effect without --tune"),
        (["--tune", "--lambdasm", "0"], "--tune: has no effect with --lambdasm 0"),
        (["--cuda", "--device", "cpu"], "--cuda"),
    ],
)
def test_bad_input_is_one_line(flags, named, run):
    status, out, err = run(*flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert named in err


def test_the_text_of_training_is_the_default(trained, corpus_dir):
    def run(*flags):
        status, out, err = invoke(lambda: pointer.main(["--save", str(trained), *flags]))
        assert (status, err) == (0, "")
        return out

    assert run() == run("--data", str(corpus_dir))
    (corpus_dir / "valid.txt").write_text("ann sees the cat\n")
    out = run()
    assert f"Note: {corpus_dir} is not the text that {trained} was trained on" in out


def test_a_model_that_reads_its_answer_is_refused(corpus_dir, small, tmp_path, run):
    path = tmp_path / "bi.pt"
    flags = [*small, "--data", corpus_dir, "--model", "biLSTM", "--epochs", 1, "--save", path]
    assert invoke(main.main, *flags)[0] == 0
    status, _, err = run("--save", str(path))
    assert status == 2
    assert "biLSTM" in err
