"""The continuous cache against a restatement word by word, its search, and the command."""

import math
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pointer
from conftest import invoke, make_params
from data import Corpus
from pointer import (
    Cache, best_lambda, cache_distribution, cache_probability, cache_weights, evaluate_cache,
    in_chunks, log_mixture, read, tune_cache,
)
from train import evaluate
from checkpoint import build_params, read_checkpoint

V = 12


def restated(params, ids, theta, lambdasm, window):
    """-log p of each word but the first, one at a time."""
    model, _ = params
    with torch.no_grad():
        output, _ = model(ids[:-1].unsqueeze(1), model.init_hidden(1))
        losses = []
        for t, state in enumerate(output):
            p = model.decoder(state).softmax(0)
            first = max(0, t - window)
            if t > first:
                scores = torch.stack([theta * (state @ output[i]) for i in range(first, t)])
                cached = torch.zeros(V, dtype=p.dtype)
                for weight, word in zip(scores.softmax(0), ids[first + 1 : t + 1]):
                    cached[word] += weight
                p = (1 - lambdasm) * p + lambdasm * cached
            assert p.sum().item() == pytest.approx(1)
            losses.append(-p[ids[t + 1]].log().item())
    return losses


@pytest.fixture
def params():
    params = make_params(ntoken=V, dtype=torch.float64)
    params[0].encoder.weight.data.mul_(20)  # states that differ, so that theta matters
    return params.eval()


@pytest.mark.parametrize("window", [1, 5, 30, 200])
@pytest.mark.parametrize("bptt", [4, 1000])
def test_it_is_the_restatement(window, bptt, params, monkeypatch):
    monkeypatch.setattr(pointer.in_chunks, "__defaults__", (7,))  # words a chunk
    ids = torch.randint(V, (60,))
    expected = restated(params, ids, 3.0, 0.4, window)
    with_cache, without = evaluate_cache(read(params, ids, bptt), 3.0, 0.4, window)
    assert with_cache == pytest.approx(sum(expected) / 59, rel=1e-9)
    assert without == pytest.approx(evaluate(params, ids, 1, 70), rel=1e-9)
    assert with_cache != pytest.approx(without, rel=1e-3)


@pytest.mark.parametrize("model", ["GRU", "biLM"])
def test_other_models(model):
    params = make_params(model, ntoken=V, dtype=torch.float64).eval()
    ids = torch.randint(V, (40,))
    found, _ = evaluate_cache(read(params, ids, 9), 1.0, 0.3, 20)
    expected = restated(params, ids, 1.0, 0.3, 20)
    assert found == pytest.approx(sum(expected) / 39, rel=1e-9)


@pytest.mark.parametrize("attention", ["single", "combined"])
def test_with_attention_the_joined_states_are_cached(attention):
    params = make_params(ntoken=V, attention=attention, dtype=torch.float64).eval()
    ids = torch.randint(V, (40,))
    found, _ = evaluate_cache(read(params, ids, 40), 1.0, 0.3, 20)
    assert found == pytest.approx(sum(restated(params, ids, 1.0, 0.3, 20)) / 39, rel=1e-9)


def test_a_split_softmax():
    params = make_params(ntoken=V, splits=[4, 8], dtype=torch.float64).eval()
    params[1].tail_bias.data.normal_()
    ids = torch.randint(V, (40,))
    _, without = evaluate_cache(read(params, ids, 9), 1.0, 0.3, 20)
    assert without == pytest.approx(evaluate(params, ids, 1, 70), rel=1e-9)


def test_without_weight_the_cache_changes_nothing(params):
    ids = torch.randint(V, (40,))
    with_cache, without = evaluate_cache(read(params, ids, 9), 1.0, 0.0, 20)
    assert with_cache == without


