"""The flags of a resumed run: what may change and is announced, what may not and is refused."""

import re
import shutil

import pytest
import torch

import finetune
import main
import train
from conftest import Interrupting, invoke
from checkpoint import pack
from kill_loop import lines, same
from utils import Preempted
from checkpoint import KIND, VERSION, changes, how_to_resume, read_state
from utils import environment
from checkpoint import read_checkpoint


@pytest.fixture
def unfinished(corpus_dir, small, tmp_path):
    """A run of three epochs that was ended in its second: (path, its command's flags)."""
    path = tmp_path / "run.pt"
    flags = ["--data", corpus_dir, *small, "--epochs", 3, "--nonmono", 0, "--save", path]
    original = train.Trainer.end_epoch

    def interrupted(self):
        original(self)
        raise Preempted(15)

    train.Trainer.end_epoch = interrupted
    try:
        status, out, _ = invoke(main.main, *flags)
    finally:
        train.Trainer.end_epoch = original
    assert status == 143
    assert f"The state is saved; python main.py --resume {path} goes on from here" in out
    return path, flags


def test_resume_alone_is_enough_and_the_same_flags_may_be_repeated(
    unfinished, tmp_path, monkeypatch
):
    path, flags = unfinished
    twin = tmp_path / "elsewhere"
    twin.mkdir()
    for file in tmp_path.glob("run.pt*"):
        shutil.copy(file, twin)
    status, out, err = invoke(main.main, "--resume", path)
    assert (status, err) == (0, "")
    assert f"Resuming the run of {path} at epoch 2, batch 0" in out
    assert "It goes on bit-identical to a run never interrupted" in out
    assert out.count("end of epoch") == 2
    assert len(lines((tmp_path / "run.pt.jsonl").read_text())) == 3
    flags[-1] = twin / "run.pt"
    status, out, err = invoke(main.main, *flags, "--resume", twin / "run.pt", "--log-interval", 3)
    assert (status, err) == (0, "")
    assert "bit-identical to a run never interrupted" in out
    assert "Note: no longer" not in out
    a, b = read_checkpoint(path), read_checkpoint(twin / "run.pt")
    a["flags"] = b["flags"]
    assert same(a, b)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (["--lr", "1.5"], "lr 5.0 -> 1.5"),
        (["--bias-lr", "0.5"], "bias_lr 1.0 -> 0.5"),
        (["--dropout", "0.1"], "dropout 0.4 -> 0.1"),
        (["--dropoute", "0"], "dropoute 0.1 -> 0.0"),
        (["--wdrop", "0.25"], "wdrop 0.5 -> 0.25"),
        (["--bptt", "12"], "bptt 10 -> 12"),
        (["--wdecay", "0"], "wdecay 1.2e-06 -> 0.0"),
        (["--nonmono", "7"], "nonmono 0 -> 7"),
    ],
)
def test_a_changed_flag_takes_effect_and_is_announced(change, note, unfinished):
    path, _ = unfinished
    made, rates = [], []

    class Spy(train.Trainer):
        def fit(self):
            made.append(self)
            for group in self.optimizer.param_groups:
                rates.append((group["lr"], group["weight_decay"]))
            super().fit()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "Trainer", Spy)
        status, out, _ = invoke(main.main, "--resume", path, *change)
    assert status == 0
    assert f"Note: no longer bit-identical to a run never interrupted: {note}\n" in out
    (run,) = made
    model = run.params[0]
    expected = {"--lr": (1.5, 1.2e-6), "--wdecay": (5.0, 0.0)}.get(change[0], (5.0, 1.2e-6))
    assert rates == [expected, (2.5, 1.2e-6) if change[0] == "--bias-lr" else expected]
    assert model.dropout == (0.1 if change[0] == "--dropout" else 0.4)
    assert model.rnns[0].dropout == (0.25 if change[0] == "--wdrop" else 0.5)
    assert run.args.bptt == (12 if change[0] == "--bptt" else 10)


