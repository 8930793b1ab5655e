"""Mutation check: plants known faults one at a time and runs the test that should catch each.

    python tests/faults.py                # all of them
    python tests/faults.py NAME ...       # some of them; a name that is unknown lists them

A fault is one edit: a text that occurs exactly once in its file, and its replacement. The script
works in a temporary copy of the tracked files. It first checks that the tests pass without a
fault. It prints one line a fault and a total; the exit status is 1 if a fault was not caught, and
2 if a fault no longer matches the code or a test fails without one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds for one run of pytest


class Fault(NamedTuple):
    file: str
    old: str  # occurs exactly once in the file
    new: str
    test: str  # that catches it, as pytest names it, relative to tests/


LSTM = "test_golden.py::test_a_run_matches_the_restatement[LSTM]"
GRU = "test_golden.py::test_a_run_matches_the_restatement[GRU]"
RESUMED = "test_finetune.py::test_main_resumes_in_its_fine_tuning"
TWO_RANKS = "test_distributed.py::test_a_run_of_two_ranks_is_that_of_one"

FAULTS = {
    # ------------------------------------------------------------ text and windows
    "batchify: wrong axis": Fault(
        "data.py", "data[: rows * bsz].view(bsz, rows).t()", "data[: rows * bsz].view(rows, bsz)",
        "test_data.py::test_batchify_and_get_batch"),
    "windows: one token skipped between them": Fault(
        "train.py", "self.row += len(data)", "self.row += len(data) + 1", LSTM),
    "windows: generator not seeded": Fault(
        "utils.py", "np.random.seed(args.seed)", "np.random.seed()", LSTM),
    # ------------------------------------------------------------ QRNN
    "QRNN: f and 1 - f exchanged": Fault(
        "qrnn.py", "torch.lerp(cs[t], z[t], f[t], out=cs[t + 1])",
        "torch.lerp(z[t], cs[t], f[t], out=cs[t + 1])",
        "test_qrnn.py::test_a_layer_is_the_equations"),
    "QRNN: the last input is not carried on": Fault(
        "qrnn.py", "(c, x[-1:].detach())", "(c, last)",
        "test_qrnn.py::test_the_state_carries_the_text_on"),
    "QRNN: the first layer reads one word a step": Fault(
        "model.py", "window=1 if layer else 2", "window=1",
        "test_model.py::test_published_parameter_counts"),
    # ------------------------------------------------------------ the model
    "tied weights untied": Fault(
        "model.py", "self.decoder.weight = self.encoder.weight",
        "self.decoder.weight.data.copy_(self.encoder.weight.data)",
        "test_model.py::test_published_parameter_counts"),
    "decoder bias not initialized": Fault(
        "main.py", 'if args.decoder_bias == "unigram":', 'if args.decoder_bias == "none":',
        "test_main.py::test_the_decoders_bias_begins_at_the_words_frequencies"),
    "weight drop: the kernel gets the raw weights": Fault(
        "weight_drop.py", "parameters[name] = drop_weight(", "_ = drop_weight(",
        "test_weight_drop.py::test_it_is_torchs_layer_with_the_dropped_weights"),
    "weight drop in evaluation": Fault(
        "weight_drop.py", "if self.training and self.dropout:", "if self.dropout:", GRU),
    "locked dropout: one mask a time step": Fault(
        "locked_dropout.py", "x.new_empty(1, x.size(1), x.size(2))", "x.new_empty(x.shape)", GRU),
    "embedding dropout: elements instead of words": Fault(
        "embed_regularize.py", "embed.weight.new_empty(embed.weight.size(0), 1)",
        "embed.weight.new_empty(embed.weight.shape)",
        "test_embed_regularize.py::test_it_looks_up_a_masked_and_scaled_embedding_matrix"),
    "GRU: gradient of the update gate one step late": Fault(
        "cpu_kernels.py", "torch.mul((self.h[t] - n)", "torch.mul((self.h[t + 1] - n)",
        "test_cpu_kernels.py::test_a_layer_matches_torch"),
    "cell: input and forget gate swapped": Fault(
        "cpu_kernels.py", "c = f.sigmoid() * c + i.sigmoid() * g.tanh()",
        "c = i.sigmoid() * c + f.sigmoid() * g.tanh()",
        "test_cpu_kernels.py::test_a_cell_is_its_layer"),
    "attention: sees its own state": Fault(
        "attention.py", "index = torch.arange(steps, device=states.device).unsqueeze(1)",
        "index = torch.arange(1, steps + 1, device=states.device).unsqueeze(1)",
        "test_attention.py::test_it_is_the_definition_whatever_the_windows_read"),
    "biLM: cloze prediction reads its answer": Fault(
        "bidirectional.py", "after[places + 2]", "after[places + 1]",
        "test_bidirectional.py::test_evaluation_is_over_whole_columns"),
    # ------------------------------------------------------------ one step
    "split softmax: wrong end of a tail": Fault(
        "splitcross.py", "(targets >= start) & (targets < end)",
        "(targets >= start) & (targets <= end)",
        "test_splitcross.py::test_distribution_loss_and_gradients"),
    "hidden state not detached": Fault(
        "utils.py", "map_hidden(torch.Tensor.detach, h)", "map_hidden(torch.Tensor.clone, h)",
        LSTM),
    "graph: the new hidden state is lost": Fault(
        "cuda_graphs.py", "self.hidden, hidden)\n            return loss",
        "self.hidden, self.hidden)\n            return loss",
        "test_cuda_graphs.py::test_a_run_is_the_same_with_graphs"),
    "graph: the window is not copied": Fault(
        "cuda_graphs.py", "            old.copy_(new)\n", "            pass\n",
        "test_cuda_graphs.py::test_a_run_is_the_same_with_graphs"),
    "graph: kept when the regularizers change": Fault(
        "cuda_graphs.py", "if values != self.values:", "if self.values is None:",
        "test_cuda_graphs.py::test_graphs_are_made_anew_when_the_regularizers_change"),
    "ramp: rises within an epoch": Fault(
        "train.py", "math.floor(epochs)", "epochs",
        "test_train.py::test_the_ramp_reaches_every_regularizer"),
    "learning rate not scaled by the window": Fault(
        "train.py", "rate * lr_share * len(data) / args.bptt", "rate * lr_share", LSTM),
    "clipping reversed": Fault("train.py", "    if args.clip:\n", "    if not args.clip:\n", LSTM),
    "TAR: wrong axis": Fault(
        "model.py", "(raw_output[1:] - raw_output[:-1])",
        "(raw_output[:, 1:] - raw_output[:, :-1])", LSTM),
    # ------------------------------------------------------------ averaging, trigger, evaluation
    "average: steps counted twice": Fault(
        "train.py", "        self.count += 1\n", "        self.count += 2\n", LSTM),
    "trigger: compares with the last n epochs": Fault(
        "train.py", "valid_losses[: max(0, len(valid_losses) - nonmono)]",
        "valid_losses[-nonmono:]", LSTM),
    "evaluation divides by rows": Fault(
        "train.py", "targets.flatten()[:count]), count)", "targets.flatten()[:count]), len(data))",
        LSTM),
    "evaluation drops the tail": Fault(
        "data.py", "total = rows * width + min(max(rest - columns.start, 0), width)",
        "total = rows * width",
        LSTM),
    # ------------------------------------------------------------ flags
    "preset not applied": Fault(
        "flags.py", "**OPTIMIZER_DEFAULTS[optimizer], **preset,",
        "**OPTIMIZER_DEFAULTS[optimizer],",
        "test_flags.py::test_a_recipe_is_the_flags_that_it_sets"),
    "bad flag accepted": Fault(
        "flags.py", "fraction = number(float, 0, 1)", "fraction = number(float, 0, 2)",
        "test_flags.py::test_bad_input_is_one_line_and_changes_no_file"),
    # ------------------------------------------------------------ files, resuming, signals, ranks
    "seal not checked": Fault(
        "checkpoint.py", "if not is_sealed(content):", "if not content:",
        "test_checkpoint.py::test_a_flipped_bit_a_lost_end_or_foreign_bytes_are_refused"),
    "lock not exclusive": Fault(
        "checkpoint.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "test_checkpoint.py::test_a_path_is_refused_while_another_run_holds_it"),
    "write not atomic": Fault(
        "checkpoint.py", "os.replace(temporary, target)", "target.write_bytes(content)",
        "test_checkpoint.py::test_file_and_folder_are_synced_before_and_after_the_rename"),
    "resume: generator not restored": Fault(
        "utils.py", 'torch.set_rng_state(state["torch"])', 'state["torch"]',
        RESUMED),
    "resume: hidden state not restored": Fault(
        "train.py", "lambda h: h[:, self.columns].to(",
        "lambda h: torch.zeros_like(h)[:, self.columns].to(",
        RESUMED),
    "resume: position not restored": Fault(
        "train.py", "setattr(self, name, state[name])",
        'setattr(self, name, min(1, state[name]) if name == "row" else state[name])', RESUMED),
    "resume: best loss not restored": Fault(
        "train.py", "        for name in self.PROGRESS:\n",
        "        for name in self.PROGRESS[:4]:\n",
        RESUMED),
    "signal not obeyed": Fault(
        "utils.py", "        if number:\n            raise Preempted(number)",
        "        if not number:\n            raise Preempted(1)",
        "test_utils.py::test_the_first_signal_saves_and_says_how_to_resume"),
    "ranks: columns overlap": Fault(
        "distributed.py", "slice(count * rank() // size(), count *",
        "slice(count * rank() // (2 * size()), count *", TWO_RANKS),
    "ranks: loss not averaged": Fault(
        "distributed.py", "total(loss).div_(size())", "total(loss)", TWO_RANKS),
    # ------------------------------------------------------------ using a model, reporting
    "cache: attends to the next word": Fault(
        "pointer.py", "(age < 1)", "(age < 0)",
        "test_pointer.py::test_the_cache_matches_the_paper"),
    "cache: lambda reversed": Fault(
        "pointer.py", "logprob + math.log1p(-lambdasm), (lambdasm * p_cache)",
        "logprob + math.log(lambdasm), ((1 - lambdasm) * p_cache)",
        "test_pointer.py::test_the_cache_matches_the_paper"),
    "dynamic evaluation: decay after the step": Fault(
        "dynamic_evaluation.py",
        "weight.lerp_(trained, decay).addcdiv_(gradient, scale, value=-self.lr)",
        "weight.addcdiv_(gradient, scale, value=-self.lr).lerp_(trained, decay)",
        "test_dynamic_evaluation.py::test_the_update_matches_the_paper"),
    "generation: nucleus one word too small": Fault(
        "language_model.py", "ranked.cumsum(-1) - ranked  #", "ranked.cumsum(-1)  #",
        "test_language_model.py::test_truncation"),
    "resume: a changed run forgets its better model": Fault(
        "train.py", "min(self.best, checkpoint", "max(self.best, checkpoint",
        "test_resume.py::test_a_run_that_changes_keeps_its_better_model"),
    "resume: models of different texts are compared": Fault(
        "train.py", "if changed and comparable:", "if changed:",
        "test_finetune.py::test_the_base_models_loss_is_not_compared_with_that_on_other_text"),
    "resume: columns stay rotated": Fault(
        "train.py", "            offsets = None\n", "            offsets = self.offsets\n",
        "test_train.py::test_a_run_that_no_longer_shuffles_reads_from_the_first_row"),
    "resume: a new rate is divided": Fault(
        "train.py", 'if args.lr != state["flags"]["lr"]:', "if False:",
        "test_train.py::test_a_new_rate_at_a_resume_is_not_divided"),
    "resume: not without the GPU": Fault(
        "flags.py", '(args.precision == "tf32" and not is_given)', "is_given",
        "test_resume.py::test_a_run_of_a_gpu_continues_without_one"),
    "main.py fine-tunes at the last epoch's strength": Fault(
        "finetune.py", 'flags_after(flags, read_checkpoint(args.save)["epoch"])',
        "flags_after(flags, args.epochs)",
        "test_main.py::test_main_fine_tunes_at_the_strength_of_the_best_models_epoch"),
    "an older run is replaced": Fault(
        "main.py", "        keep_older_run(args.save, args.when)\n", "        pass\n",
        "test_checkpoint.py::test_a_new_run_keeps_the_files_of_an_older_one"),
    "a state is never due": Fault(
        "train.py", "self.saved_at - start", "self.saved_at + start",
        "test_checkpoint.py::test_the_state_is_due_by_the_clock_and_by_what_saving_costs"),
    "biLM: the backward model reads forwards": Fault(
        "train.py", "corpus.train.flip(0)]", "corpus.train]",
        "test_train.py::test_bilm_also_reads_the_reversed_text"),
    "scores: the wrong columns are read on": Fault(
        "language_model.py",
        "context.last = context.last[:rest]", "context.last = context.last[-rest:]",
        "test_language_model.py::test_texts_are_read_in_parallel"),
    "an exploding state is saved": Fault(
        "train.py", "if self.saved and not self.may_save() and not self.is_over():",
        "if not self.saved:",
        "test_checkpoint.py::test_a_signal_while_the_loss_explodes_leaves_the_last_good_state"),
    "losses: the stream of the wrong device": Fault(
        "utils.py", "current_stream(loss.device)", 'current_stream(torch.device("cpu"))',
        "test_train.py::test_losses_arrive_from_a_gpu_in_the_order_of_its_stream"),
    "a long text: each window begins anew": Fault(
        "language_model.py",
        "output, context.hidden = self._read(window,", "output, _ = self._read(window,",
        "test_language_model.py::test_a_long_text_is_read_in_windows"),
    "a context stays where it was": Fault(
        "language_model.py", "context.last = stream[-1]\n", "pass\n",
        "test_language_model.py::test_a_context_continues_a_text"),
    "a column's first token is predicted from an <eos>": Fault(
        "language_model.py", "context.last[1:] = torch", "context.last[:0] = torch",
        "test_language_model.py::test_columns_after_the_first_begin_without_context"),
    "scores of a batch: padding counted": Fault(
        "language_model.py", "log_probs[: len(part)] for", "log_probs for",
        "test_language_model.py::test_texts_are_read_in_parallel"),
    "padding at the end of all gates": Fault(
        "weight_drop.py", "weight.unflatten(0, (gates, -1))", "weight.unflatten(0, (1, -1))",
        "test_weight_drop.py::test_padding_changes_nothing"),
    "surprisal in nats": Fault(
        "evaluate.py", '"surprisal": -log_prob / math.log(2)', '"surprisal": -log_prob',
        "test_evaluate.py::test_programs_get_every_column_in_full_precision"),
    "benchmark: baseline of another embedding": Fault(
        "bench.py", "x = F.embedding(input, self.mask(", "x = 2 * F.embedding(input, self.mask(",
        "test_bench.py::test_the_baseline_is_the_same_model"),
    "report: a departure from the curve is not seen": Fault(
        "report/results.py", "valid_ppl(theirs) - 1) > 0.1:", "valid_ppl(theirs) - 1) > 10:",
        "test_report.py::test_a_departure_from_the_reports_curve_is_named_with_its_epoch"),
}


def copy_tracked(folder):
    """Copies the tracked files, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def run_tests(folder, tests):
    """Runs tests in the copy until one fails; returns pytest's exit status."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=folder / "tests", stdout=subprocess.DEVNULL, timeout=LIMIT,
        # A stale compiled file could hide a fault.
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    ).returncode


def is_caught(name, folder):
    """Plants a fault in the copy, runs its test, and prints whether the test failed."""
    fault = FAULTS[name]
    path = folder / fault.file
    whole = path.read_text()
    path.write_text(whole.replace(fault.old, fault.new))
    status = run_tests(folder, [fault.test])
    path.write_text(whole)
    caught = status == 1  # another status: no such test, interrupted, ...
    verdict = f"caught by {fault.test}" if caught else f"NOT CAUGHT (pytest: {status})"
    print(f"{fault.file}: {name}: {verdict}", flush=True)
    return caught


def main(names):
    if unknown := set(names) - set(FAULTS):
        print(f"faults.py: error: unknown fault {', '.join(unknown)}; the faults are:")
        print(*FAULTS, sep="\n")
        return 2
    names = names or list(FAULTS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_tracked(folder)
        for name in names:
            if (folder / FAULTS[name].file).read_text().count(FAULTS[name].old) != 1:
                print(f"faults.py: error: no longer in the code: {name}")
                return 2
        tests = sorted({FAULTS[name].test for name in names})
        if run_tests(folder, tests) != 0:
            print(f"faults.py: error: a test fails even without a fault: {' '.join(tests)}")
            return 2
        print(f"without a fault: {len(tests)} tests pass", flush=True)
        caught = [is_caught(name, folder) for name in names]
    print(f"{sum(caught)} of {len(caught)} caught")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
