"""A run is a folder: what is in it, that it goes on wherever it was stopped, and whom it refuses."""

import dataclasses
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_runs
import torch
from lm_eval.__main__ import cli_evaluate
from peft import PeftModel
from processes import run_in_process
from safetensors.torch import load_file
from tiny_chat import tiny_model

from trl_steer import files
from trl_steer.eval import runs, scoring, training
from trl_steer.eval.console import Report
from trl_steer.trainers.callbacks import TrainingDivergedError
from trl_steer.tuners.joint_steering import OrthogonalityConstraint

TASK = "steer_listops_synthetic"


class Told(Report):
    """Remembers what it was told."""

    def __init__(self):
        self.notes, self.steps = [], []

    def note(self, text):
        self.notes.append(text)

    def progress(self, done, total, note=""):
        self.steps.append((done, total))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_runs.save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def settings(model):
    return tiny_runs.settings(model)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    return runs.make(settings, tmp_path_factory.mktemp("runs") / "run", score_base=True)


@pytest.fixture
def copy(finished, tmp_path):
    return runs.Run(shutil.copytree(finished.folder, tmp_path / "copy"))


def test_a_run_holds_its_settings_its_adapter_and_its_scores(finished, settings):
    assert {path.name for path in finished.folder.iterdir()} == {
        *(".lock", "adapter", "environment.json", "log"),
        *("scores", "settings.json", "training.json"),
    }
    assert finished.settings == settings.to_dict()
    assert finished.tasks() == [TASK]
    assert {*finished.environment} >= {"packages", "device", "threads", "command"}
    training = finished.training
    # 2 blocks, width 32, rank 8
    assert training["trainable_parameters"] == 2 * 2 * 8 * 32
    assert training["steps"] == 18
    assert min(training["tokens_per_second"], training["peak_memory_bytes"], *training["losses"]) > 0
    scores = finished.scores(TASK)
    assert [set(example) for example in scores["examples"]] == [{"id", "text", "answer", "target", "correct"}] * 4
    assert scores["accuracy"] == sum(finished.correct(TASK)) / 4
    ids = [[row["id"] for row in finished.scores(TASK, base)["examples"]] for base in (False, True)]
    assert ids[0] == ids[1]
    assert len({*ids[0]}) == 4


def test_the_adapter_folder_loads_on_the_base_model(finished):
    steered = PeftModel.from_pretrained(tiny_model(), str(finished.adapter))
    assert steered.peft_config["default"].r == 8
    tensors = load_file(finished.adapter / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if name.endswith(".up"))
    assert {path.name for path in finished.adapter.iterdir()}.isdisjoint(runs._STATE)