@pytest.mark.parametrize(
    "change",
    [["--epochs", "5"], ["--log-interval", "3"], ["--checkpoint-minutes", "0.5"],
     ["--on-divergence", "rollback"], ["--finetune", "1"]],
)
def test_what_changes_freely(change, unfinished):
    path, _ = unfinished
    status, out, _ = invoke(main.main, "--resume", path, *change)
    assert status == 0
    assert "It goes on bit-identical" in out
    assert out.count("end of epoch") == {"--epochs": 4, "--finetune": 3}.get(change[0], 2)


def test_another_thread_count_is_announced(unfinished):
    path, _ = unfinished
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        _, out, _ = invoke(main.main, "--resume", path)
    finally:
        torch.set_num_threads(threads)
    assert f"no longer bit-identical to a run never interrupted: threads {threads} -> " in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--nhid", "14"], "--nhid 14: "),
        (["--model", "GRU"], "--model GRU: "),
        (["--nlayers", "1"], "--nlayers 1: "),
        (["--emsize", "10"], "--emsize 10: "),
        (["--batch_size", "5"], "--batch_size 5: the run in "),
        (["--seed", "5"], "--seed 5: the run in "),
        (["--optimizer", "adam"], "--optimizer adam: the run in "),
    ],
)
def test_what_cannot_change_is_refused_by_name(change, message, unfinished):
    path, _ = unfinished
    before = {file: file.read_bytes() for file in path.parent.glob("run*")}
    status, _, err = invoke(main.main, "--resume", path, *change)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert "leave the flag out" in err
    assert {file: file.read_bytes() for file in path.parent.glob("run*")} == before


@pytest.mark.parametrize("what", ["text", "vocabulary"])
def test_other_data_is_refused_by_name(what, unfinished, corpus_dir, tmp_path):
    path, _ = unfinished
    other = tmp_path / "other"
    shutil.copytree(corpus_dir, other)
    with open(other / "train.txt", "a") as file:
        file.write("ann sees the bob\n" if what == "text" else "ann sees a zebra\n")
    status, _, err = invoke(main.main, "--resume", path, "--data", other)
    assert (status, err.count("\n")) == (2, 1)
    assert f"--data {other}: its {what} is not that of the run in {path}.state" in err
    # A folder of another name with the same text is the same data.
    shutil.rmtree(other)
    shutil.copytree(corpus_dir, other)
    status, out, _ = invoke(main.main, "--resume", path, "--data", other)
    assert status == 0
    assert "It goes on bit-identical" in out


def test_without_a_state_it_is_a_warm_start_with_the_flags_given(trained, corpus_dir, tmp_path):
    trained.with_name("trained.pt.state").unlink()
    save = tmp_path / "resumed.pt"
    status, out, err = invoke(
        main.main, "--resume", trained, "--data", corpus_dir, "--epochs", 1, "--save", save,
        "--batch_size", 4, "--lr", 1e-9, "--wdecay", 0,
    )
    assert status == 0, err
    assert f"Warm start from the weights of {trained}: it has no training state" in out
    before, after = read_checkpoint(trained), read_checkpoint(save)
    assert after["architecture"] == before["architecture"]
    assert after["valid_loss"] == pytest.approx(before["valid_loss"], abs=1e-4)
    assert (after["flags"]["lr"], after["flags"]["bptt"]) == (1e-9, 70)


def test_a_warm_start_onto_itself_keeps_the_better_model(trained, corpus_dir):
    trained.with_name("trained.pt.state").unlink()
    content = trained.read_bytes()
    status, out, _ = invoke(
        main.main, "--resume", trained, "--data", corpus_dir, "--epochs", 1, "--save", trained,
        "--batch_size", 4, "--lr", 3000, "--clip", 0.25, "--on-divergence", "continue",
    )
    assert status == 0
    assert "Saving" not in out
    assert trained.read_bytes() == content
    # Its record is not lost either: the resumed run's line comes after it.
    assert len(trained.with_name("trained.pt.jsonl").read_text().splitlines()) == 2


