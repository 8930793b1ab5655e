"""The presets of --recipe, the flags they set, and fine-tuning after them."""

import pytest

import finetune
import main
import train
from checkpoint import pack, read_state
from conftest import invoke
from flags import RECIPES

SHORT = RECIPES["short"]


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ("--optimizer adamw", {}),
        # Rates are for one optimizer.
        ("--optimizer sgd", {"optimizer": "sgd", "lr": 30, "wdecay": 1.2e-6}),
        ("--optimizer adam --lr 1", {"optimizer": "adam", "lr": 1, "wdecay": 1.2e-6}),
        ("--regularization-ramp 0 1", {"regularization_ramp": [0, 1]}),
    ],
)
def test_a_given_flag_wins_over_the_recipe(given, changed):
    args, _ = main.parse_args(["--recipe", "short", "--epochs", "8", *given.split()])
    assert vars(args) == {**vars(args), **SHORT, **changed}


def test_the_log_names_what_the_recipe_set_alone(capsys):
    main.parse_args("--recipe short --schedule constant --lr 8e-3".split())
    assert capsys.readouterr().out == (
        "Recipe short: --optimizer adamw --wdecay 0.1 --decoder-bias unigram --batch_size 20 "
        "--regularization-ramp 0.3 12\n"
    )
    main.parse_args("--recipe fast --epochs 40 --wdecay 0.1".split())
    assert capsys.readouterr().out == (
        "Recipe fast: --optimizer adamw --lr 0.003 --schedule trapezoid --decoder-bias unigram "
        "--batch_size 20 --partial-shuffle\n"
    )
    main.parse_args([])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--schedule onecycle", "--schedule onecycle: needs --epochs"),
        ("--regularization-ramp 0.5 0", "EPOCHS a number above 0"),
        ("--regularization-ramp nan 1", "SHARE must be a number in [0,"),
        ("--regularization-ramp 0.5 inf", "EPOCHS a number above 0"),
        ("--regularization-ramp 0.5", "expected 2 arguments"),
        ("--recipe long", "argument --recipe: invalid choice: 'long'"),
        ("--schedule cosine", "argument --schedule: invalid choice"),
    ],
)
def test_what_is_refused(given, message):
    status, _, err = invoke(main.main, *given.split())
    assert status == 2 and err.count("\n") == 1 and message in err


@pytest.fixture
def begin(corpus_dir, small, tmp_path):
    """A function that trains for an epoch with flags as given; returns the checkpoint's path."""

    def begin(*given):
        path = tmp_path / "m.pt"
        plain = small[: small.index("--lr")]
        status, _, err = invoke(
            main.main, "--data", corpus_dir, *plain, "--epochs", 1, "--save", path, *given
        )
        assert status == 0, err
        return path

    return begin


@pytest.mark.parametrize(
    ("begun", "given", "message"),
    [
        (["--schedule", "onecycle"], [], "uninterrupted run: epochs 1 -> 2"),  # another schedule
        (["--regularization-ramp", 0.5, 1], [], "The resumed run is bit-identical"),
        (["--recipe", "short", "--schedule", "constant"], ["--recipe", "short"],
         "The resumed run is bit-identical"),
        (["--recipe", "short"], ["--recipe", "published"], "--recipe published: "),
    ],
)
def test_a_run_with_more_epochs(begun, given, message, begin):
    status, out, err = invoke(main.main, "--resume", begin(*begun), "--epochs", 2, *given)
    assert message in out + err and "Recipe" not in out
    assert status == (2 if err else 0)


def test_a_schedule_given_at_a_resume_needs_an_end(begin):
    path = begin()
    state = read_state(path)
    state["flags"]["epochs"] = 8000
    path.with_name("m.pt.state").write_bytes(pack("training state", state))
    status, _, err = invoke(main.main, "--resume", path, "--schedule", "onecycle")
    assert status == 2 and "--schedule onecycle: needs --epochs" in err


def test_fine_tuning_after_the_short_recipe(begin, monkeypatch):
    """SGD at its own rate and decay, no schedule, the regularizers as the ramp left them."""
    made, fit = [], train.Trainer.fit
    monkeypatch.setattr(train.Trainer, "fit", lambda run: made.append(run) or fit(run))
    path = begin("--recipe", "short", "--finetune", 1, "--regularization-ramp", 0.25, 2)
    for command, *given in (
        (main.main, "--resume", path, "--finetune", 2),
        (finetune.main, "--save", path, "--epochs", 1),
        (finetune.main, "--resume", path, "--epochs", 2),
        (finetune.main, "--save", path, "--epochs", 1, "--lr", 5, "--dropout", 0.3),
    ):
        assert invoke(command, *given)[0] == 0
    strength = 0.25 + 0.75 / 2
    expected = [(30, 0.4 * strength)] * 4 + [(5, 0.3)]
    for run, (lr, dropout) in zip(made[1:], expected, strict=True):
        args, (model, _), group = run.args, run.params, run.optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (lr, 1.2e-6)
        assert (args.optimizer, args.schedule) == ("sgd", "constant")
        assert args.regularization_ramp is None
        assert (model.dropout, args.alpha, args.beta) == (dropout, 2 * strength, strength)
        assert {rnn.dropout for rnn in model.rnns} == {0.5 * strength}
