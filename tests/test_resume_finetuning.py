"""A fine-tuning that goes on: its rates, its best model, the command that it is resumed with."""

import shutil

import pytest

import finetune
import main
import utils
from conftest import Interrupting, invoke
from checkpoint import pack
from kill_loop import same
from checkpoint import read_state
from checkpoint import read_checkpoint


def test_a_rate_given_for_the_fine_tuning_after_adam_is_used(corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    flags = [flag for flag in small if flag not in ("--lr", "5")]
    invoke(main.main, "--data", corpus_dir, *flags, "--epochs", 1, "--optimizer", "adam",
           "--finetune", 1, "--nonmono", 50, "--save", path)
    for more, expected in ((["--lr", 2.0, "--finetune", 2], 2.0), (["--finetune", 3], 2.0)):
        status, out, _ = invoke(main.main, "--resume", path, *more)
        assert status == 0
        assert f"| lr {expected:.5f} |" in out


@pytest.mark.parametrize(
    ("more", "rates"),
    [([], (30, 0.3)), (["--lr", 15], (15, 0.15)), (["--bias-lr", 0.5], (30, 15)),
     (["--lr", 15, "--bias-lr", 0.5], (15, 7.5))],
)
def test_the_biases_rate_in_the_fine_tuning_after_adam(more, rates, corpus_dir, small, tmp_path):
    path = tmp_path / "m.pt"
    flags = [flag for flag in small if flag not in ("--lr", "5")]
    invoke(main.main, "--data", corpus_dir, *flags, "--epochs", 1, "--optimizer", "adam",
           "--model", "biLM", "--finetune", 1, "--nonmono", 50, "--save", path)
    assert invoke(main.main, "--resume", path, "--finetune", 2, *more)[0] == 0
    groups = read_state(path)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("given", "decay", "rates"),
    [
        ([[], []], 1.2e-6, (30, 30)),
        ([["--wdecay", 0.01], []], 0.01, (30, 30)),
        ([["--bias-lr", 0.5], ["--lr", 10]], 1.2e-6, (10, 5)),
    ],
)
def test_what_one_resume_changes_stays_changed(
    given, decay, rates, corpus_dir, small, tmp_path
):
    """In the fine-tuning after adamw, whose own rates and decay are not SGD's."""
    path = tmp_path / "m.pt"
    flags = [flag for flag in small if flag not in ("--lr", "5")]
    invoke(main.main, "--data", corpus_dir, *flags, "--epochs", 1, "--optimizer", "adamw",
           "--finetune", 1, "--nonmono", 50, "--save", path)
    for epochs, more in enumerate(given, 2):
        assert invoke(main.main, "--resume", path, "--finetune", epochs, *more)[0] == 0
    groups = read_state(path)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [decay] * 2
    assert [group["lr"] for group in groups] == pytest.approx(rates)


def test_fine_tuning_an_older_model_trained_with_adam(trained, tmp_path):
    """Which has no rate for its biases."""
    checkpoint = read_checkpoint(trained)
    checkpoint["flags"]["optimizer"] = "adam"
    del checkpoint["flags"]["bias_lr"]
    contents = {k: v for k, v in checkpoint.items() if k not in ("format", "version")}
    trained.write_bytes(pack(utils.KIND, utils.VERSION, contents))
    args = finetune.parse_args(["--save", str(trained)])
    assert (args.lr, args.bias_lr) == (30, 1)


@pytest.mark.parametrize("other", ["objective", "text"])
def test_the_loss_of_another_objective_or_text_is_not_compared(
    other, corpus_dir, small, tmp_path
):
    """A fine-tuning for something else, interrupted before it has saved a model of its own."""
    path = tmp_path / "m.pt"
    command = ["--data", corpus_dir, *small, "--model", "biLM", "--objective", "cloze"]
    assert invoke(main.main, *command, "--epochs", 1, "--save", path)[0] == 0
    contents = {k: v for k, v in read_checkpoint(path).items() if k not in ("format", "version")}
    contents["valid_loss"] = 0.1  # what it was trained for was easy
    path.write_bytes(pack(utils.KIND, utils.VERSION, contents))
    more = ["--objective", "lm"]
    if other == "text":
        more = ["--data", tmp_path / "other"]
        shutil.copytree(corpus_dir, tmp_path / "other")
        file = tmp_path / "other" / "train.txt"
        file.write_text(file.read_text() * 2)  # the same words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.Preemption, "check", Interrupting(30))
        status, out, _ = invoke(finetune.main, "--save", path, "--epochs", 2, *more)
    assert status == 143
    assert "Saving" not in out
    for change in ([], ["--wdecay", 1e-6]):
        save = tmp_path / f"new{len(change)}.pt"
        status, out, _ = invoke(finetune.main, "--resume", path, "--save", save, *change)
        assert status == 0, out
        assert "is not this run's best" not in out
        assert ("goes on bit-identical" in out) == (not change)
        assert "Saving averaged weights (new best validation)" in out
        assert save.read_bytes() != path.read_bytes()


def test_main_resumes_in_its_fine_tuning(corpus_dir, small, tmp_path):
    ends = {}
    for name, points in (("whole", ()), ("parts", (115, 150))):
        folder = tmp_path / name
        folder.mkdir()
        path = folder / "m.pt"
        flags = ["--data", corpus_dir, *small, "--epochs", 3, "--finetune", 3, "--save", path]
        outs = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(main.Preemption, "check", Interrupting(*points))
            for argv in (flags, *[["--resume", path]] * len(points)):
                status, out, err = invoke(main.main, *argv)
                assert (status, err) == (143 if len(outs) < len(points) else 0, "")
                outs.append(out)
        ends[name] = read_state(path), read_checkpoint(path), read_checkpoint(f"{path}.base")
        if points:
            assert "at epoch 1 of fine-tuning" in outs[1]
    for a, b in zip(*ends.values()):
        a["flags"] = b["flags"]
        assert same(a, b)


def test_finetune_from_another_name(trained, tmp_path):
    """Without a state of its own, finetune.py --resume begins from the weights, in a copy."""
    content = trained.read_bytes()
    save = tmp_path / "tuned.pt"
    status, out, _ = invoke(finetune.main, "--resume", trained, "--save", save, "--epochs", 1)
    assert status == 0
    assert f"Warm start from the weights of {trained}" in out
    assert trained.read_bytes() == content
    assert save.with_name("tuned.pt.base").read_bytes() == content
