"""The record of a study: its cells with what is known of them, and the rates that follow."""

import pytest
import study_cases
import tiny_runs

from trl_steer.eval import runs
from trl_steer.eval.reproduce import cli, plan
from trl_steer.eval.reproduce.results import CELLS, FAILED, best_rates, result_of, results
from trl_steer.eval.reproduce.study import StudyError, save

ROW = ("tiny", "listops_synthetic", "Ours r=2")


@pytest.fixture
def study(tmp_path):
    made = study_cases.grid()
    save(made, tmp_path)
    return made


def cells_of(study, row="Ours r=2"):
    return [cell for cell in study.rate_cells() if cell.row == row]


def test_results_follow_the_study_and_the_second_stage_the_best_rates(study, tmp_path):
    first = list(results(tmp_path))
    assert [result.cell for result in first] == list(study.rate_cells())
    assert all(result.run is result.failure is result.accuracy is None for result in first)
    for cell, accuracy in zip(cells_of(study), (0.2, 0.5, 0.4), strict=True):
        study_cases.finish(tmp_path, cell, accuracy)
    found = list(results(tmp_path))
    assert [(r.cell.stage, r.cell.row, r.cell.rate, r.cell.seed) for r in found[len(first) :]] == [
        ("test", "Ours r=2", 2e-3, seed) for seed in (0, 1, 2)
    ]
    assert [result.accuracy for result in found[:3]] == [0.2, 0.5, 0.4]
    assert isinstance(found[0].run, runs.Run)


@pytest.mark.parametrize(
    ("left", "rate"),
    [
        ((0.2, 0.5, 0.4), 2e-3),
        ((0.5, 0.2, 0.5), 1e-3),  # the lowest of those that are as good
        ((0.2, 0.1, "diverged"), 1e-3),
        ((0.0, "diverged", "diverged"), 1e-3),
        (("diverged", "failed", 0.3), 5e-3),
        (("diverged", "diverged", "diverged"), 1e-3),
        (("diverged", 0.0, "failed"), 2e-3),
        (("failed", "failed", "failed"), None),
        ((0.2, 0.5, None), None),
    ],
)
def test_the_best_rate(left, rate, study, tmp_path):
    for cell, how in zip(cells_of(study), left, strict=True):
        if isinstance(how, float):
            study_cases.finish(tmp_path, cell, how)
        elif how is not None:
            study_cases.fail(tmp_path, cell, how == "diverged")
    found = [result_of(cell, tmp_path) for cell in study.rate_cells()]
    assert best_rates(found).get(ROW) == rate
    assert [result.accuracy for result in found[:3]] == [
        0.0 if how == "diverged" else how if isinstance(how, float) else None for how in left
    ]


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(StudyError, match="Can't read the study"):
        list(results(tmp_path))


def test_the_time_that_is_left_follows_finished_cells(study, tmp_path):
    size = study.size()

    def left():
        return plan.seconds_left(list(results(tmp_path)), size)

    assert left() is None
    first, second, _ = cells_of(study)
    study_cases.finish(tmp_path, first, 0.1, seconds=5.0)  # training, and as long for the evaluation
    assert left() == 23 * 10.0
    study_cases.finish(tmp_path, cells_of(study, "SFT")[0], 0.1, seconds=15.0)
    # Two of this row, two of SFT, six of other rows of the same task, and twelve of the second stage.
    assert left() == 2 * 10.0 + 2 * 30.0 + 6 * 20.0 + 12 * 20.0
    study_cases.fail(tmp_path, second)
    assert left() == 10.0 + 2 * 30.0 + 6 * 20.0 + 12 * 20.0


def test_status_counts_cells_and_names_failures(study, tmp_path, capsys):
    first, second, third = cells_of(study)
    study_cases.finish(tmp_path, first, 0.1)
    study_cases.fail(tmp_path, second)
    study_cases.fail(tmp_path, third, diverged=True)
    assert cli.main(["status", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["grid: A grid of 24 cells", "1 finished, 1 diverged, 1 failed, 21 left"]
    assert said[2] == "time left with 1 worker: about 42 s"
    assert [line.partition(" (")[0] for line in said[3:]] == [
        f"tiny, listops_synthetic, Ours r=2, rate {rate}, seed 0" for rate in ("0.002", "0.005")
    ]
    assert all(line.endswith("No memory.") for line in said[3:])


@pytest.mark.parametrize("file", ["training.json", "scores/steer_listops_synthetic_val.json", "failed"])
@pytest.mark.parametrize("damage", ["{", "{}"])
def test_a_damaged_record_is_one_line(file, damage, study, tmp_path, capsys):
    first, second, _ = cells_of(study)
    study_cases.finish(tmp_path, first, 0.1)
    study_cases.fail(tmp_path, second)
    damaged = tmp_path / CELLS / first.key
    if file == "failed":
        damaged = tmp_path / FAILED / f"{second.key}.json"
    (damaged if file == "failed" else damaged / file).write_text(damage)
    for argv in (["status", str(tmp_path)], [str(tmp_path / "study.yaml"), "--output", str(tmp_path), "--dry-run"]):
        assert cli.main(argv) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"trl-steer reproduce: error: {damaged} is damaged: ")


@pytest.mark.slow
def test_full_fine_tuning_leaves_scores_and_no_weights(tmp_path):
    model = tiny_runs.save_checkpoint(tmp_path / "model")
    (cell, *_) = (cell for cell in study_cases.grid(model).rate_cells() if cell.row == "SFT")
    run = runs.make(cell.settings, tmp_path / "run")
    assert run.training["trainable_share"] == 1.0
    assert len(run.scores("steer_listops_synthetic_val")["examples"]) == 4
    assert {path.name for path in run.folder.iterdir()} == {
        *(".lock", "environment.json", "log", "scores", "settings.json", "training.json")
    }
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    assert runs.make(cell.settings, run.folder).training == run.training
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before