def test_the_mixture_is_a_distribution(params):
    ids = torch.randint(V, (40,))
    cache, (states, words, _) = Cache(16), next(read(params, ids, 1000))
    products, cached = cache.attend(states, words)
    weights = cache_weights(products, cached, 2.0)
    p_cache = cache_distribution(weights, cached, V)
    torch.testing.assert_close(
        p_cache.gather(1, words[:, None])[:, 0], cache_probability(weights, cached, words)
    )
    model = params[0].decoder(states).log_softmax(1)
    logs = log_mixture(model, p_cache, 0.3, cached[:, -1:] >= 0)
    torch.testing.assert_close(logs.exp().sum(1), torch.ones(39, dtype=logs.dtype))
    assert torch.equal(logs[0], model[0])  # nothing has been read
    unlikely = log_mixture(torch.tensor([-500.0]), torch.zeros(1), 0.3, torch.tensor([True]))
    assert unlikely.item() == pytest.approx(-500 + math.log(0.7))
    nearly = log_mixture(torch.tensor([-5.0]), torch.zeros(1), 1 - 1e-12, torch.tensor([True]))
    assert nearly.item() == pytest.approx(-5 + math.log(1e-12), rel=1e-4)


def test_theta_0_counts_all_pairs_alike(params):
    ids = torch.randint(V, (30,))
    found, _ = evaluate_cache(read(params, ids, 9), 0.0, 0.5, 8)
    assert found == pytest.approx(sum(restated(params, ids, 0.0, 0.5, 8)) / 29, rel=1e-9)


def test_pieces_are_joined_and_cut_in_order():
    text = torch.arange(100)
    for sizes in ([1] * 100, [100], [30, 1, 69], [8, 92]):
        pieces = list(in_chunks(((part, part, part) for part in text.split(sizes)), 8))
        assert [len(words) for _, words, _ in pieces] == [8] * 12 + [4]
        assert torch.equal(torch.cat([words for _, words, _ in pieces]), text)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_does_not_grow_with_vocabulary_times_window():
    states, words = torch.randn(600, 8), torch.randint(30_000, (600,))
    with Largest() as largest:
        evaluate_cache([(states, words, torch.zeros(600))], 1.0, 0.1, 500)
    assert largest.elements <= pointer.CHUNK * (500 + pointer.CHUNK)


def test_everything_is_on_the_models_device():
    """On `meta` any tensor that is left on the CPU, and any wait for a value, is an error."""
    params = make_params(ntoken=V).to("meta").eval()
    for states, words, logprob in read(params, torch.randint(V, (30,)), 9):
        products, cached = Cache(16).attend(states, words)
        weights = cache_weights(products, cached, 2.0)
        p_cache = cache_probability(weights, cached, words)
        mixed = log_mixture(logprob, p_cache, 0.3, cached[:, -1] >= 0)
        assert mixed.is_meta
        assert cache_distribution(weights, cached, V).shape == (len(words), V)


def test_windows_longer_than_cudnn_takes_are_split(params, monkeypatch):
    monkeypatch.setattr(pointer, "LONGEST", 7)
    ids = torch.randint(V, (31,))
    pieces = list(read(params, ids, 1000))
    assert [len(words) for _, words, _ in pieces] == [7, 7, 7, 7, 2]
    loss = -torch.cat([logprob for _, _, logprob in pieces]).mean().item()
    assert loss == pytest.approx(evaluate(params, ids, 1, 70), rel=1e-9)


def test_the_best_lambda():
    p_model, p_cache = torch.rand(2, 500, dtype=torch.float64)
    grid = torch.linspace(0, 0.999, 1000, dtype=torch.float64)[:, None]
    losses = -((1 - grid) * p_model + grid * p_cache).log().mean(1)
    assert best_lambda(p_model, p_cache) == pytest.approx(grid[losses.argmin()].item(), abs=2e-3)
    assert best_lambda(p_model, p_model / 2) == 0
    assert best_lambda(p_model, p_model * 2) == pytest.approx(1)


