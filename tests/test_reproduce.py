"""The report as a program: its commands, its results, a run that is interrupted."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import torch

import main
import reproduce
import results
from conftest import ROOT, invoke
from data import InputError
from experiments import EXPERIMENTS, PAIRS, SCALES
from kill_loop import lines

pytest.importorskip("matplotlib", reason="requirements-plot.txt is not installed")

DROPOUTS = {  # dropouti, dropouth
    "ptb-lstm": (0.4, 0.25), "ptb-lstm-lightly-regularized": (0, 0), "ptb-gru-3": (0.4, 0.25),
    "ptb-gru-5": (0.3, 0.25), "ptb-bilstm": (0.4, 0.25), "wt2-lstm": (0.65, 0.2),
    "wt2-lstm-lightly-regularized": (0.65, 0), "wt2-gru-3": (0.65, 0.2), "wt2-bilstm": (0.65, 0.2),
}
REPORTS = [name for name, experiment in EXPERIMENTS.items() if experiment.parameters]


def test_the_eleven_experiments_of_the_report():
    assert len(REPORTS) == 11
    assert set(results.read_report()) == set(REPORTS)
    for corpus, _, kinds in PAIRS:
        assert all(f"{corpus}-{kind}" in EXPERIMENTS for kind in kinds)


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if EXPERIMENTS[n].base is None])
def test_at_full_scale_a_command_is_the_published_one(name):
    args = main.parse_args(reproduce.command(name, "full", "PTB.pt")[1:])
    ptb, report = name.startswith("ptb"), EXPERIMENTS[name].parameters
    expected = {
        "emsize": 400, "nhid": 1150, "bptt": 70, "clip": 0.25, "dropout": 0.4, "dropoute": 0.1,
        "wdrop": 0.5, "alpha": 2, "beta": 1, "wdecay": 1.2e-6, "nonmono": 5, "save": "PTB.pt",
        "batch_size": 20 if ptb else 80, "seed": 141 if ptb else 1882,
        "epochs": 500 if ptb else 750, "data": "data/penn" if ptb else "data/wikitext-2",
        "nlayers": 5 if "gru-5" in name else 3,
    }
    if "gru" in name and not report:
        expected |= {"lr": 10, "bias_lr": 0.02, "alpha": 0.5, "beta": 0.25}
    if report:
        expected |= {"lr": 30, "bias_lr": 1, "decoder_bias": "zeros"}
        expected |= dict(zip(("dropouti", "dropouth"), DROPOUTS[name]))
    if name == "ptb-bilstm":
        expected["epochs"] = 12  # the report stopped it there
    if "gru" in name and report:  # keeps its divergence
        expected["on_divergence"] = "continue"
    assert {key: getattr(args, key) for key in expected} == expected


@pytest.mark.parametrize("scale", SCALES)
def test_every_command_of_every_scale_is_understood(scale):
    for name, experiment in EXPERIMENTS.items():
        argv = reproduce.command(name, scale, "model.pt")
        if experiment.base:
            assert argv[0] == "finetune.py"
        else:
            main.parse_args(argv[1:])
    only = ["--only", "wt2-lstm-finetune"]
    status, out, _ = invoke(reproduce.main, "--list", "--scale", scale, *only)
    assert status == 0
    assert out.count("  wt2-lstm: python main.py ") == 1
    assert out.index("wt2-lstm:") < out.index("wt2-lstm-finetune:")


def test_what_fine_tunes_a_model_runs_after_it_and_the_rest_beside():
    names = reproduce.with_bases(["ptb-gru-3", "ptb-lstm-finetune", "ptb-lstm"])
    assert names == ["ptb-gru-3", "ptb-lstm", "ptb-lstm-finetune"]
    assert reproduce.chains(names) == [["ptb-gru-3"], ["ptb-lstm", "ptb-lstm-finetune"]]


# ------------------------------------------------------------ running

MICRO = """
import sys
import experiments, flags, reproduce
experiments.SCALES["tiny"] = experiments.Scale(
    "micro", "--data {data} --emsize 8 --nhid 12 --nlayers 2 --batch_size 4 --bptt 10 --lr 5",
    dict.fromkeys(["ptb", "wt2"], {epochs}), dict.fromkeys(["ptb", "wt2"], 2),
    dict.fromkeys(["ptb", "wt2"], 1), "here",
)
flags.run(reproduce.main)
"""


@pytest.fixture
def begin(tmp_path, corpus_dir):
    """A function that starts reproduce.py, with small runs, in a process of its own."""
    started = []

    def start(*argv, epochs=3):
        script = tmp_path / "micro.py"
        script.write_text(MICRO.format(data=corpus_dir, epochs=epochs))
        started.append(subprocess.Popen(
            [sys.executable, str(script), *map(str, argv)], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        ))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def outcome(out):
    """What the runs have left, without times: the epochs of each, and its end."""
    found = {str(p.relative_to(out)): lines(p.read_text()) for p in out.glob("runs/*/*.jsonl")}
    return found | {
        str(p.relative_to(out)): {**json.loads(p.read_text()), "command": None}
        for p in out.glob("runs/*/done.json")
    }


def test_killed_and_started_again_it_ends_with_the_same_result(begin, tmp_path):
    names = "ptb-lstm-finetune,ptb-bilm,wt2-gru-3"
    process = begin("--only", names, "--out", "whole", "--devices", "cpu", "cpu")
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, ""), out
    whole = outcome(tmp_path / "whole")
    assert len(whole) == 8
    text = (tmp_path / "whole" / "README.md").read_text()
    assert "not run yet" not in text
    for part in ("forward", "backward", "cloze"):
        cells = text.split(f"biLM, all three losses: {part} |")[1].splitlines()[0].split(" | ")
        log = (tmp_path / "whole/runs/ptb-bilm/log.txt").read_text()
        ended = log.split("End of training")[1].split(f"| {part}")[1].splitlines()[0]
        assert f" ppl {float(cells[3]):8.2f} |" in ended
        valid = [e[f"{part}_ppl"] for e in lines((
            tmp_path / "whole/runs/ptb-bilm/model.pt.jsonl").read_text())]
        assert float(cells[0]) in [round(ppl, 2) for ppl in valid]
    for number in (1, 2, 3, 4, 7, 8, 9, 10):
        assert (f"(figure-{number}.png)" in text) == (number not in (3, 4))
        assert (tmp_path / "whole" / f"figure-{number}.svg").exists() == (number not in (3, 4))

    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None):
        process = begin("--only", names, "--out", "parts")
        process.stdout.readline()  # its signals' handlers are there; a run of the killed may end
        done = tmp_path / "parts" / "runs"
        before = len(list(done.glob("*/done.json"))), len(list(done.glob("*/*.state")))
        while number and process.poll() is None:
            after = len(list(done.glob("*/done.json"))), len(list(done.glob("*/*.state")))
            if after != before:
                process.send_signal(number)
                break
            time.sleep(0.02)
        out, err = process.communicate(timeout=240)
        if process.returncode == 0:
            assert number is None, f"ended before {number}"
            break
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), err
    assert (process.returncode, err) == (0, "")
    assert outcome(tmp_path / "parts") == whole


def test_runs_side_by_side_on_a_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    for devices, threads in (
        (["cpu"], None), (["cpu"] * 2, "3"), (["cpu"] * 4, "1"), (["cpu"] * 9, "1"),
        (["cuda:0", "cuda:1"], None),
    ):
        devices = list(map(torch.device, devices))
        found = reproduce.Runner(Path("out"), "tiny", [], devices).threads()
        assert found.get("OMP_NUM_THREADS") == threads
    if not torch.cuda.is_available():
        assert reproduce.parse_args([]).devices == [torch.device("cpu")] * 2
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)
        assert reproduce.parse_args([]).devices == [torch.device("cpu")]


def test_a_run_that_fails_is_named_and_the_others_go_on(begin, tmp_path):
    folder = tmp_path / "out" / "runs" / "ptb-lstm"
    folder.mkdir(parents=True)
    (folder / "model.pt").write_text("mine")
    (folder.parent / "scale").write_text("tiny\n")
    process = begin("--only", "ptb-lstm-finetune,ptb-gru-3", "--out", "out", epochs=1)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert err.startswith(
        "reproduce.py: error: ptb-lstm: exit status 2, see out/runs/ptb-lstm/log.txt: main.py: "
        "error: --save out/runs/ptb-lstm/model.pt: out/runs/ptb-lstm/model.pt exists and is no"
    )
    assert len(err.splitlines()) == 1
    assert (folder / "model.pt").read_text() == "mine"
    assert not (tmp_path / "out" / "runs" / "ptb-lstm-finetune").exists()
    done = tmp_path / "out" / "runs" / "ptb-gru-3" / "done.json"
    assert json.loads(done.read_text())["command"][-1] == "out/runs/ptb-gru-3/model.pt"

    # A damaged record of an end is named; without it the run is only tested again.
    again = "--only", "ptb-gru-3", "--out", "out"
    before = done.read_bytes()
    whole = json.loads(before)
    for damaged in (
        b"{", b"{}", b"\377", *(
            json.dumps({**whole, key: wrong}).encode()
            for key, wrong in (("test_ppl", "x"), ("parameters", None), ("parts", []))
        )
    ):
        done.write_bytes(damaged)
        _, err = begin(*again, epochs=1).communicate(timeout=240)
        assert "out/runs/ptb-gru-3/done.json: is damaged; remove it" in err
        assert len(err.splitlines()) == 1
    done.unlink()
    process = begin(*again, epochs=1)
    assert (process.wait(240), done.read_bytes()) == (0, before)


def test_what_a_run_warns_of_is_said_at_once(tmp_path, capsys):
    runner = reproduce.Runner(tmp_path, "tiny", [], [])
    runner.folder("ptb-lstm").mkdir(parents=True)
    with open(runner.folder("ptb-lstm") / "log.txt", "w") as log:
        print("Warning: of a run before", file=log, flush=True)
        position = log.tell()
        child = subprocess.Popen(
            [sys.executable, "-uc", "print('epoch 1'); print('Warning: full'); input(); exit(2)"],
            stdin=subprocess.PIPE, stdout=log, stderr=log,
        )
        ended = []
        waiting = Thread(target=lambda: ended.append(runner.wait("ptb-lstm", child, position)))
        waiting.start()
        said = ""
        while not said and waiting.is_alive():
            time.sleep(0.1)
            said = capsys.readouterr().err
        child.communicate(b"\n")
        waiting.join()
    assert (said, ended) == ("ptb-lstm: Warning: full\n", [2])
    assert capsys.readouterr().err == ""


def test_a_base_that_is_gone_or_no_folder_is_named(tmp_path):
    runner = reproduce.Runner(tmp_path, "tiny", [], [])
    with pytest.raises(InputError, match=r"ptb-lstm/model.pt: is gone; remove .*, and ptb-lstm is"):
        runner.next_command("ptb-lstm-finetune")
    (tmp_path / "runs" / "ptb-gru-3").write_text("mine")
    with pytest.raises(InputError, match=r"runs/ptb-gru-3: is no folder; remove it"):
        runner.next_command("ptb-gru-3")


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small" / "runs").mkdir(parents=True)
    (tmp_path / "small" / "runs" / "scale").write_text("small\n")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "damaged" / "runs").mkdir(parents=True)
    (tmp_path / "damaged" / "runs" / "scale").write_bytes(b"\377\376")
    for argv, message in [
        (["--only", "ptb-lstm,ptb-rnn"], "--only ptb-rnn: there are ptb-lstm, "),
        (["--scale", "full"], "--scale full: data/penn is absent, or not whole; ./getdata.sh"),
        (["--out", "small"], "--out small: holds runs at --scale small; name another folder"),
        (["--out", "."], "--out .: holds something else; name another folder, or a new one"),
        (["--out", "README.md"], "--out README.md: holds something else; name another folder"),
        (["--out", "damaged"], "damaged/runs/scale: names no scale; write full, small, tiny into"),
        (["--out", "/proc/x"], "--out /proc/x: cannot be written ("),
        (["--only", ""], "--only : there are ptb-lstm, "),
        (["--devices", "cpu", "gpu"], "--devices: must be cpu, cuda, cuda:N or mps, not 'gpu'"),
    ]:
        status, _, err = invoke(reproduce.main, *argv)
        assert status == 2
        assert message in err
        assert len(err.splitlines()) == 1
    assert (tmp_path / "README.md").read_text() == "mine"
    monkeypatch.setattr(reproduce, "find_spec", lambda name: None)
    status, _, err = invoke(reproduce.main, "--out", "new")
    assert (status, err) == (2, "main.py: error: matplotlib is not installed; pip install -r "
                                "requirements-plot.txt\n")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------ results


def test_fine_tuning_has_the_seed_of_its_base():
    for corpus, seed in (("ptb", "141"), ("wt2", "1882")):
        argv = reproduce.command(f"{corpus}-lstm-finetune", "full", "PTB.pt")
        assert argv == ["finetune.py", "--epochs", argv[2], "--seed", seed, "--save", "PTB.pt"]


def test_runs_without_a_finite_loss_have_a_table_and_no_figure(tmp_path):
    folder = tmp_path / "runs" / "ptb-gru-3"
    folder.mkdir(parents=True)
    epoch = {"epoch": 1, "seconds": 9.0, "valid_ppl": None, "valid_loss": None, "train_loss": None}
    (folder / "model.pt.jsonl").write_text(json.dumps(epoch) + "\n")
    results.write_results(tmp_path, "small", ["ptb-gru-3"])
    text = (tmp_path / "README.md").read_text()
    assert "infinite (epoch 1 of 1 so far)" in text
    assert "![" not in text
    assert "Made by `python reproduce.py --scale small --only ptb-gru-3`." in text


def test_what_is_of_another_run_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.Runner, "run", lambda self: pytest.fail("it ran"))
    folder = tmp_path / "out" / "runs" / "ptb-lstm"
    folder.mkdir(parents=True)
    (folder.parent / "scale").write_text("tiny\n")
    found = {"command": ["python"], "parameters": 1, "test_ppl": 2.0, "parts": {}}
    for parts in ({}, {"forward": 2.0}):
        (folder / "done.json").write_text(json.dumps({**found, "parts": parts}))
        status, _, err = invoke(
            reproduce.main, "--only", "wt2-lstm", "--out", tmp_path / "out")
        assert (status, err.count("\n")) == (2, 1)
        assert f"model.pt.jsonl: is gone, or of another run; remove {folder}" in err
        (folder / "model.pt.jsonl").write_text('{"epoch": 1, "seconds": 1, "valid_ppl": 3}\n')


def test_bilms_validation_loss_is_drawn_apart_for_what_it_predicts():
    epochs = [{"valid_loss": 5.0, "train_loss": 4.0, "forward_ppl": 400.0, "cloze_ppl": None}]
    drawn = results.curves("ptb-bilm", epochs, "valid_loss")
    assert set(drawn) == {"biLM, forward", "biLM, cloze"}
    assert drawn["biLM, forward"][0]["valid_loss"] == pytest.approx(math.log(400))
    assert math.isnan(drawn["biLM, cloze"][0]["valid_loss"])
    assert results.curves("ptb-bilm", epochs, "train_loss") == {"biLM, all three losses": epochs}
    assert results.curves("ptb-lstm", [{"valid_loss": 5.0}], "valid_loss") == {
        "LSTM": [{"valid_loss": 5.0}]
    }


def test_the_sample_is_not_called_by_the_name_of_what_it_stands_for():
    assert results.title("ptb-lstm", "tiny") == "Sample as Penn Treebank, LSTM"
    assert results.title("wt2-lstm", "small") == "WikiText-2, LSTM"


def test_a_curve_that_departs_from_the_reports_says_so():
    report = [{"valid_ppl": ppl} for ppl in (300.0, 200.0, 150.0, 140.0)]
    near = [{"valid_ppl": ppl} for ppl in (329.0, 181.0, 150.0)]
    assert results.describe_departures(near, report) == (
        "within 10% of the report's curve at 3 of 3 epochs."
    )
    for value, shown in ((166.0, "166.00"), (134.0, "134.00"), (None, "infinite")):
        found = results.describe_departures([*near[:2], {"valid_ppl": value}], report)
        assert found.startswith("**more than 10% off the report's curve** at 1 of 3 epochs")
        assert f"first at epoch 3: {shown} against 150.00" in found


@pytest.mark.parametrize(
    ("ppls", "shown"),
    [([None, 9.0, 8.0], "8.00 (epoch 3 of 3"), ([7.0, None], "7.00 (epoch 1 of 2"),
     ([None], "infinite (epoch 1 of 1")],
)
def test_an_epoch_with_an_infinite_perplexity_is_not_the_best(ppls, shown):
    epochs = {"ptb-gru-3": [{"valid_ppl": ppl} for ppl in ppls]}
    text = results.perplexity_table(["ptb-gru-3"], epochs, {}, "full")
    assert f", GRU, 3 layers, rate 30 | {shown} so far) | 695.88 | not finished |" in text


@pytest.mark.parametrize("scale", ["full", "small"])
def test_only_at_full_scale_the_report_is_compared_and_drawn(scale, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(results, "draw", lambda *a, reference, title, **k: drawn.update(
        {title: reference}))
    monkeypatch.setattr(results, "save", lambda figure, path: None)
    folder = tmp_path / "runs" / "ptb-lstm"
    folder.mkdir(parents=True)
    epochs = [
        {"epoch": n, "seconds": 9.0, "valid_ppl": ppl, "valid_loss": 5.0, "train_loss": 5.0}
        for n, ppl in enumerate((326.98, 216.01, 250.0), 1)
    ]
    (folder / "model.pt.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs))
    found = {"scale": scale, "command": ["python", "x"], "parameters": 24221600, "test_ppl": 58.98}
    found["parts"] = {}
    (folder / "done.json").write_text(json.dumps(found))
    results.write_results(tmp_path, scale, ["ptb-lstm", "ptb-gru-3"])
    text = (tmp_path / "README.md").read_text()
    full = scale == "full"
    assert "| Penn Treebank, LSTM | 24,221,600 | 9.0 | 24,221,600 | 48 |" in text
    row = text.split("## Perplexities")[1].split("| Penn Treebank, LSTM |")[1].splitlines()[0]
    ratios = ("3.514", "1.000") if full else ("another scale",) * 2
    assert row == f" 216.01 (epoch 2 of 3) | 61.48 | {ratios[0]} | 58.98 | 58.98 | {ratios[1]} |"
    assert ("off the report's curve** at 1 of 3 epochs, first at epoch 3" in text) == full
    assert ("not comparable with the report's" in text) != full
    for reference in drawn.values():
        assert set(reference) >= {"LSTM"} if full else reference == {}
    assert len(drawn) == 2  # none of ours: figures 9 and 10 would be 1 and 2
    assert "| Penn Treebank, GRU, 3 layers, rate 30 | not run yet | not run yet | 19," in text
    (folder / "done.json").unlink()
    results.write_results(tmp_path, scale, ["ptb-lstm"])
    text = (tmp_path / "README.md").read_text()
    assert "| Penn Treebank, LSTM | not finished | 9.0 | 24,221,600 | 48 |" in text
    assert "of 3 so far) | 61.48 | " + ("not finished |" if full else "another scale |") in text
