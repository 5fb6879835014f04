"""The driver: which cells it hands to an engine, how often, and what it writes of those that fail."""

import contextlib
import os
from collections import Counter

import pytest
import study_cases

from trl_steer.eval.console import Report
from trl_steer.eval.reproduce.driver import reproduce
from trl_steer.eval.reproduce.results import results
from trl_steer.eval.reproduce.study import load
from trl_steer.eval.reproduce.worker import Outcome
from trl_steer.files import FolderInUseError, locked, read_json


class Told(Report):
    def __init__(self):
        self.notes, self.progresses, self.ends = [], [], []

    def note(self, text):
        self.notes.append(text)

    def progress(self, done, total, note=""):
        self.progresses.append((done, total, note))

    def end(self, result):
        self.ends.append(result)


class Engine:
    """Two cells at a time, in this process. Each ends as `ends` says: a reason, `"diverged"` or an accuracy."""

    def __init__(self, folder, ends):
        self.folder, self.ends, self.running, self.made = folder, ends, [], []

    def is_free(self):
        return len(self.running) < 2

    def is_idle(self):
        return not self.running

    def submit(self, cell):
        assert self.is_free()
        self.running.append(cell)

    def wait(self):
        cell = self.running.pop()
        self.made.append(cell)
        end = self.ends(cell, self.made.count(cell))
        if isinstance(end, float):
            study_cases.finish(self.folder, cell, end)
            return [(cell, Outcome())]
        return [(cell, Outcome("Training diverged.", True) if end == "diverged" else Outcome(end))]


def made(folder, ends, **options):
    engine, told = Engine(folder, ends), Told()
    found = reproduce(study_cases.grid(), folder, contextlib.nullcontext(engine), told, **options)
    return engine, told, found


def rate_of(cell, attempt):
    return cell.rate * 100


def test_every_cell_is_made_once_in_two_stages(tmp_path):
    engine, told, found = made(tmp_path, rate_of)
    assert len(engine.made) == len({cell.key for cell in engine.made}) == 24
    assert [cell.stage for cell in engine.made] == ["rates"] * 12 + ["test"] * 12
    assert {cell.rate for cell in engine.made if cell.stage == "test"} == {5e-3}
    assert [(r.cell, r.accuracy) for r in found] == [(r.cell, r.accuracy) for r in results(tmp_path)]
    assert told.progresses == [(done, 24, f"{done} finished") for done in (*range(13), *range(12, 25))]
    assert told.ends == ["24 finished"]
    assert load(tmp_path / "study.yaml").title == "A grid of 24 cells"


def test_finished_cells_are_not_made_again(tmp_path):
    made(tmp_path, rate_of)
    engine, told, _ = made(tmp_path, rate_of)
    assert not engine.made
    assert [done for done, *_ in told.progresses] == [12, 24]  # no time was spent on each
    assert told.ends == ["24 finished"]


def test_a_cell_that_fails_is_tried_again_twice_and_stops_nothing(tmp_path):
    def ends(cell, attempt):
        if cell.row == "SFT" and cell.rate == 5e-3:
            return "CUDA out of memory."
        return "A hiccup." if (cell.row, cell.rate, attempt) == ("LoRA r=2", 1e-3, 1) else cell.rate * 100

    engine, told, found = made(tmp_path, ends)
    tries = Counter((cell.row, cell.rate) for cell in engine.made if cell.stage == "rates")
    assert (tries.pop(("SFT", 5e-3)), tries.pop(("LoRA r=2", 1e-3))) == (3, 2)
    assert {*tries.values()} == {1}
    (failed,) = (result for result in found if result.failure)
    assert failed.failure == ("CUDA out of memory.", 3, False)
    assert read_json(tmp_path / "failed" / f"{failed.cell.key}.json")["attempts"] == 3
    assert {cell.rate for cell in engine.made if cell.stage == "test" and cell.row == "SFT"} == {2e-3}
    assert sum("tried again" in note for note in told.notes) == 3
    assert told.ends == ["23 finished, 1 failed"]

    engine, told, found = made(tmp_path, rate_of)  # what failed is tried again, and with it the choice
    assert [(cell.row, cell.rate) for cell in engine.made] == [("SFT", 5e-3)] * 4
    assert not list((tmp_path / "failed").iterdir())


def test_a_cell_that_diverges_is_never_tried_again(tmp_path):
    def ends(cell, attempt):
        return "diverged" if (cell.row, cell.rate) == ("Ours r=2", 5e-3) else cell.rate * 100

    for again in (False, True):
        engine, told, found = made(tmp_path, ends)
        assert len(engine.made) == (0 if again else 24)
        assert {cell.rate for cell in engine.made if cell.stage == "test" and cell.row == "Ours r=2"} <= {2e-3}
        assert told.ends == ["23 finished, 1 diverged"]
    (diverged,) = (result for result in found if result.failure)
    assert (diverged.accuracy, diverged.failure.diverged) == (0.0, True)


def test_a_row_that_diverges_at_every_rate_is_tested_with_the_lowest_and_counts_as_the_worst(tmp_path):
    _, told, found = made(tmp_path, lambda cell, attempt: "diverged" if cell.row == "SFT" else 0.5)
    tested = [result for result in found if (result.cell.stage, result.cell.row) == ("test", "SFT")]
    lowest = min(result.cell.rate for result in found if result.cell.row == "SFT")
    assert {(result.cell.rate, result.accuracy) for result in tested} == {(lowest, 0.0)}
    assert told.ends == ["18 finished, 6 diverged"]


def test_a_row_whose_rates_all_fail_has_no_second_stage(tmp_path):
    engine, told, _ = made(tmp_path, lambda cell, attempt: "No memory." if cell.row == "SFT" else 0.5)
    assert {cell.row for cell in engine.made if cell.stage == "test"} == {"Ours r=2", "Ours (1-vec)", "LoRA r=2"}
    assert told.ends == ["18 finished, 3 failed"]


def test_a_worker_whose_folder_is_not_shared_is_named(tmp_path):
    engine = Engine(tmp_path / "elsewhere", rate_of)
    found = reproduce(study_cases.grid(), tmp_path / "here", contextlib.nullcontext(engine), Report())
    assert {result.failure.reason.partition(",")[0] for result in found} == {"The worker finished"}


def test_finished_runs_of_another_folder_are_taken(tmp_path):
    demo = tmp_path / "demo-run"
    cells = list(study_cases.grid().rate_cells())
    for index, cell in enumerate(cells[:3]):
        study_cases.finish(tmp_path / "other", cell, 0.5).folder.rename(demo.mkdir(exist_ok=True) or demo / f"{index}")
    (demo / "2" / "training.json").unlink()  # unfinished
    engine, _, found = made(tmp_path / "study", rate_of, take_from=demo)
    assert len(engine.made) == 22
    assert [result.accuracy for result in found[:2]] == [0.5, 0.5]
    assert (demo / "0").is_dir()


def test_a_second_driver_is_told_who_makes_the_cells(tmp_path):
    with locked(tmp_path), pytest.raises(FolderInUseError, match=f"in use by process {os.getpid()} on "):
        made(tmp_path, rate_of)
    assert not (tmp_path / "study.yaml").exists()