def test_a_finished_run_says_so_and_more_epochs_extend_it(trained, corpus_dir, small, tmp_path):
    content = trained.read_bytes()
    status, out, _ = invoke(main.main, "--resume", trained)
    assert status == 0
    assert "It has come to its end; --epochs asks for more" in out
    assert "| End of training | test loss" in out
    assert trained.read_bytes() == content
    # As if two epochs had been asked for at once.
    assert invoke(main.main, "--resume", trained, "--epochs", 2)[0] == 0
    whole = tmp_path / "whole.pt"
    invoke(main.main, "--data", corpus_dir, *small, "--epochs", 2, "--save", whole)
    a, b = read_state(trained), read_state(whole)
    a["flags"] = b["flags"]
    assert same(a, b)


def test_resumed_under_another_name_it_leaves_the_first_alone(unfinished, tmp_path):
    path, _ = unfinished
    before = {file: file.read_bytes() for file in path.parent.glob("run*")}
    status, out, _ = invoke(main.main, "--resume", path, "--save", tmp_path / "fork.pt")
    assert status == 0
    assert "It goes on bit-identical" in out
    assert {file: file.read_bytes() for file in path.parent.glob("run*")} == before
    assert invoke(main.main, "--resume", path)[0] == 0
    a, b = read_state(path), read_state(tmp_path / "fork.pt")
    assert lines(a["records"]) == lines((tmp_path / "fork.pt.jsonl").read_text())
    a["flags"] = b["flags"]
    assert same(a, b)
    assert same(read_checkpoint(path)["model"], read_checkpoint(tmp_path / "fork.pt")["model"])


def test_a_run_of_which_only_the_state_exists(corpus_dir, small, tmp_path):
    """Ended in its first epoch, there is no best model yet; if it has been lost, that is said."""
    path = tmp_path / "m.pt"
    flags = ["--data", corpus_dir, *small, "--epochs", 1, "--save", path]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.Preemption, "check", Interrupting(5))
        assert invoke(main.main, *flags)[0] == 143
    assert sorted(file.name for file in tmp_path.glob("m.*")) == ["m.pt.state"]
    status, _, err = invoke(main.main, "--resume", path)
    assert (status, err) == (0, "")
    assert read_checkpoint(path)["epoch"] == 1
    path.unlink()
    status, _, err = invoke(main.main, "--resume", path)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{path}: the model of this finished run is gone" in err
    status, out, err = invoke(main.main, "--resume", path, "--epochs", 2)
    assert status == 0
    assert f"Warning: {path} (valid loss " in err
    assert f"no longer bit-identical to a run never interrupted: {path} (valid loss" in out
    assert read_checkpoint(path)["epoch"] == 2


def test_a_changed_flag_is_not_lost_by_a_kill_before_the_next_save(unfinished):
    path, _ = unfinished
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "train_epoch", lambda self: (_ for _ in ()).throw(OSError))
        assert invoke(main.main, "--resume", path, "--lr", 1.5, "--epochs", 9)[0] == 2
    state = read_state(path)
    assert (state["flags"]["lr"], state["flags"]["epochs"]) == (1.5, 9)
    assert state["optimizer"]["param_groups"][0]["lr"] == 1.5


def test_a_state_of_another_run_is_refused_or_announced(unfinished, corpus_dir, small, tmp_path):
    path, flags = unfinished
    other = tmp_path / "other.pt"
    invoke(main.main, *flags[:-1], other, "--nhid", 14)
    shutil.copy(path, other)
    status, _, err = invoke(main.main, "--resume", other, "--epochs", 9)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{other}.state: is not of the run that made {other}: another architecture" in err
    best = read_state(path)["best"]
    worse = tmp_path / "worse.pt"
    invoke(main.main, *flags[:-1], worse, "--lr", 1e-6, "--epochs", 1)
    assert read_checkpoint(worse)["valid_loss"] > best + 0.01
    shutil.copy(worse, path)
    status, out, _ = invoke(main.main, "--resume", path)
    assert status == 0
    assert re.search(r"no longer bit-identical .* is not this run's best \(", out)


