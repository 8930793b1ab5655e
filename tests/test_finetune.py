"""Fine-tuning, its interruptions, and training on other text with a model's words."""

import math
import re
import shutil
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import finetune
import main
import train
from checkpoint import build_params, read_checkpoint, read_state
from conftest import CHANGED, IDENTICAL, edit, invoke, outcome, refuse, stop, succeed
from data import SPLITS
from kill_loop import lines, same
from utils import Preempted


# ---------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize(
    ("flags", "resumes", "decay", "rates"),
    [
        ("--optimizer adam --model biLM", [""], 1.2e-6, (30, 0.3)),
        ("--optimizer adam --model biLM", ["--lr 15"], 1.2e-6, (15, 0.15)),
        ("--optimizer adam --model biLM", ["--bias-lr 0.5"], 1.2e-6, (30, 15)),
        ("--optimizer adam --model biLM", ["--lr 15 --bias-lr 0.5"], 1.2e-6, (15, 7.5)),
        ("--optimizer adamw", ["--wdecay 0.01", ""], 0.01, (30, 30)),
        ("--optimizer adamw", ["--bias-lr 0.5", "--lr 10"], 1.2e-6, (10, 5)),
    ],
)
def test_what_one_resume_of_fine_tuning_changes_stays_changed(
    flags, resumes, decay, rates, corpus_dir, small, tmp_path
):
    """After adam and adamw, whose own rates and decay are not SGD's."""
    path = tmp_path / "m.pt"
    small = [flag for flag in small if flag not in ("--lr", "5")]
    succeed("--data", corpus_dir, *small, *flags.split(), "--epochs", 1, "--finetune", 1,
            "--nonmono", 50, "--save", path)
    for epochs, more in enumerate(resumes, 2):
        succeed("--resume", path, "--finetune", epochs, *more.split())
    groups = read_state(path)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [decay] * 2
    assert [group["lr"] for group in groups] == pytest.approx(rates)


def test_main_resumes_in_its_fine_tuning(corpus_dir, small, tmp_path):
    whole, parts = (tmp_path / f"{name}.pt" for name in ("whole", "parts"))
    flags = ["--data", corpus_dir, *small, "--epochs", 3, "--finetune", 3, "--save"]
    succeed(*flags, whole)
    stop([115], *flags, parts)
    assert "at epoch 1 of fine-tuning" in stop([40], "--resume", parts)
    assert "--epochs 9: " in refuse("--resume", parts, "--epochs", 9)
    for change in ("--when 2", "--schedule trapezoid"):
        assert f"{change}: " in refuse("--resume", parts, *change.split())
    assert f"{parts} has none; leave" in refuse("--resume", parts, "--regularization-ramp", 0, 3)
    succeed("--resume", parts)
    assert same(outcome(whole), outcome(parts))
    bases = [read_checkpoint(f"{path}.base")["model"] for path in (whole, parts)]
    assert same(*bases)
    err = refuse("--resume", parts, command=finetune.main)
    assert "its fine-tuning by main.py is finished" in err and "--finetune N" in err
    out = succeed("--resume", parts)
    assert "The run is finished; a higher --finetune extends it" in out
    assert "end of epoch" not in out and "| End of training | test loss" in out


def test_finetune_resumes_itself_and_names_the_command_for_the_others(unfinished, tmp_path):
    path, _ = unfinished
    err = refuse("--resume", path, command=finetune.main)
    assert "belongs to an unfinished run of main.py; " in err
    assert f"python main.py --resume {path} continues" in err
    # Fine-tuning what was cut short keeps the run, so that it can still go on.
    more = ["--epochs", 3, "--nonmono", 9]
    out = stop([40], "--save", path, *more, command=finetune.main)
    base = path.with_name("run.pt.base")
    assert f"stays at {base}; python main.py --resume {base} continues the unfinished run" in out
    assert f"python finetune.py --resume {path} resumes from here" in out
    assert f"python finetune.py --resume {path} continues it" in refuse("--resume", path)
    whole = tmp_path / "whole.pt"
    shutil.copy(base, whole)
    out = succeed("--resume", path, command=finetune.main)
    assert "of fine-tuning, batch" in out and IDENTICAL in out
    succeed("--save", whole, *more, command=finetune.main)
    assert same(outcome(path), outcome(whole))
    out = succeed("--resume", path, command=finetune.main)
    assert "The run is finished; a higher --epochs extends it" in out and "end of epoch" not in out
    err = refuse("--resume", path)
    assert f"its fine-tuning by finetune.py is finished; python finetune.py --resume {path} " in err
    assert "--epochs N, with a higher N, extends it" in err
    edit(path.with_name("run.pt.state"), done=True)  # by the trigger
    assert f"is finished; finetune.py --save {path} fine-tunes" in refuse("--resume", path)
    assert f"Resuming the run of {base} at epoch 2" in succeed("--resume", base)


def test_an_interrupted_evaluation_of_the_base_model_leaves_no_copy(trained, monkeypatch):
    monkeypatch.setattr(finetune, "evaluate_model", Mock(side_effect=Preempted(signal.SIGTERM)))
    with pytest.raises(Preempted):
        finetune.main(["--save", str(trained), "--epochs", "1"])
    assert not trained.with_name("trained.pt.base").exists()


