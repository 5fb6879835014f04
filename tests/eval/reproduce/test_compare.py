"""`trl-steer compare`: the paired test of two runs, on the same examples or not at all."""

import pytest

from trl_steer.eval import runs
from trl_steer.eval.reproduce import compare
from trl_steer.files import write_json
from trl_steer.statistics import exact_mcnemar, paired_bootstrap

TASK = "steer_boolq"


def run(folder, correct, task=TASK, first_id=0):
    """A folder as a finished run leaves it."""
    made = runs.Run(folder)
    write_json(folder / "settings.json", {"format": runs.FORMAT})
    rows = [{"id": str(first_id + index), "target": "True", "correct": right} for index, right in enumerate(correct)]
    write_json(made.scores_file(task), {"examples": rows})
    write_json(made.scores_file(task, base=True), {"examples": rows})
    return str(folder)


def test_compare_prints_accuracies_interval_and_p_value(tmp_path, capsys):
    ours, theirs = [True] * 30 + [False] * 10, [True] * 15 + [False] * 25
    folders = [run(tmp_path / name, correct) for name, correct in (("a", ours), ("b", theirs))]
    assert compare.main(folders) == 0
    said = capsys.readouterr().out
    assert f"{TASK}, 40 examples\n  0.750  {folders[0]}\n  0.375  {folders[1]}\n" in said
    _, (low, high) = paired_bootstrap(ours, theirs)
    assert f"first minus second: +0.375, 95% interval {low:+.3f} to {high:+.3f} (paired bootstrap)" in said
    assert "correct only in the first 15, only in the second 0" in said
    assert f"p = {exact_mcnemar(ours, theirs, alternative='two-sided'):.2g} (exact McNemar test" in said


@pytest.mark.parametrize("other", [{"first_id": 1}, {"correct": [True, True, False]}, {"task": "steer_aqua"}])
def test_runs_on_other_examples_are_refused(other, tmp_path, capsys):
    first = run(tmp_path / "a", [True, False])
    second = run(tmp_path / "b", **{"correct": [True, True], **other})
    assert compare.main([first, second]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert ("no task in common" if "task" in other else "needs the same examples") in said.err
    assert said.err.count("\n") == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert compare.main([run(tmp_path / "a", [True, False]), str(tmp_path / "absent")]) == 1
    assert f"{tmp_path / 'absent'} is not the folder of a run" in capsys.readouterr().err