def test_a_damaged_checkpoint_is_refused_before_anything_else(unfinished, tmp_path):
    path, _ = unfinished
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for more in ([], ["--save", tmp_path / "fork.pt"]):
        status, out, err = invoke(main.main, "--resume", path, *more)
        assert (status, err.count("\n")) == (2, 1)
        assert f"{path}: is damaged" in err
        assert "end of epoch" not in out
        assert path.read_bytes() == content
        assert not list(tmp_path.glob("fork*"))


def test_a_fork_does_not_replace_a_model(unfinished, trained):
    path, _ = unfinished
    content = trained.read_bytes()
    status, _, err = invoke(main.main, "--resume", path, "--save", trained)
    assert (status, err.count("\n")) == (2, 1)
    assert f"--save {trained}: exists; --resume {trained} goes on from it, or name another" in err
    assert trained.read_bytes() == content


def test_a_symbolic_link_names_the_run_of_its_target(unfinished, tmp_path):
    path, _ = unfinished
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    status, out, _ = invoke(main.main, "--resume", link)
    assert status == 0
    assert f"Resuming the run of {path} at epoch 2" in out
    assert not list(tmp_path.glob("link.pt.*"))


@pytest.mark.parametrize("target", ["torch.load", "torch.optim.SGD.load_state_dict"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_is_not_called_damage(target, error, unfinished, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(target, fail)
    status, _, err = invoke(main.main, "--resume", unfinished[0])
    assert (status, err.count("\n")) == (2, 1)
    assert "out of memory" in err


@pytest.mark.parametrize("target", ["torch.load", "torch.optim.SGD.load_state_dict"])
@pytest.mark.parametrize(
    "kind", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)]
)
@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA", "cuda is out of memory;"),
        ("CUDA error: no kernel image is available for execution on the device\nFor debugging",
         "cuda: CUDA error: no kernel image is available for execution on the device; no file is"),
        ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_INITIALIZED"),
    ],
)
def test_an_error_of_the_device_is_not_called_damage(
    target, kind, message, said, unfinished, monkeypatch
):
    error = kind(message)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(target, fail)
    status, _, err = invoke(main.main, "--resume", unfinished[0])
    assert (status, err.count("\n")) == (2, 1)
    assert said in err
    assert "device" in err and "damaged" not in err


@pytest.mark.parametrize("epoch", [1, 2])
def test_out_of_memory_in_the_middle_of_a_run_names_what_resumes_it(
    epoch, corpus_dir, small, tmp_path, monkeypatch
):
    path, step, steps = tmp_path / "m.pt", train.train_step, []

    def fail(*args, **kwargs):
        steps.append(args)
        if len(steps) == (1 if epoch == 1 else 50):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", fail)
    argv = ["--data", corpus_dir, *small, "--epochs", 2, "--save", path]
    status, _, err = invoke(main.main, *argv)
    assert (status, err.count("\n")) == (2, 1)
    if epoch == 1:  # nothing to go on from
        assert "out of memory; lower --batch_size" in err
        return
    assert "out of memory at epoch 2, batch " in err
    command = re.search(r"python main.py (--resume .*? --bptt 7) goes on", err)[1]
    status, out, err = invoke(main.main, *command.split())
    assert (status, err) == (0, "")
    assert "bptt 10 -> 7" in out and "| End of training |" in out


def test_a_resume_on_another_card_names_the_change(unfinished, monkeypatch):
    state, device = read_state(unfinished[0]), torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A")
    state["environment"] = environment(device)
    assert state["environment"]["hardware"] == "cuda (NVIDIA A, cuDNN 91300)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B")
    change = "hardware cuda (NVIDIA A, cuDNN 91300) -> cuda (NVIDIA B, cuDNN 91300)"
    assert change in changes(state, state["flags"], device)


@pytest.mark.parametrize("bptt", [65_510, 10**9])
def test_windows_longer_than_cudnn_takes_are_refused(bptt, corpus_dir, small):
    status, out, err = invoke(main.main, "--data", corpus_dir, *small, "--bptt", bptt)
    assert (status, out) == (2, "")
    assert f"--bptt: must be a whole number in [1, 65510), not {bptt}" in err


