"""What flags mean, and what is said to bad ones: one line, exit code 2, nothing lost."""

import re
from argparse import Namespace

import pytest
import torch

import distributed
import finetune
import main
from conftest import ROOT, invoke, succeed
from data import InputError
from flags import FIXED_FLAGS, FREE_FLAGS, error_line, resolve_device

BAD_FLAGS = [
    ("--model lstm2", "--model: invalid choice: 'lstm2'"),
    ("--emsize -5", "--emsize: must be a whole number in [1, 2147483648), not -5"),
    ("--nhid 0", "--nhid: must be"),
    ("--nhid 100000000000", "--nhid: must be a whole number in [1, 2147483648)"),
    ("--nhid 100000000", "out of memory; lower"),
    ("--nlayers two", "--nlayers: 'two' is not a whole number"),
    ("--batch_size 0", "--batch_size: must be"),
    ("--batch_size 5000", "--batch_size 5000: the training split has 1250 tokens"),
    ("--bptt -1", "--bptt: must be"),
    ("--epochs 0", "--epochs: must be"),
    ("--dropout 1", "--dropout: must be a number in [0, 1), not 1"),
    ("--wdrop -0.1", "--wdrop: must be a number in [0, 1)"),
    ("--dropouti nan", "--dropouti: must be"),
    ("--lr 0", "--lr: must be a number in (0, 1e+30)"),
    ("--lr 1e39", "--lr: must be a number in (0, 1e+30), not 1e39"),
    ("--wdecay 1e300", "--wdecay: must be a number in [0, 1e+30)"),
    ("--clip -1", "--clip: must be"),
    ("--seed -1", "--seed: must be"),
    ("--device tpu", "--device: must be cpu, cuda, cuda:N or mps"),
    ("--device cpu:1", "--device: must be cpu, cuda, cuda:N or mps"),
    ("--model biLSTM --nhid 13", "--nhid 13, emsize 400: biLSTM needs even sizes"),
    ("--model biLSTM --emsize 13", "--nhid 1150, emsize 13: biLSTM needs even sizes"),
    ("--model biLSTM --attention single", "--attention only looks back: leave it out with biLSTM"),
    ("--attention-window 5", "--attention-window 5: has no effect without --attention"),
    ("--objective cloze", "--objective cloze: requires --model biLM"),
    ("--recipe fast", "--recipe fast: needs --epochs"),
    ("--optimizer adam --schedule trapezoid", "--schedule trapezoid: needs --epochs"),
    ("--bptt 65500", "--bptt: must be a whole number in [1, 65500), not 65500"),
    ("--regularization-ramp 2 1", "--regularization-ramp 2 1: SHARE must be a number in [0, 1]"),
    ("--regularization-ramp nan 1", "SHARE must be a number in [0, 1]"),
    ("--regularization-ramp 0.5 0", "EPOCHS a number above 0"),
    ("--regularization-ramp 0.5 inf", "EPOCHS a number above 0"),
    ("--precision tf32 --device cpu", "--precision tf32: not supported on device cpu; use"),
    ("--checkpoint-minutes 0", "--checkpoint-minutes: must be a number above 0"),
    ("--on-divergence pray", "--on-divergence: invalid choice: 'pray'"),
    ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
    ("--data absent", "train.txt: no such file; --data takes a folder"),
    ("--embeddings absent", "error: absent: No such file or directory"),
    ("--embeddings .", "error: .: Is a directory"),
    ("--unk zoe", "--unk zoe: not in the model's vocabulary"),
    ("--resume absent.pt", "absent.pt: no such checkpoint"),
    ("--resume notes.txt", "notes.txt: is damaged, or not a checkpoint of main.py"),
    ("--save absent/m.pt", "--save absent/m.pt: cannot be written (No such file"),
    ("--save .", "--save .: is not a file name"),
    ("--save new/", "--save new/: is not a file name"),
    ("--save " + "n" * 251, "cannot be written (File name too long)"),
    ("--save notes.txt", "notes.txt: is damaged or was not written by a run"),
    ("--save run", "run.jsonl: is damaged or was not written by a run"),
    ("--save run2", "run2.jsonl: is damaged or was not written by a run"),
    ("--save s.pt", "s.pt.state: is damaged or was not written by a run"),
    ("--save l.pt", "l.pt.lock: is damaged or was not written by a run"),
    ("--save w.pt --when 3 1", "w.pt.e1: is damaged or was not written by a run"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS)
def test_bad_input_is_one_line_and_changes_no_file(
    flags, message, corpus_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "run.jsonl", "w.pt.e1", "s.pt.state", "l.pt.lock"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "run2.jsonl").mkdir()

    def files():
        return {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    before = files()
    status, out, err = invoke(main.main, "--data", corpus_dir, *flags.split())
    assert status == 2
    assert err.startswith("main.py: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "end of epoch" not in out
    assert files() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("flags", ["--cuda", "--device cuda", "--device cuda:1"])
def test_cuda_where_there_is_none(flags, corpus_dir):
    status, _, err = invoke(main.main, "--data", corpus_dir, *flags.split())
    assert (status, err.count("\n")) == (2, 1)
    assert f"{flags.split()[0]}: " in err


def test_finetune_names_what_does_not_fit(trained, tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("quite another text\n" * 40)
    for flags, message in [
        (["--save", trained, "--nhid", 20], "--nhid 20: .* has --nhid 12"),
        (["--save", trained, "--data", tmp_path], f"{tmp_path}: holds tokens .*, 'another'"),
        ([], "--save: name the checkpoint"),
    ]:
        status, _, err = invoke(finetune.main, *flags)
        assert (status, err.count("\n")) == (2, 1)
        assert re.search(message, err)


def test_the_table_of_flags_on_resume_is_that_of_the_code():
    page = (ROOT / "docs" / "interruptions.md").read_text(encoding="utf-8")
    must, may, freely = (
        {flag.replace("-", "_") for flag in re.findall(r"`--([\w-]+)`", row)}
        for row in re.findall(r"(?m)^\| (?:must match|may change)[^|]*\|([^|;]*)", page)
    )
    rest = main.make_main_parser().defaults.keys() - {*FIXED_FLAGS, *FREE_FLAGS}
    assert must == {*FIXED_FLAGS, "data"}
    assert may == rest - {"dropout", "dropouth", "dropouti", "dropoute"} | {"epochs"}
    assert freely == {*FREE_FLAGS} - {"data", "resume", "cuda", "device", "tied"}


def test_a_diverging_run_says_so(corpus_dir, small, tmp_path, monkeypatch):
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    flags = ["--data", corpus_dir, *small, "--clip", 0, "--lr", 1e29, "--save", "m.pt"]
    status, _, err = invoke(main.main, *flags)
    assert status == 2
    command = re.search(r"python main\.py (--resume m\.pt) --lr 5e\+28 resumes", err)[1]
    assert [path.name for path in folder.iterdir()] == ["m.pt.state"]
    succeed(*command.split(), "--lr", 5, "--epochs", 1)


PUBLISHED = "--lr 30 --bias-lr 1 --decoder-bias zeros --alpha 2 --beta 1"
GRU = "--lr 10 --bias-lr 0.02 --decoder-bias unigram --alpha 0.5 --beta 0.25"
SLOW_BIASES = "--lr 30 --bias-lr 0.01 --decoder-bias unigram --alpha 2 --beta 1"
FAST = (
    "--epochs 4 --optimizer adamw --lr 3e-3 --wdecay 0.075 --schedule trapezoid --bias-lr 1 "
    "--decoder-bias unigram --batch_size 20 --regularization-ramp 0.3 12 --partial-shuffle "
    "--alpha 2 --beta 1"
)
FAST_GRU = f"{FAST} --lr 1e-3 --alpha 0.5 --beta 0.25"


@pytest.mark.parametrize(("flags", "recipe", "all_flags"), [
    ("", "published", PUBLISHED),
    ("--model biLSTM", "published", PUBLISHED),
    ("--model QRNN", "published", PUBLISHED),
    ("--model biLM", "slow-biases", SLOW_BIASES),
    ("--model biLM --lr 5", "slow-biases", SLOW_BIASES),
    ("--attention single", "slow-biases", SLOW_BIASES),
    ("--attention single --model GRU", "gru", GRU),
    ("--model GRU", "gru", GRU),
    # A flag changes what it names and nothing else.
    ("--model GRU --lr 30", "gru", GRU),
    ("--model GRU --bias-lr 0.5 --decoder-bias zeros --alpha 3", "gru", GRU),
    ("--model GRU --recipe published", "published", PUBLISHED),  # as in the report
    ("--model GRU --recipe slow-biases", "slow-biases", SLOW_BIASES),
    # Other optimizers have rates of their own.
    ("--model biLM --optimizer adam", "published", f"{PUBLISHED} --lr 1e-3"),
    ("--model GRU --optimizer adamw", "published", f"{PUBLISHED} --lr 5e-3 --wdecay 0.02"),
    ("--model GRU --optimizer adamw --lr 1e-4", "published", f"{PUBLISHED} --wdecay 0.02"),
    ("--recipe gru --optimizer adam", "gru", f"{GRU} --lr 1e-3 --bias-lr 1"),
    ("--recipe fast --epochs 4", "fast", FAST),
    ("--recipe fast --epochs 4 --beta 0 --lr 1", "fast", FAST),
    ("--recipe fast-gru --model GRU --epochs 9", "fast-gru", FAST_GRU),
])
def test_a_recipe_is_the_flags_that_it_sets(flags, recipe, all_flags):
    found, _ = main.parse_args([*flags.split(), "--save", "m.pt"])
    # The same without a recipe, spelled out, but for what is given.
    spelled_out = [*all_flags.split(), *flags.split(), "--save", "m.pt", "--recipe", "published"]
    expected, _ = main.parse_args(spelled_out)
    assert vars(found) == {**vars(expected), "recipe": recipe}


def test_a_lost_connection_between_processes_is_no_bug():
    error = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed")
    assert error_line(error).startswith("the processes cannot communicate: ")


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for gpus in (2, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        args = Namespace(cuda=False, device=None)
        if gpus == 1:
            with pytest.raises(InputError, match="--nproc_per_node: this machine has 1 CUDA"):
                resolve_device(args)
        else:
            resolve_device(args)
            assert args.device == torch.device("cuda:1")


def test_other_job_managers_are_not_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert (distributed.size(), distributed.rank()) == (1, 0)