def test_the_search_finds_the_best_of_what_it_tries(params):
    ids = torch.randint(V, (60,))
    ids[30:] = ids[:30]  # so that a cache helps
    thetas, windows = (0.5, 2.0), (5, 40)
    loss, theta, lambdasm, window = tune_cache(read(params, ids, 1000), thetas, windows)

    def evaluated(*settings):
        return evaluate_cache(read(params, ids, 1000), *settings)[0]

    assert loss == pytest.approx(evaluated(theta, lambdasm, window), rel=1e-9)
    tried = [
        evaluated(t, share, w) for t in thetas for w in windows for share in (0.0, 0.05, 0.2, 0.5)
    ]
    assert loss <= min(tried) + 1e-9


def ppl(out, name, split):
    """The perplexity of a line, which has more digits than the loss."""
    return float(re.search(rf"\| {name} \| {split} loss .* {split} ppl +(\S+)", out)[1])


def test_the_published_command(trained, corpus_dir, cli):
    before = trained.read_bytes()
    done = cli(
        "pointer.py", "--data", corpus_dir, "--save", trained, "--lambdasm", "0.1279", "--theta",
        "0.662", "--window", "3785", "--bptt", "2000", "--model", "LSTM",
    )
    assert (done.returncode, done.stderr) == (0, "")
    params, corpus = build_params(read_checkpoint(trained)), Corpus(corpus_dir)
    for split in ("valid", "test"):
        ids = getattr(corpus, split)
        losses = evaluate_cache(read(params, ids, 70), 0.662, 0.1279, len(ids))
        for name, loss in zip(("with cache", "model alone"), losses):
            assert ppl(done.stdout, name, split) == pytest.approx(math.exp(loss), abs=0.006)
        assert losses[0] != losses[1]
    end = re.search(r"\| End of training \| test loss +(\S+) \| test ppl +(\S+) \|", done.stdout)
    assert float(end[2]) == ppl(done.stdout, "with cache", "test")
    assert trained.read_bytes() == before
    assert list(cli.folder.iterdir()) == []


def test_tuned_it_is_no_worse_on_what_it_was_tuned_on(trained, corpus_dir):
    status, out, err = invoke(
        lambda: pointer.main(["--data", str(corpus_dir), "--save", str(trained), "--tune"])
    )
    assert (status, err) == (0, "")
    assert "Best on valid: --theta" in out
    assert ppl(out, "with cache", "valid") <= ppl(out, "model alone", "valid")


@pytest.mark.parametrize(("rule", "lr"), [("rms", "0.001"), ("sgd", "1")])
def test_dynamic_evaluation_with_the_cache(rule, lr, trained, corpus_dir):
    argv = ["--data", str(corpus_dir), "--save", str(trained), "--dynamic", rule]
    status, out, err = invoke(lambda: pointer.main([*argv, "--lr", lr]))
    assert (status, err) == (0, "")
    for split in ("valid", "test"):
        alone, dynamic, both = (
            ppl(out, name, split) for name in ("model alone", "dynamic", "dynamic and cache")
        )
        assert dynamic != alone
        assert both != dynamic

    status, out, _ = invoke(
        lambda: pointer.main([*argv, "--lr", "0", "--decay", "0", "--lambdasm", "0"])
    )
    assert status == 0
    for split in ("valid", "test"):
        assert ppl(out, "dynamic", split) == ppl(out, "model alone", split)
    assert "cache" not in out


