"""What main.py and finetune.py say to bad input: one line, exit code 2, nothing lost."""

import re
import shutil
import zipfile

import pytest
import torch

import finetune
import main
from conftest import invoke

BAD_FLAGS = [
    (["--model", "QRNN"], "--model: model QRNN is not supported yet; choose from LSTM"),
    (["--model", "lstm2"], "--model: model lstm2 is unknown"),
    (["--emsize", "-5"], "--emsize: must be a whole number in [1, 2.14748e+09), not -5"),
    (["--nhid", "0"], "--nhid: must be"),
    (["--nlayers", "two"], "--nlayers: 'two' is not a whole number"),
    (["--batch_size", "0"], "--batch_size: must be"),
    (["--bptt", "-1"], "--bptt: must be"),
    (["--epochs", "0"], "--epochs: must be"),
    (["--dropout", "1"], r"--dropout: must be a number in [0, 1), not 1"),
    (["--wdrop", "-0.1"], "--wdrop: must be a number in [0, 1)"),
    (["--dropouti", "nan"], "--dropouti: must be"),
    (["--lr", "0"], "--lr: must be a number in (0, 1e+30)"),
    (["--clip", "-1"], "--clip: must be"),
    (["--seed", "-1"], "--seed: must be"),
    (["--device", "tpu"], "--device: must be cpu, cuda, cuda:N or mps"),
    (["--model", "biLSTM", "--nhid", "13"], "--nhid 13 is odd"),
    (["--model", "biLSTM", "--emsize", "13"], "--emsize 13 is odd"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--save", "absent/m.pt"], "--save absent/m.pt: the folder absent does not exist"),
    (["--save", "."], "--save .: is a folder"),
    (["--save", "new/"], "--save new/: is a folder"),
    (["--save", "n" * 240], "cannot be written (File name too long)"),
    (["--save", "notes.txt"], "notes.txt exists and is no checkpoint"),
    (["--save", "archive.zip"], "archive.zip exists and is no checkpoint"),
    (["--save", "run"], "run.jsonl exists and is no run's record"),
    (["--save", "run2"], "run2.jsonl exists and is no run's record"),
    (["--save", "s.pt"], "s.pt.state exists and is no training state"),
    (["--save", "l.pt"], "l.pt.lock exists and is no lock"),
    (["--checkpoint-minutes", "0"], "--checkpoint-minutes: must be a number above 0"),
    (["--on-divergence", "pray"], "--on-divergence: invalid choice: 'pray'"),
    (["--save", "w.pt", "--when", "3", "1"], "w.pt.e1 exists and is no checkpoint"),
    (["--device", "cpu:1"], "--device: must be cpu, cuda, cuda:N or mps"),
    (["--lr", "1e39"], "--lr: must be a number in (0, 1e+30), not 1e39"),
    (["--wdecay", "1e300"], "--wdecay: must be a number in [0, 1e+30)"),
    (["--nhid", "100000000000"], "--nhid: must be a whole number in [1, 2.14748e+09)"),
    (["--nhid", "2000000"], "out of memory; lower"),
    (["--data", "absent"], "train.txt: no such file; --data wants a folder"),
    (["--batch_size", "5000"], "--batch_size 5000: the training split has 1250 tokens"),
    (["--resume", "absent.pt"], "absent.pt: no such checkpoint"),
    (["--resume", "notes.txt"], "notes.txt: is damaged, or no checkpoint of main.py"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_FLAGS)
def test_bad_input_is_one_line_and_writes_nothing(
    argv, message, corpus_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "run.jsonl", "w.pt.e1", "s.pt.state", "l.pt.lock"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "run2.jsonl").mkdir()
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("precious", "precious")
    archived = (tmp_path / "archive.zip").read_bytes()
    before = sorted(tmp_path.rglob("*"))
    status, out, err = invoke(main.main, "--data", corpus_dir, *argv)
    assert status == 2
    assert err.startswith("main.py: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "end of epoch" not in out
    assert sorted(tmp_path.rglob("*")) == before
    for name in ("notes.txt", "run.jsonl", "w.pt.e1", "s.pt.state", "l.pt.lock"):
        assert (tmp_path / name).read_text() == "precious"
    assert (tmp_path / "archive.zip").read_bytes() == archived


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("argv", [["--cuda"], ["--device", "cuda"], ["--device", "cuda:1"]])
def test_cuda_where_there_is_none(argv, corpus_dir):
    status, _, err = invoke(main.main, "--data", corpus_dir, *argv)
    assert (status, err.count("\n")) == (2, 1)
    assert argv[0] in err


def test_finetune_names_what_does_not_fit(trained, corpus_dir, tmp_path):
    status, _, err = invoke(finetune.main, "--save", trained, "--nhid", 20)
    assert status == 2
    assert "--nhid 20" in err
    assert "nhid 12" in err
    other = tmp_path / "other"
    shutil.copytree(corpus_dir, other)
    (other / "train.txt").write_text("quite another text\n" * 40)
    status, _, err = invoke(finetune.main, "--save", trained, "--data", other)
    assert status == 2
    assert "vocabulary" in err
    status, _, err = invoke(finetune.main)
    assert status == 2
    assert "--save" in err


def test_a_diverging_run_says_so(cli, corpus_dir, small):
    done = cli("main.py", "--data", corpus_dir, *small, "--clip", 0, "--lr", 1e29,
               "--save", "m.pt")
    assert done.returncode == 2
    assert re.fullmatch(
        r"main\.py: error: epoch 1, lr 1e\+29: the loss is (nan|inf) at batch \d+; try a lower "
        r"--lr or --clip 0\.25; no model was saved; python main\.py --resume m\.pt --lr 5e\+28 "
        r"goes on from the last good state \(epoch 1, batch 0\)\n", done.stderr,
    )
    assert [path.name for path in cli.folder.iterdir()] == ["m.pt.state"]
