"""The one-cycle rate, the regularization ramp, AdamW, and the recipes made of them."""

from pathlib import Path

import pytest
import torch

import finetune
import main
import train
from conftest import arguments, invoke, make_params, make_trainer
from data import Corpus
from checkpoint import pack
from kill_loop import lines, same
from checkpoint import KIND, VERSION, read_state
from test_resume import train_in_parts
from train import Objective, make_optimizer, train_step
from weight_drop import WeightDrop

# ---------------------------------------------------------------- the rate


def test_one_cycle_is_torchs():
    steps = 5000
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3.0, total_steps=steps + 1, pct_start=schedule.UP, cycle_momentum=False,
        div_factor=25, final_div_factor=1e4,
    )
    for step in range(steps + 1):
        expected = theirs.get_last_lr()[0]
        ours = 3.0 * schedule.rate_share("onecycle", step / steps)
        assert ours == pytest.approx(expected, rel=1e-6, abs=0.01), step  # their peak: a step off
        optimizer.step()
        if step < steps:
            theirs.step()


def test_one_cycle_at_its_corners():
    share = [schedule.rate_share("onecycle", p) for p in (0, schedule.UP / 2, schedule.UP, 1, 1.5)]
    assert share == pytest.approx([0.04, 0.52, 1, 4e-6, 4e-6])
    halfway = schedule.UP + (1 - schedule.UP) / 2
    assert schedule.rate_share("onecycle", halfway) == pytest.approx(0.5, abs=1e-5)
    assert schedule.rate_share("constant", 0.7) == 1


def test_a_step_takes_its_share_of_the_rate():
    words, targets = torch.randint(50, (10, 4)), torch.randint(50, (40,))
    moved = []
    for share in (1.0, 0.25):
        torch.manual_seed(3)
        params = make_params()
        before = params[0].decoder.bias.detach().clone()
        args = arguments(lr=2.0, wdecay=0, alpha=0, beta=0)
        optimizer = make_optimizer(params, args)
        hidden = params[0].init_hidden(4)
        train_step(Objective(params), optimizer, words, targets, hidden, args, share)
        moved.append(params[0].decoder.bias.detach() - before)
        assert [group["lr"] for group in optimizer.param_groups] == [2.0, 2.0]
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[0] * 0.25, moved[1], rtol=1e-4, atol=1e-7)


def test_adamw_is_the_papers():
    """m, v: means of g and g^2; w <- w (1 - rate * decay) - rate * m' / (sqrt(v') + eps)."""
    params = make_params(dtype=torch.float64)
    args = arguments(optimizer="adamw", lr=0.01, wdecay=0.3, clip=0, alpha=0, beta=0)
    optimizer = make_optimizer(params, args)
    weight = params[0].rnns[0].module.weight_ih_l0
    w, m, v = weight.detach().clone(), 0.0, 0.0
    for step in (1, 2, 3):
        words, targets = torch.randint(50, (10, 4)), torch.randint(50, (40,))
        train_step(Objective(params), optimizer, words, targets, params[0].init_hidden(4), args)
        g = weight.grad
        m, v = 0.8 * m + 0.2 * g, 0.99 * v + 0.01 * g * g
        scaled = (m / (1 - 0.8**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        w = w * (1 - 0.01 * 0.3) - 0.01 * scaled
        torch.testing.assert_close(weight.detach(), w)


# ---------------------------------------------------------------- the ramp


def test_the_ramp_is_linear_and_then_whole():
    assert [schedule.ramp(p, 0.2, 0.5) for p in (0, 0.25, 0.5, 0.9)] == pytest.approx(
        [0.2, 0.6, 1, 1]
    )
    assert schedule.ramp(1, 0.2, 4) == pytest.approx(0.4)  # the run ends on the way


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "biLSTM", "biLM"])
def test_the_ramp_reaches_every_regularizer(kind):
    model = make_params(kind, rate=0.5)[0]
    rates = {"dropout": 0.4, "dropouth": 0.3, "dropouti": 0.2, "dropoute": 0.1, "wdrop": 0.5}
    args = arguments(regularization_ramp=[0.2, 0.5], alpha=2.0, beta=1.0, **rates)
    for progress, strength in ((0.0, 0.2), (0.25, 0.6), (0.75, 1.0)):
        now, share = settings_at(progress, args, model)
        assert share == 1
        assert (now.alpha, now.beta) == pytest.approx((2 * strength, strength))
        for name, rate in rates.items():
            assert getattr(model, name) == getattr(now, name) == pytest.approx(strength * rate)
        drops = [m.dropout for m in model.modules() if isinstance(m, WeightDrop)]
        assert drops == pytest.approx([strength * 0.5] * (4 if kind == "biLM" else 2))
        assert args.alpha == 2 and args.wdrop == 0.5  # the flags stay what they are