def test_dynamic_evaluation_is_tuned_first(trained, corpus_dir):
    argv = ["--data", str(corpus_dir), "--save", str(trained), "--dynamic", "sgd", "--tune"]
    status, out, err = invoke(
        lambda: pointer.main([*argv, "--tune-words", "60", "--split", "valid"])
    )
    assert (status, err) == (0, "")
    tried = re.findall(r"\| lr +(\S+) \| decay +(\S+) \| valid loss +\S+ \| valid ppl +(\S+)", out)
    assert len(tried) == len(pointer.RATES["sgd"]) * len(pointer.DECAYS["sgd"])
    best = min(tried, key=lambda row: float(row[2]))
    found = re.search("Best on 60 words of valid: --lr (.*) --decay (.*)", out)
    of = {row[:2]: row[2] for row in tried}
    assert of[found[1], found[2]] == best[2]
    assert "Best on valid: --theta" in out


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_reading_that_is_cut_short_reports_what_was_read(dynamic, trained, corpus_dir):
    """After so little time it is one window, or one segment."""
    argv = ["--data", str(corpus_dir), "--save", str(trained), "--bptt", "20", "--split", "test"]
    argv += ["--dynamic", "sgd", "--segment", "15", "--tune", "--tune-words", "30"] * dynamic
    status, out, err = invoke(lambda: pointer.main([*argv, "--seconds", "1e-9"]))
    assert (status, err) == (0, "")
    params, ids = build_params(read_checkpoint(trained)).eval(), Corpus(corpus_dir).test
    words = 15 if dynamic else 20
    assert out.count(f" | {words} of {len(ids) - 1:,} tokens\n") == 4 if dynamic else 3
    assert not dynamic or "Best on 30 words" in out
    alone = evaluate(params, ids[: words + 1], 1, 70)
    assert ppl(out, "model alone", "test") == pytest.approx(math.exp(alone), abs=0.006)

    _, whole, _ = invoke(lambda: pointer.main([*argv, "--seconds", "1000"]))
    assert f" | {len(ids) - 1:,} of {len(ids) - 1:,} tokens\n" in whole


def test_the_weights_are_put_back_where_reading_stops(trained, corpus_dir):
    args = pointer.parse_args(["--save", str(trained), "--dynamic", "sgd", "--lr", "1"])
    params = build_params(read_checkpoint(trained))
    before = [weight.clone() for weight in params.parameters()]
    corpus = Corpus(corpus_dir)
    reader = pointer.Reader(params, corpus, args)
    assert len(list(reader(corpus.test, seconds=1e-9))) == 1
    assert all(map(torch.equal, params.parameters(), before))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--save", "absent.pt"], "absent.pt: no such checkpoint"),
        (["--model", "GRU"], "--model GRU: {trained} holds a model LSTM; leave the flag out"),
        (["--model", "CNN"], "argument --model: model CNN is unknown"),
        (["--data", "absent"], "absent/train.txt: no such file"),
        (["--data", "sample"], "--data sample: its vocabulary is not that of {trained}"),
        (["--lambdasm", "1.5"], "argument --lambdasm: must be a number in [0, 1), not 1.5"),
        (["--window", "0"], "argument --window: must be a whole number in [1, "),
        (["--seconds", "0"], "argument --seconds: must be a number above 0, not 0"),
        (["--theta", "x"], "argument --theta: 'x' is not a number"),
        (["--lr", "0.1"], "--lr: belongs to --dynamic; give that too"),
        (["--tune", "--lambdasm", "0"], "--lambdasm 0: there is nothing to tune; leave it out"),
        (["--cuda", "--device", "cpu"], "--cuda"),
        (["--dynamic", "sgd", "--lr", "1e20"], "--lr 1e+20: dynamic evaluation has diverged"),
    ],
)
def test_bad_input(argv, message, trained, corpus_dir):
    given = ["--data", str(corpus_dir), "--save", str(trained), *argv]
    status, out, err = invoke(lambda: pointer.main(given))
    assert status == 2
    assert "End of training" not in out
    assert err.partition("error: ")[2].startswith(message.format(trained=trained))
    assert err.count("\n") == 1


def test_a_model_that_reads_its_answer_is_refused(corpus_dir, small, tmp_path):
    import main

    path = tmp_path / "bi.pt"
    flags = [*small, "--data", corpus_dir, "--model", "biLSTM", "--epochs", 1, "--save", path]
    assert invoke(main.main, *flags)[0] == 0
    status, _, err = invoke(
        lambda: pointer.main(["--data", str(corpus_dir), "--save", str(path)])
    )
    assert status == 2
    assert "biLSTM has read the word that it predicts" in err
