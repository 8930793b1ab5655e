"""Mutation check: plants known faults one at a time and runs the test that should catch each.

    python tests/faults.py                # all of them
    python tests/faults.py NAME ...       # some of them
    python tests/faults.py --list

A fault is one edit: a text that occurs exactly once in its file, and its replacement. The script
works in a temporary copy of the tracked files. It first checks that the tests pass without a
fault. It prints one line a fault and a total; the exit status is 1 if a fault was not caught, and
2 if a fault no longer matches the code or a test fails without one.
"""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch  # noqa: F401 - imported once for all runs
from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds for one run of pytest


class Fault(NamedTuple):
    file: str
    old: str  # occurs exactly once in the file
    new: str
    test: str  # that catches it, as pytest names it, relative to tests/


LSTM = "test_golden.py::test_a_run_matches_the_restatement[LSTM]"
GRU = "test_golden.py::test_a_run_matches_the_restatement[GRU]"
RESUMED = "test_schedule.py::test_it_goes_on_at_the_very_place"
TWO_RANKS = (
    "test_parallel.py::test_a_run_of_two_ranks_is_that_of_one[LSTM --attention single]"
)

FAULTS = {
    # ------------------------------------------------------------ text and windows
    "batchify: wrong axis": Fault(
        "data.py", "data[: rows * bsz].view(bsz, rows).t()", "data[: rows * bsz].view(rows, bsz)",
        "test_data.py::test_batchify_lays_columns_side_by_side"),
    "windows: one token skipped between them": Fault(
        "trainer.py", "self.row += len(data)", "self.row += len(data) + 1",
        "test_trainer.py::test_an_epoch_trains_on_every_token_once"),
    "windows: generator not seeded": Fault(
        "run.py", "np.random.seed(args.seed)", "np.random.seed()", LSTM),
    # ------------------------------------------------------------ the model
    "tied weights untied": Fault(
        "model.py", "self.decoder.weight = self.encoder.weight",
        "self.decoder.weight.data.copy_(self.encoder.weight.data)",
        "test_model.py::test_published_parameter_counts"),
    "decoder bias not initialized": Fault(
        "main.py", 'if args.decoder_bias == "unigram":', 'if args.decoder_bias == "none":',
        "test_commands.py::test_the_decoders_bias_begins_where_it_was_asked_to"),
    "weight drop: the kernel gets the raw weights": Fault(
        "weight_drop.py", "weights[name] = drop_weight(", "_ = drop_weight(",
        "test_regularizers.py::test_weight_drop_is_what_the_kernel_computes_with"),
    "weight drop in evaluation": Fault(
        "weight_drop.py", "if self.training and self.dropout:", "if self.dropout:", GRU),
    "locked dropout: one mask a time step": Fault(
        "locked_dropout.py", "x.new_empty(1, x.size(1), x.size(2))", "x.new_empty(x.shape)", GRU),
    "embedding dropout: elements instead of words": Fault(
        "embed_regularize.py", "embed.weight.new_empty(embed.weight.size(0), 1)",
        "embed.weight.new_empty(embed.weight.shape)",
        "test_regularizers.py::test_embedded_dropout_is_a_masked_embedding_matrix"),
    "GRU: gradient of the update gate one step late": Fault(
        "gru.py", "torch.mul(hs[:-1] - n, z * (1 - z)", "torch.mul(hs[1:] - n, z * (1 - z)",
        "test_gru.py::test_outputs_and_gradients_are_torchs"),
    "cell: input and forget gate swapped": Fault(
        "cells.py", "c = f.sigmoid() * c + i.sigmoid() * g.tanh()",
        "c = i.sigmoid() * c + f.sigmoid() * g.tanh()", "test_cells.py::test_a_cell_is_its_layer"),
    "attention: sees its own state": Fault(
        "attention.py", "index = torch.arange(steps, device=states.device).unsqueeze(1)",
        "index = torch.arange(1, steps + 1, device=states.device).unsqueeze(1)",
        "test_attention.py::test_it_is_the_definition_whatever_the_windows_read"),
    "biLM: cloze prediction reads its answer": Fault(
        "bidirectional.py", "after[at + 2]", "after[at + 1]",
        "test_bidirectional.py::test_evaluation_is_over_the_whole_text"),
    # ------------------------------------------------------------ one step
    "split softmax: wrong end of a tail": Fault(
        "splitcross.py", "(targets >= start) & (targets < end)",
        "(targets >= start) & (targets <= end)", "test_splitcross.py::test_distribution_and_loss"),
    "hidden state not detached": Fault(
        "hidden.py", "        return h.detach()\n", "        return h\n",
        "test_trainer.py::test_the_hidden_state_is_carried_from_window_to_window_without"
        "_its_history"),
    "learning rate not scaled by the window": Fault(
        "train.py", "rate * rate_share * len(data) / args.bptt", "rate * rate_share", LSTM),
    "clipping reversed": Fault("train.py", "    if args.clip:\n", "    if not args.clip:\n", LSTM),
    "TAR: wrong axis": Fault(
        "train.py", "(raw_output[1:] - raw_output[:-1])",
        "(raw_output[:, 1:] - raw_output[:, :-1])", LSTM),
    # ------------------------------------------------------------ averaging, trigger, evaluation
    "average: steps counted twice": Fault(
        "train.py", "        self.count += 1\n", "        self.count += 2\n", LSTM),
    "trigger: compares with the last n epochs": Fault(
        "train.py", "min(logs[: len(logs) - nonmono])", "min(logs[-nonmono:])", LSTM),
    "evaluation divides by rows": Fault(
        "train.py", "output[:count], window[:count]), count)",
        "output[:count], window[:count]), len(output) // width)", LSTM),
    "evaluation drops the tail": Fault(
        "train.py", "n = rows * width + min(max(rest - mine.start, 0), width)", "n = rows * width",
        LSTM),
    # ------------------------------------------------------------ flags
    "preset not applied": Fault(
        "recipes.py", "if not hasattr(given, flag)}\n    return {**settings,",
        "if hasattr(given, flag)}\n    return {**settings,",
        "test_schedule.py::test_what_the_short_recipe_sets_and_that_a_given_flag_wins"),
    "bad flag accepted": Fault(
        "flags.py", "rate = number(float, 0, 1)", "rate = number(float, 0, 2)",
        "test_bad_input.py::test_bad_input_is_one_line_and_writes_nothing"),
    # ------------------------------------------------------------ files, resuming, signals, ranks
    "seal not checked": Fault(
        "files.py", "if not is_sealed(content):", "if not content:",
        "test_files.py::test_a_flipped_bit_of_a_tensor_loads_silently_in_torch_but_not_here"),
    "lock not exclusive": Fault(
        "files.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "test_files.py::test_a_held_path_is_refused_with_the_holders_process_id_until_it_dies"),
    "write not atomic": Fault(
        "files.py", "os.replace(temporary, target)", "target.write_bytes(content)",
        "test_files.py::test_file_and_folder_are_synced_before_and_after_the_rename"),
    "resume: generator not restored": Fault(
        "resume.py", 'torch.set_rng_state(state["torch"])', 'state["torch"]',
        "test_resume.py::test_generators_go_on_from_where_they_were"),
    "resume: hidden state not restored": Fault(
        "trainer.py", 'copy_hidden(state["hidden"], args.device)',
        "model.init_hidden(args.batch_size) if self.row else None", RESUMED),
    "resume: position not restored": Fault(
        "trainer.py", "setattr(self, name, state[name])",
        'setattr(self, name, min(1, state[name]) if name == "row" else state[name])', RESUMED),
    "resume: best loss not restored": Fault(
        "trainer.py", "for name in self.PROGRESS:", "for name in self.PROGRESS[:4]:",
        "test_resume.py::test_interrupted_anywhere_and_resumed_it_is_the_same_run"
        "[12-False-sgd-LSTM-none]"),
    "signal not handled": Fault(
        "preemption.py", "signal.signal(number, self._handle)", "signal.getsignal(number)",
        "test_preemption.py::test_the_first_signal_saves_and_says_how_to_resume[SIGTERM-143]"),
    "ranks: columns overlap": Fault(
        "parallel.py", "slice(count * rank() // size(), count *",
        "slice(count * rank() // (2 * size()), count *", TWO_RANKS),
    "ranks: loss not averaged": Fault(
        "parallel.py", "        loss /= size()\n", "        loss /= 1\n", TWO_RANKS),
    # ------------------------------------------------------------ using a model, reporting
    "cache: attends to the next word": Fault(
        "pointer.py", "all_words[:-1].unfold(", "all_words[1:].unfold(",
        "test_pointer.py::test_it_is_the_restatement"),
    "cache: lambda reversed": Fault(
        "pointer.py", "logprob + math.log1p(-lambdasm), p_cache.log() + share",
        "logprob + share, p_cache.log() + math.log1p(-lambdasm)",
        "test_pointer.py::test_it_is_the_restatement"),
    "dynamic evaluation: decay after the step": Fault(
        "dynamic_evaluation.py", "weight.lerp_(self.trained[i], self.decays[i]).add_(change)",
        "weight.add_(change).lerp_(self.trained[i], self.decays[i])",
        "test_dynamic_evaluation.py::test_it_is_the_restatement"),
    "generation: nucleus one word too small": Fault(
        "generate.py", "ranked.cumsum(-1) - ranked  #", "ranked.cumsum(-1)  #",
        "test_generate.py::test_truncation"),
    "benchmark: baseline of other widths": Fault(
        "bench.py",
        "[args.emsize] + [args.nhid] * (args.nlayers - 1) + [args.emsize]\n        self.",
        "[args.emsize] * (args.nlayers + 1)\n        self.",
        "test_bench.py::test_the_baseline_is_the_same_model"),
    "results: an infinite perplexity is the best": Fault(
        "results.py", "math.inf if math.isnan(ppl) else ppl", "0 if math.isnan(ppl) else ppl",
        "test_reproduce.py::test_an_epoch_with_an_infinite_perplexity_is_not_the_best"),
}


def occurs_once(fault):
    """Whether the fault still matches the code."""
    return (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) == 1


def copy_tracked(folder):
    """Copies the tracked files, as they are in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder, tests):
    """Runs tests in the copy until one fails: (exit status, the names of those that failed)."""
    report = folder / "report.txt"
    child = multiprocessing.get_context("fork").Process(target=in_child, args=[report, tests])
    child.start()
    child.join(LIMIT)
    if child.exitcode is None:
        child.kill()
        child.join()
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::\S+)", report.read_text(), re.MULTILINE)
    return child.exitcode, failed


def in_child(report, tests):
    """Runs pytest in this process, a fork, so that torch need not be imported again each time."""
    os.chdir(report.parent / "tests")
    sys.path.remove(str(ROOT / "tests"))  # the copy has its own
    # No compiled files: a stale one could hide a fault.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000"}
    # A failing example is enough; hypothesis need not look for a smaller one.
    settings.register_profile("faults", phases=[Phase.explicit, Phase.generate])
    settings.load_profile("faults")
    with open(report, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-rfE", *tests])
        sys.stdout.flush()
    os._exit(status)


def main(names):
    if names == ["--list"]:
        print("\n".join(f"{fault.file:22s} {name}" for name, fault in FAULTS.items()))
        return 0
    if unknown := [name for name in names if name not in FAULTS]:
        print(f"faults.py: error: no fault is called {', '.join(unknown)}; see --list")
        return 2
    chosen = {name: FAULTS[name] for name in names or FAULTS}
    if stale := [name for name, fault in chosen.items() if not occurs_once(fault)]:
        print(f"faults.py: error: no longer in the code: {', '.join(stale)}")
        return 2
    begin, missed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_tracked(folder)
        tests = dict.fromkeys(fault.test for fault in chosen.values())
        status, failed = run_tests(folder, tests)
        if status != 0:
            print(f"faults.py: error: without a fault: {' '.join(failed) or f'status {status}'}")
            return 2
        seconds = time.monotonic() - begin
        print(f"without a fault: {len(tests)} tests pass ({seconds:.0f} s)", flush=True)
        for name, fault in chosen.items():
            start, path = time.monotonic(), folder / fault.file
            whole = path.read_text(encoding="utf-8")
            path.write_text(whole.replace(fault.old, fault.new), encoding="utf-8")
            status, failed = run_tests(folder, [fault.test])
            path.write_text(whole, encoding="utf-8")
            caught = status == 1 and failed  # another status: no such test, time limit, ...
            missed += not caught
            verdict = f"caught by {failed[0]}" if caught else f"NOT CAUGHT (pytest: {status})"
            seconds = time.monotonic() - start
            print(f"{fault.file}: {name}: {verdict} ({seconds:.1f} s)", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught, {time.monotonic() - begin:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
