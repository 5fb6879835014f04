"""Folders of studies as `trl-steer reproduce` leaves them, with answers that a test chooses. Nothing is trained."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trl_steer.eval import runs
from trl_steer.eval.reproduce import results, study
from trl_steer.files import write_json

# What becomes of a cell: `"1101"`, the answers of a finished run, of which those with a 1 are correct; the reason of a
# failure, see `diverged` and `failed`; or `None`, not run.
Outcome = Any
DIVERGED = results.Failure("Training diverged: the loss is NaN.", 1, True)


def write(
    folder: Path,
    contents: Mapping[str, Any],
    outcome: Callable[[study.Cell], Outcome],
    targets: Mapping[str, str],
    training: Callable[[study.Cell], Mapping[str, Any]] = lambda cell: {},
) -> Path:
    """Writes a study, and the result of each cell.

    Args:
        folder: The output folder of the study.
        contents: Those of the study file.
        outcome: What becomes of a cell.
        targets: The correct answers by task, a character for each example.
        training: Statistics of training of a cell.
    """
    made = study.from_dict(contents)
    study.save(made, folder)
    first = list(made.rate_cells())
    for cell in first:
        _write_cell(cell, folder, outcome(cell), targets, training)
    best = results.best_rates([results.result_of(cell, folder) for cell in first])
    for cell in made.test_cells(best):
        _write_cell(cell, folder, outcome(cell), targets, training)
    return folder


def _write_cell(cell, folder, outcome, targets, training) -> None:
    if isinstance(outcome, results.Failure):
        write_json(folder / results.FAILED / f"{cell.key}.json", outcome._asdict())
    elif outcome is not None:
        run = runs.Run(folder / results.CELLS / cell.key)
        write_json(run.folder / runs.SETTINGS, cell.settings.to_dict())
        write_json(run.folder / runs.TRAINING, {"losses": [2.0, 1.0], **training(cell)})
        examples = [
            {"id": f"{cell.stage}-{number}", "text": "", "answer": "", "target": target, "correct": right == "1"}
            for number, (target, right) in enumerate(zip(targets[cell.task], outcome, strict=True))
        ]
        accuracy = outcome.count("1") / len(outcome)
        task = cell.settings.task
        write_json(run.scores_file(task), {"task": task, "accuracy": accuracy, "examples": examples})