def test_the_ramp_acts_in_training_and_not_in_evaluation():
    model = make_params(rate=0.5)[0]
    args = arguments(
        regularization_ramp=[0.0, 1.0],
        **dict.fromkeys(("dropout", "dropouth", "dropouti", "dropoute", "wdrop"), 0.5),
    )
    words = torch.randint(50, (6, 3))

    def outputs(progress, training):
        settings_at(progress, args, model)
        model.train(training)
        return [model(words, model.init_hidden(3))[0].detach() for _ in range(2)]

    whole = outputs(1.0, False)
    assert torch.equal(*whole)
    assert torch.equal(*outputs(0.0, True)) and torch.equal(outputs(0.0, True)[0], whole[0])
    assert not torch.equal(*outputs(0.5, True))
    assert float((outputs(0.9, True)[0] == 0).float().mean()) > 0.3  # the output's own dropout
    assert torch.equal(outputs(0.5, False)[0], whole[0])


def test_without_a_ramp_the_flags_and_the_model_are_left_alone():
    model, args = make_params(rate=0.5)[0], arguments(dropout=0.1)
    assert settings_at(0.5, args, model)[0] is args
    assert model.dropout == 0.5 and model.rnns[0].dropout == 0.5


# ---------------------------------------------------------------- in a run

CYCLE = {
    "optimizer": "adamw", "schedule": "onecycle", "regularization_ramp": [0.25, 0.5], "lr": 0.01,
    "dropouth": 0.1, "dropouti": 0.1, "dropoute": 0.1, "wdrop": 0.4,
}


def test_a_run_follows_its_schedule(corpus_dir, tmp_path, monkeypatch):
    seen = []

    def spy(objective, optimizer, data, targets, hidden, args, share=1.0, **more):
        progress = (run.epoch - 1 + run.row / (len(run.source) - 1)) / 2
        seen.append((progress, args, share, objective.params[0].rnns[1].dropout))
        return train_step(objective, optimizer, data, targets, hidden, args, share, **more)

    monkeypatch.setattr(train, "train_step", spy)
    corpus = Corpus(corpus_dir)
    args = arguments(epochs=2, save=str(tmp_path / "m.pt"), **CYCLE)
    run = make_trainer(make_params(ntoken=len(corpus.dictionary), rate=0.3), corpus, args)
    run.fit()
    assert seen[0][0] == 0 and 0.9 < seen[-1][0] < 1
    for progress, now, share, wdrop in seen:
        strength = min(1, 0.25 + 0.75 * progress / 0.5)
        assert share == schedule.rate_share("onecycle", progress)
        assert wdrop == now.wdrop == pytest.approx(strength * 0.4)
        assert (now.alpha, now.beta) == pytest.approx((2 * strength, strength))
    first, last = lines(run.records)
    assert first["lr"] == pytest.approx(0.01 * schedule.rate_share("onecycle", 0.5))
    assert last["lr"] == pytest.approx(0.01 * schedule.LAST)


def test_it_goes_on_at_the_very_place(corpus_dir, tmp_path):
    """At several batches, in another process's place: the same losses and weights."""
    ends = [
        train_in_parts(tmp_path / name, corpus_dir, points, False, epochs=2, **CYCLE)
        for name, points in (("whole", ()), ("parts", (5, 17, 60)))
    ]
    (whole, *_), (resumed, *_, parts) = ends
    assert parts == 4
    assert resumed["valid_losses"] == whole["valid_losses"] and len(whole["valid_losses"]) == 2
    assert same(whole["model"], resumed["model"])