def test_fine_tuning_that_does_not_improve_leaves_the_model(trained, monkeypatch):
    content = trained.read_bytes()
    monkeypatch.setattr(finetune, "evaluate_model", lambda *args: (0.0, {}))  # cannot be improved
    out = succeed("--save", trained, "--epochs", 1, command=finetune.main)
    assert "end of epoch   1" in out
    assert trained.read_bytes() == content


def test_fine_tuning_keeps_the_precision_of_training(trained, monkeypatch):
    flags = {"precision": "bf16", "pad_to": 8, "cuda_graphs": True}
    edit(trained, flags=read_checkpoint(trained)["flags"] | flags)
    monkeypatch.setattr("flags.has_precision", lambda *given: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args, _ = finetune.parse_args(["--save", str(trained)])
    assert (args.precision, args.pad_to, args.cuda_graphs) == ("bf16", 8, True)


def test_an_empty_resume_is_none(trained):
    flags = ["--save", trained, "--resume", "", "--epochs"]
    for epochs in (1, 2):
        assert "Fine-tuning" in succeed(*flags, epochs, command=finetune.main)


def test_finetune_from_another_name(trained, tmp_path):
    """Without a state of its own, finetune.py --resume begins from the weights, in a copy."""
    content, save = trained.read_bytes(), tmp_path / "tuned.pt"
    out = succeed("--resume", trained, "--save", save, "--epochs", 1, command=finetune.main)
    assert f"Warm start from the weights of {trained}" in out
    assert trained.read_bytes() == save.with_name("tuned.pt.base").read_bytes() == content


# ---------------------------------------------------------------- other text

COMMANDS = pytest.mark.parametrize(
    ("command", "records"), [(main, ".jsonl"), (finetune, ".finetune.jsonl")]
)


@pytest.fixture
def weights(trained_with_unk):
    """A checkpoint without a state; its vocabulary lacks "dog" and "likes" of `corpus_dir`."""
    trained_with_unk.with_name("unk.pt.state").unlink()
    return trained_with_unk


def encoded(folder, words):
    """{split: its ids [N], words outside of `words` as <unk>}."""
    return {
        split: torch.tensor([
            words.index(word if word in words else "<unk>")
            for word in (folder / f"{split}.txt").read_text().replace("\n", " <eos> ").split()
        ])
        for split in SPLITS
    }


@COMMANDS
def test_other_text_is_trained_on_with_the_models_words(
    command, records, weights, corpus_dir, tmp_path
):
    before, path = read_checkpoint(weights), tmp_path / "new.pt"
    ids = encoded(corpus_dir, before["vocabulary"])
    out = succeed("--resume", weights, "--save", path, "--data", corpus_dir, "--epochs", 1,
                  "--batch_size", 4, "--lr", 1e-9, "--wdecay", 0, command=command.main)
    text = "".join((corpus_dir / f"{split}.txt").read_text() for split in SPLITS)
    unknown = len(re.findall("dog|likes", text))
    assert f", 8 words: {unknown} of 1,600 tokens ({unknown / 16:.1f}%) are unknown, read" in out
    assert re.search("as <unk>: ('dog', 'likes'|'likes', 'dog')\n", out)
    params = build_params(before)
    [record] = lines(path.with_name(f"new.pt{records}").read_text())
    assert record["valid_loss"] == pytest.approx(train.evaluate(params, ids["valid"], 10, 70))
    ppl = float(re.search(r"test ppl +([\d.]+)", out)[1])
    assert ppl == pytest.approx(math.exp(train.evaluate(params, ids["test"], 1, 70)), abs=0.006)
    assert read_checkpoint(path)["vocabulary"] == before["vocabulary"]


@COMMANDS
def test_a_run_on_other_text_resumes(command, records, weights, corpus_dir, tmp_path):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    flags = ["--resume", weights, "--data", corpus_dir, "--epochs", 3, "--batch_size", 4,
             "--bptt", 10, "--save"]
    succeed(*flags, whole, command=command.main)
    stop([60], *flags, parts, command=command.main)
    out = succeed("--resume", parts, command=command.main)
    assert IDENTICAL in out and "Text read with the vocabulary of" in out
    assert same(outcome(parts), outcome(whole))
    assert lines(Path(f"{parts}{records}").read_text()) == outcome(whole)[-1]
    (corpus_dir / "valid.txt").write_text("ann sees the cat\n" * 9)  # with words it knows
    assert f"--data {corpus_dir}: its text is not that" in refuse(
        "--resume", parts, "--epochs", 9, command=command.main
    )


def test_the_base_models_loss_is_not_compared_with_that_on_other_text(weights, corpus_dir):
    edit(weights, valid_loss=0.1)
    flags = ["--save", weights, "--data", corpus_dir, "--batch_size", 4, "--bptt", 10]
    stop([20], *flags, "--epochs", 1, command=finetune.main)
    out = succeed("--resume", weights, "--clip", 0.2, command=finetune.main)
    assert CHANGED in out and "Saving averaged weights" in out


def test_text_of_another_kind_is_warned_of(weights, tmp_path):
    folder = tmp_path / "capitals"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.txt").write_text("ANN SEES THE CAT\n" * 30)
    status, out, err = invoke(finetune.main, "--save", weights, "--data", folder, "--epochs", 1)
    assert (status, err.count("\n")) == (0, 1)
    assert "360 of 450 tokens (80.0%) are unknown" in out
    assert f"Warning: most of {folder} is unknown to {weights}" in err