def test_the_shown_command_works_for_names_with_spaces_and_dashes():
    assert how_to_resume("main.py", "my model.pt") == "python main.py --resume 'my model.pt'"
    assert how_to_resume("main.py", "-x.pt") == "python main.py --resume=-x.pt"
    assert main.make_parser("").parse_args(["--resume=-x.pt"]).resume == "-x.pt"


def test_a_state_of_an_earlier_version_is_named(unfinished):
    path, _ = unfinished
    state = read_state(path)
    state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][:1]
    contents = {k: v for k, v in state.items() if k not in ("format", "version")}
    content = pack(KIND, VERSION, contents)
    path.with_name("run.pt.state").write_bytes(content)
    status, _, err = invoke(main.main, "--resume", path)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{path}.state: was written by an earlier version of this code; go on with that" in err
    assert path.with_name("run.pt.state").read_bytes() == content


def test_a_new_run_does_not_destroy_an_unfinished_one(unfinished):
    path, flags = unfinished
    before = path.read_bytes(), path.with_name("run.pt.state").read_bytes()
    status, out, _ = invoke(main.main, *flags)
    assert status == 0
    kept = path.with_name("run.pt.unfinished")
    assert f"python main.py --resume {kept} continues it" in out
    assert (kept.read_bytes(), path.with_name("run.pt.unfinished.state").read_bytes()) == before
    status, out, _ = invoke(main.main, "--resume", kept)
    assert status == 0
    a, b = read_state(path), read_state(kept)
    a["flags"] = b["flags"]
    assert same(a, b)  # the same flags and seed: the same run
    assert invoke(main.main, *flags)[0] == 0
    assert not path.with_name("run.pt.unfinished2").exists()  # that one was finished


# ---------------------------------------------------------------- fine-tuning


def test_what_a_bilm_is_trained_for_cannot_change_in_the_middle(corpus_dir, small, tmp_path):
    """The best loss so far is of another kind than that of another objective."""
    path = tmp_path / "bilm.pt"
    command = ["--data", corpus_dir, *small, "--model", "biLM", "--objective", "cloze"]
    assert invoke(main.main, *command, "--epochs", 1, "--save", path)[0] == 0
    status, _, err = invoke(main.main, "--resume", path, "--objective", "lm", "--epochs", 2)
    assert status == 2
    assert err.startswith(f"main.py: error: --objective lm: the run in {path}.state has cloze; ")
    # From the weights alone, it is what they were trained for.
    path.with_name("bilm.pt.state").unlink()
    assert main.parse_args(["--resume", str(path)]).objective == "cloze"
    status, _, err = invoke(main.main, "--resume", path, "--decoder-bias", "unigram")
    assert status == 2
    assert err == f"main.py: error: --decoder-bias: the weights of {path} have one; leave it out\n"


def test_finetune_resumes_itself_and_names_the_command_for_the_others(
    unfinished, corpus_dir, tmp_path
):
    path, _ = unfinished
    status, _, err = invoke(finetune.main, "--resume", path)
    assert (status, err.count("\n")) == (2, 1)
    assert f"is of an unfinished run of main.py; python main.py --resume {path} continues" in err
    # Fine-tuning what was cut short keeps the run, so that it can still go on.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.Preemption, "check", Interrupting(40))
        status, out, _ = invoke(finetune.main, "--save", path, "--epochs", 3)
    assert status == 143
    assert f"python finetune.py --resume {path} goes on from here" in out
    status, _, err = invoke(main.main, "--resume", path)
    assert status == 2
    assert f"python finetune.py --resume {path} continues it" in err
    base = path.with_name("run.pt.base")
    whole = tmp_path / "whole.pt"
    shutil.copy(base, whole)
    status, out, _ = invoke(finetune.main, "--resume", path)
    assert status == 0
    assert "of fine-tuning, batch" in out
    assert "It goes on bit-identical" in out
    assert invoke(finetune.main, "--save", whole, "--epochs", 3)[0] == 0
    a, b = read_state(path), read_state(whole)
    a["flags"] = b["flags"]
    assert same(a, b)
    status, out, _ = invoke(main.main, "--resume", base)
    assert status == 0
    assert f"Resuming the run of {base} at epoch 2, batch 0" in out