def test_more_epochs_are_another_schedule(corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    command = ["--data", corpus_dir, *small, "--epochs", 1, "--save", path]
    for given, note in (
        (["--schedule", "onecycle"], True), (["--regularization-ramp", 0.5, 1], True), ([], False)
    ):
        assert invoke(main.main, *command, *given)[0] == 0
        status, out, _ = invoke(main.main, "--resume", path, "--epochs", 2)
        assert status == 0
        assert ("no longer bit-identical to a run never interrupted: epochs 1 -> 2" in out) == note


def rewrite(path, version=VERSION, **changes):
    """Changes the flags in the state beside `path`; those that become ... are left out."""
    state = read_state(path)
    flags = {k: v for k, v in {**state["flags"], **changes}.items() if v is not ...}
    contents = {k: v for k, v in state.items() if k not in ("format", "version")}
    path.with_name(f"{path.name}.state").write_bytes(
        pack(KIND, version, {**contents, "flags": flags})
    )


def test_a_later_version_of_the_state_is_refused(corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    assert invoke(main.main, "--data", corpus_dir, *small, "--epochs", 1, "--save", path)[0] == 0
    rewrite(path, version=VERSION + 1)
    status, _, err = invoke(main.main, "--resume", path)
    assert status == 2 and err.count("\n") == 1
    assert f"{path}.state: has format version {VERSION + 1}, this code reads {VERSION};" in err


@pytest.mark.parametrize(
    "changes",
    [
        {"regularization_ramp": [0.5]}, {"regularization_ramp": "ab"},
        {"regularization_ramp": ["a", "b"]}, {"schedule": "foo"}, {"optimizer": "foo"},
        {"recipe": "foo"},
    ],
)
def test_a_state_with_flags_that_are_none_is_refused(changes, corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    assert invoke(main.main, "--data", corpus_dir, *small, "--epochs", 1, "--save", path)[0] == 0
    rewrite(path, **changes)
    status, _, err = invoke(main.main, "--resume", path, "--epochs", 2)
    assert status == 2 and err.count("\n") == 1 and "its parts do not fit together" in err


def test_a_schedule_given_at_a_resume_wants_an_end(corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    assert invoke(main.main, "--data", corpus_dir, *small, "--epochs", 1, "--save", path)[0] == 0
    rewrite(path, epochs=8000)
    status, _, err = invoke(main.main, "--resume", path, "--schedule", "onecycle")
    assert status == 2 and "--schedule onecycle: goes over the --epochs of the run; name" in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--schedule", "onecycle"], "--schedule onecycle: goes over the --epochs of the run;"),
        (["--regularization-ramp", "0", "1"], "--regularization-ramp 0 1: goes over the --epochs"),
        (["--regularization-ramp", "1.5", "1", "--epochs", "2"], "1.5 1: SHARE must be a number"),
        (["--regularization-ramp", "0.5", "0", "--epochs", "2"], "PART one above 0"),
        (["--regularization-ramp", "nan", "1", "--epochs", "2"], "SHARE must be a number in [0,"),
        (["--regularization-ramp", "0.5", "inf", "--epochs", "2"], "PART one above 0"),
        (["--regularization-ramp", "0.5", "--epochs", "2"], "expected 2 arguments"),
        (
            ["--recipe", "short", "--epochs", "2", "--wdecay", "1e3"],
            "--wdecay 1000: with --lr 5 a step",
        ),
        (
            ["--recipe", "short", "--epochs", "2", "--lr", "30"],
            "--wdecay 0.1 (of --recipe short): with --lr 30 a step",
        ),
        (["--recipe", "short"], "--recipe short: is made for a number of epochs; give --epochs"),
        (["--recipe", "long", "--epochs", "2"], "argument --recipe: invalid choice: 'long'"),
        (["--schedule", "cosine", "--epochs", "2"], "argument --schedule: invalid choice"),
    ],
)
def test_what_is_refused(given, message, corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    status, _, err = invoke(main.main, "--data", corpus_dir, *small, "--save", path, *given)
    assert status == 2 and err.count("\n") == 1 and message in err
    assert not list(tmp_path.glob("m.pt*"))


# ---------------------------------------------------------------- the recipes


def test_the_published_recipe_is_the_default_and_sets_nothing():
    assert recipes.RECIPES["published"] == {}
    plain, named = main.parse_args([]), main.parse_args(["--recipe", "published"])
    plain.save = named.save = ""
    assert plain == named
    assert (plain.optimizer, plain.schedule, plain.regularization_ramp) == ("sgd", "constant", None)
    assert (plain.lr, plain.wdecay, plain.batch_size, plain.bptt) == (30, 1.2e-6, 80, 70)


def test_what_the_short_recipe_sets_and_that_a_given_flag_wins():
    args = main.parse_args(["--recipe", "short", "--epochs", "8"])
    assert (args.optimizer, args.schedule) == ("adamw", "onecycle")
    assert (args.lr, args.wdecay, args.batch_size, args.bptt) == (8e-3, 0.1, 20, 70)
    share, whole_after = recipes.RECIPES["short"]["regularization_ramp"]
    assert args.regularization_ramp == [share, pytest.approx(whole_after / 8, abs=1e-4)]
    assert (args.dropout, args.dropouth, args.wdrop) == (0.4, 0.3, 0.5)
    assert args.decoder_bias == "unigram"
    readme = (Path(main.__file__).parent / "README.md").read_text()
    assert f"\n    {recipes.describe(args)}\n" in readme  # where the log line is quoted
    given = "--lr 1e-3 --bptt 50 --optimizer adam --decoder-bias zeros --regularization-ramp 0 1"
    args = main.parse_args(["--recipe", "short", "--epochs", "8", *given.split()])
    assert (args.lr, args.bptt, args.optimizer, args.decoder_bias) == (1e-3, 50, "adam", "zeros")
    assert args.regularization_ramp == [0, 1] and args.schedule == "onecycle"
    assert args.wdecay == 1.2e-6  # adam's, which came with the given optimizer
    args = main.parse_args(["--recipe", "short", "--epochs", "8", "--optimizer", "sgd"])
    assert (args.lr, args.wdecay, args.schedule) == (30, 1.2e-6, "onecycle")
    args = main.parse_args(["--recipe", "short", "--epochs", "8", "--optimizer", "adamw"])
    assert (args.lr, args.wdecay) == (8e-3, 0.1)
    assert "--optimizer" not in recipes.describe(args)  # as it was given


def test_the_log_prints_what_the_recipe_set(corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    command = ["--data", corpus_dir, *small, "--epochs", 2, "--save", path]
    out = invoke(main.main, *command, "--recipe", "short", "--schedule", "constant")[1]
    share, whole_after = recipes.RECIPES["short"]["regularization_ramp"]
    assert (
        "\nRecipe short for --epochs 2: --optimizer adamw --wdecay 0.1 --decoder-bias unigram "
        f"--regularization-ramp {share:g} {whole_after / 2:g}\n"
    ) in out
    status, out, _ = invoke(main.main, "--resume", path)
    assert status == 0 and "It goes on bit-identical" in out and "Recipe" not in out
    status, _, err = invoke(main.main, "--resume", path, "--recipe", "published")
    assert status == 2 and "--recipe published: the run in " in err
    (tmp_path / "m.pt.state").unlink()  # from the weights alone, which have a decoder's bias
    status, out, _ = invoke(
        main.main, "--resume", path, "--save", tmp_path / "n.pt", *command[:-2], "--recipe", "short"
    )
    assert status == 0
    assert "Recipe short for --epochs 2: --optimizer adamw --wdecay 0.1 --schedule one" in out
    assert "--decoder-bias" not in out
    assert "Recipe" not in invoke(main.main, *command[:-2], "--save", tmp_path / "o.pt")[1]


def test_the_recipe_follows_a_run_that_gets_more_epochs(corpus_dir, small, tmp_path):
    share, whole_after = recipes.RECIPES["short"]["regularization_ramp"]
    for name, given, expected in (
        ("recipe", [], [share, whole_after / 4]),
        ("given", [0.5, 1], [0.5, 1.0]),
        ("as the recipe's", [share, whole_after / 2], [share, whole_after / 2]),
    ):
        path = tmp_path / f"{name}.pt"
        command = ["--data", corpus_dir, *small, "--recipe", "short", "--epochs", 2]
        ramp = ["--regularization-ramp", *given] if given else []
        assert invoke(main.main, *command, *ramp, "--save", path)[0] == 0
        assert invoke(main.main, "--resume", path, "--epochs", 4)[0] == 0
        assert read_state(path)["flags"]["regularization_ramp"] == expected


@pytest.mark.parametrize("epochs", [1, 3, 1000, 2_000_000])
def test_the_recipe_of_any_number_of_epochs(epochs):
    args = main.parse_args(["--recipe", "short", "--epochs", str(epochs)])
    whole_after = recipes.RECIPES["short"]["regularization_ramp"][1]
    assert args.regularization_ramp[1] * epochs == pytest.approx(whole_after, rel=1e-3)


def test_fine_tuning_after_the_short_recipe(corpus_dir, small, tmp_path):
    """SGD at its own rate and decay, no schedule, the regularizers where they were."""
    made = []

    class Spy(train.Trainer):
        def fit(self):
            group = self.optimizer.param_groups[0]
            made.append((self.args, group["lr"], group["weight_decay"], self.params[0]))
            super().fit()

    path = tmp_path / "m.pt"
    plain = [flag for flag in small if flag not in ("--lr", "5")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "Trainer", Spy)
        status, _, err = invoke(
            main.main, "--data", corpus_dir, *plain, "--epochs", 1, "--recipe", "short",
            "--save", path, "--finetune", 1, "--regularization-ramp", 0.25, 2,
        )
        assert status == 0, err
        assert invoke(main.main, "--resume", path, "--finetune", 2)[0] == 0
        status, out, _ = invoke(finetune.main, "--save", path, "--epochs", 1)
        assert status == 0
        assert "\nWith SGD: --lr 30 --bias-lr 1 --wdecay 1.2e-06 --dropout 0.25 --" in out
        assert invoke(finetune.main, "--resume", path, "--epochs", 2)[0] == 0
        assert invoke(finetune.main, "--save", path, "--epochs", 1)[0] == 0
        given = ["--lr", 5, "--dropout", 0.3]
        assert invoke(finetune.main, "--save", path, "--epochs", 1, *given)[0] == 0
    strength = 0.25 + 0.75 / 2
    for args, rate, decay, model in made[:5]:
        assert (rate, decay) == (30.0, 1.2e-6)
        assert (args.optimizer, args.schedule) == ("sgd", "constant")
        assert (model.dropout, args.alpha, args.beta) == (0.4 * strength, 2 * strength, strength)
        assert {rnn.dropout for rnn in model.rnns} == {0.5 * strength}
        assert args.regularization_ramp is None
    assert len(made) == 6
    args, rate, _, model = made[5]
    assert (rate, model.dropout, args.alpha) == (5.0, 0.3, 2 * strength)


def test_fine_tuning_after_the_short_recipe_is_resumed_with_its_own_rates(
    corpus_dir, small, tmp_path
):
    """A rate that is given then is compared with that of SGD, not with AdamW's."""
    path = tmp_path / "m.pt"
    plain = [flag for flag in small if flag not in ("--lr", "5")]
    command = ["--data", corpus_dir, *plain, "--model", "GRU", "--recipe", "short", "--epochs", 1]
    status, out, err = invoke(main.main, *command, "--finetune", 1, "--save", path)
    assert status == 0, err
    assert "\nWith SGD: --lr 10 --bias-lr 0.02 --wdecay 1.2e-06 --" in out
    flags = read_state(path)["flags"]
    assert (flags["lr"], flags["bias_lr"], flags["optimizer"]) == (10, 0.02, "adamw")
    given = ["--lr", 8e-3, "--bias-lr", 1, "--regularization-ramp", 1, 1]  # those of AdamW
    status, out, err = invoke(main.main, "--resume", path, "--finetune", 2, *given)
    assert status == 0, err
    assert "lr 10.0 -> 0.008" in out and "bias_lr 0.02 -> 1.0" in out
    assert "regularization_ramp [0.3, 12.0] -> [1.0, 1.0]" in out
    assert {group["lr"] for group in read_state(path)["optimizer"]["param_groups"]} == {8e-3}
    status, out, _ = invoke(main.main, "--resume", path, "--finetune", 3)
    assert status == 0 and "It goes on bit-identical" in out