def test_a_finished_run_is_taken_as_it_is(finished, settings, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    monkeypatch.setattr(runs, "_make", None)
    runs.make(settings, finished.folder, score_base=True)
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")} == before


@pytest.mark.parametrize("missing", [f"scores/{TASK}.json", f"scores/{TASK}.base.json", "adapter", "training.json"])
def test_missing_parts_of_a_run_are_made_again_with_the_same_result(missing, finished, settings, copy):
    path = copy.folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    runs.make(settings, copy.folder, score_base=True)
    assert tiny_runs.outcome(copy) == tiny_runs.outcome(finished)


def test_scores_are_told_apart_by_the_strict_filter_where_there_are_several(settings, monkeypatch):
    row = {"doc_id": 0, "prompt_hash": "f" * 64, "resps": [["7"]], "target": "7"}
    samples = [
        {**row, "filter": name, "filtered_resps": [answer], "exact_match": float(answer == "7")}
        for name, answer in (("flexible", "7"), ("strict", "none"))
    ]
    results = {"samples": {TASK: samples}, "results": {TASK: {"exact_match,strict": 0.0, "exact_match,flexible": 1.0}}}
    monkeypatch.setattr(scoring.lm_eval, "simple_evaluate", lambda **_: results)
    scores = scoring.score(settings, TASK, settings.model, None, runs.TASKS, Report())
    assert (scores["filter"], scores["accuracy"]) == ("strict", 0.0)
    assert [example["correct"] for example in scores["examples"]] == [False]


@pytest.mark.parametrize(("method", "overlaps"), [("joint", True), ("joint_orth", False)])
def test_joint_methods_train_both_halves(method, overlaps, model, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_score", lambda *_: None)
    run = runs.make(tiny_runs.settings(model, method, train=4), tmp_path / "run")
    adapted = PeftModel.from_pretrained(tiny_model(), str(run.adapter))
    trained = {name for name, p in adapted.named_parameters() if p.abs().sum() > 0 and (".up" in name or "_B" in name)}
    assert any(".up" in name for name in trained)
    assert any(".lora_B." in name for name in trained)
    overlap = OrthogonalityConstraint(adapted, "default").project().max_overlap
    assert (overlap > 1e-3) is overlaps
    assert (overlap < 1e-5) is not overlaps


def interrupted(settings, folder, monkeypatch, step):
    """A run that was stopped in training after so many steps."""

    def stop(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as fault:
        fault.setattr(training._Record, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            runs.make(settings, folder, score_base=True)
    return runs.Run(folder)


def test_a_checkpoint_that_was_cut_off_is_skipped_with_a_line(finished, settings, tmp_path, monkeypatch):
    run = interrupted(settings, tmp_path / "run", monkeypatch, 17)
    shutil.copytree(run.checkpoints / "checkpoint-15", run.checkpoints / "checkpoint-16")
    (run.checkpoints / "checkpoint-16" / runs.MARK).unlink()
    told = Told()
    runs.make(settings, run.folder, score_base=True, report=told)
    assert told.notes == [
        "Skipping checkpoint-16, which is incomplete.",
        "Resuming from step 15.",
    ]
    assert (16, 18) in told.steps
    assert (15, 18) not in told.steps
    assert tiny_runs.outcome(run) == tiny_runs.outcome(finished)


def test_a_run_that_was_stopped_before_its_adapter_was_written_trains_no_further_step(
    finished, settings, tmp_path, monkeypatch
):
    folder = tmp_path / "run"

    def stop(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as fault:
        fault.setattr(runs, "new_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            runs.make(settings, folder, score_base=True)
    monkeypatch.setattr(training, "train", None)
    run = runs.make(settings, folder, score_base=True)
    assert tiny_runs.outcome(run) == tiny_runs.outcome(finished)
    assert run.training["seconds"] > 0


def check_kills(count, finished, settings, tmp_path):
    """Kills runs at random moments; made again, each ends as the one that nobody disturbed."""
    assert run_in_process(tiny_runs.make_and_count, settings, tmp_path / "whole", tmp_path / "count") == 0
    for moment in tiny_runs.moments(count, int((tmp_path / "count").read_text())):
        folder = tmp_path / str(moment)
        status = run_in_process(tiny_runs.make_until_killed, settings, folder, moment)
        assert status == -signal.SIGKILL, moment
        run = runs.make(settings, folder, score_base=True)
        assert tiny_runs.outcome(run) == tiny_runs.outcome(finished), moment


def test_killed_runs_end_as_if_nobody_had_disturbed_them(finished, settings, tmp_path):
    check_kills(2, finished, settings, tmp_path)


@pytest.mark.slow
def test_many_killed_runs_end_as_if_nobody_had_disturbed_them(finished, settings, tmp_path):
    check_kills(30, finished, settings, tmp_path)


def test_other_settings_are_refused_with_what_differs(finished, settings, copy):
    before = tiny_runs.outcome(copy)
    other = dataclasses.replace(settings, seed=1, training={**settings.training, "learning_rate": 0.5})
    with pytest.raises(runs.RunError) as refused:
        runs.make(other, copy.folder, score_base=True)
    assert "seed 0, asked for 1" in str(refused.value)
    assert "training.learning_rate 0.002, asked for 0.5" in str(refused.value)
    assert "--overwrite" in str(refused.value)
    assert tiny_runs.outcome(copy) == before


def test_overwriting_starts_anew_and_leaves_what_is_not_of_the_run(settings, copy, monkeypatch):
    (copy.folder / "notes.txt").write_text("mine")
    monkeypatch.setattr(runs, "_make", lambda *_: None)
    other = dataclasses.replace(settings, seed=1)
    runs.make(other, copy.folder, overwrite=True)
    assert {path.name for path in copy.folder.iterdir()} == {".lock", "log", "settings.json", "notes.txt"}
    assert copy.settings == other.to_dict()


def test_partly_removed_run_is_not_taken_as_complete(finished, settings, copy, monkeypatch):
    def stop(path):
        (path / "adapter_config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as fault:
        fault.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            runs.make(dataclasses.replace(settings, seed=1), copy.folder, overwrite=True)
    runs.make(settings, copy.folder, score_base=True)
    assert tiny_runs.outcome(copy) == tiny_runs.outcome(finished)


@pytest.mark.parametrize("content", [None, "", "[]", '{"title": "mine"}'])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_refused_untouched(content, overwrite, settings, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "thesis.tex").write_text("precious")
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(runs.RunError, match="is not empty, and not the folder of a run"):
        runs.make(settings, tmp_path, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_process_is_told_who_has_the_folder(settings, copy):
    code = f"""
import sys
from pathlib import Path
from trl_steer import files
with files.locked(Path({str(copy.folder)!r})):
    print("locked", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        before = tiny_runs.outcome(copy)
        for overwrite in (False, True):
            with pytest.raises(runs.RunError, match=f"in use by process {other.pid} on "):
                runs.make(dataclasses.replace(settings, seed=1), copy.folder, overwrite=overwrite)
        assert tiny_runs.outcome(copy) == before
        other.kill()
    with files.locked(copy.folder):  # that of a process that is gone does not count
        assert f"process {os.getpid()} " in (copy.folder / ".lock").read_text()


def test_files_half_written_by_a_killed_run_are_removed(settings, copy):
    left = [".adapter.0123.partial", "scores/.steer_boolq.json.0123.partial", ".settings.json.0123.partial"]
    (copy.folder / left[0]).mkdir()
    for name in left[1:]:
        (copy.folder / name).write_text("{")
    copy.scores_file(TASK).unlink()
    runs.make(settings, copy.folder, score_base=True)
    assert not list(copy.folder.rglob("*.partial"))


def test_a_first_run_that_was_killed_while_it_wrote_its_settings_may_begin_again(settings, tmp_path, monkeypatch):
    (tmp_path / ".settings.json.1234.partial").write_text("{")
    monkeypatch.setattr(runs, "_make", lambda *_: None)
    assert runs.make(settings, tmp_path).settings == settings.to_dict()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "log", "settings.json"}


def test_a_failure_says_why_in_a_line_and_keeps_what_is_finished(settings, copy, monkeypatch):
    shutil.rmtree(copy.adapter)

    def fail(*_):
        raise TrainingDivergedError("Training diverged at step 3.\nLower the rate.")

    monkeypatch.setattr(training, "train", fail)
    with pytest.raises(runs.RunError) as failed:
        runs.make(settings, copy.folder, score_base=True)
    assert str(failed.value).startswith("Training diverged at step 3. Lower the rate. (TrainingDivergedError; ")
    assert "\n" not in str(failed.value)
    assert "Traceback" in copy.log.read_text()
    assert copy.scores(TASK, base=True)["examples"]


@pytest.mark.parametrize("where", ["scores", "adapter", "settings"])
def test_a_full_disk_is_a_line_and_leaves_nothing_half_written(where, settings, tmp_path, monkeypatch):
    """Each write fails, after it has made its temporary file."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_args, **_kwargs):
        raise full

    folder = tmp_path / "run"
    if where == "adapter":
        monkeypatch.setattr(runs.shutil, "copy", fail)
    else:
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: fail() if where in str(b) else replace(a, b))
    with pytest.raises(runs.RunError, match="No space left on device"):
        runs.make(settings, folder, score_base=True)
    assert not list(folder.rglob("*.partial"))


def test_a_full_disk_is_named_whatever_the_library_calls_it(settings, copy, monkeypatch):
    usage = shutil.disk_usage(copy.folder)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    said = runs._reason(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), copy)
    assert said.startswith(f"No space is left on the disk of {copy.folder}")


def test_a_folder_that_cannot_be_made_is_a_line(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(runs.RunError, match=r"is a file\. Choose a folder"):
        runs.make(settings, tmp_path / "file")
    with pytest.raises(runs.RunError, match="Not a directory"):
        runs.make(settings, tmp_path / "file" / "run")


def test_a_model_that_is_not_there_is_a_line(settings, tmp_path):
    missing = dataclasses.replace(settings, model=str(tmp_path / "absent"))
    with pytest.raises(runs.RunError, match="There is no folder"):
        runs.make(missing, tmp_path / "run")


def command(run):
    return shlex.split(run.command().replace("\\\n", ""))


def options(run):
    words = command(run)
    assert words[:2] == ["lm_eval", "run"]
    return dict(zip(words[2::2], words[3::2], strict=True))


def test_the_command_names_what_was_scored(finished, model):
    given = options(finished)
    assert given["--model_args"] == f"pretrained={model},peft={finished.adapter},dtype=float32"
    assert given["--tasks"] == TASK
    assert all(line.endswith(" \\") for line in finished.command().splitlines()[:-1])


def test_the_command_makes_lm_eval_generate_the_same_texts(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*command(finished), "--output_path", str(tmp_path), "--log_samples"])
    cli_evaluate()
    (samples,) = tmp_path.rglob(f"samples_{TASK}_*.jsonl")
    chosen = finished.scores(TASK)["filter"]
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    theirs = [row for row in rows if row["filter"] == chosen]
    ours = finished.scores(TASK)["examples"]
    assert [row["resps"][0][0] for row in sorted(theirs, key=lambda row: row["doc_id"])] == [
        row["text"] for row in ours
    ]


def test_the_command_for_full_fine_tuning_names_its_model_its_dtype_and_the_limit(settings, tmp_path):
    run = runs.Run(tmp_path)
    scoring = {"batch_size": 4, "limit": 7}
    full = dataclasses.replace(settings, method="full", dtype="bfloat16", scoring=scoring)
    files.write_json(run.folder / "settings.json", full.to_dict())
    files.write_json(run.folder / "environment.json", {"model": settings.model, "device": "cpu"})
    lines = [line.strip(" \\") for line in run.command().splitlines()]
    assert {f"--model_args pretrained={run.model},dtype=bfloat16", "--limit 7", "--batch_size 4"} <= {*lines}


def test_the_command_survives_commas(copy):
    files.write_json(copy.folder / "environment.json", {"model": "a,b=1", "device": "cpu"})
    assert '"pretrained": "a,b=1"' in options(copy)["--model_args"]


def test_importing_runs_loads_nothing_heavy():
    code = "import sys, trl_steer.eval.runs; print({'torch', 'peft', 'datasets', 'lm_eval'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_training_is_seeded_and_not_by_what_was_drawn_before(finished, settings, tmp_path):
    torch.rand(3)
    assert tiny_runs.outcome(runs.make(settings, tmp_path / "run", score_base=True)) == tiny_runs.outcome(finished)
