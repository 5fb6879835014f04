"""The folder of a study, which is its record.

study.yaml            the study, with everything resolved
cells/<hash>/         a finished run, see `runs`; the hash is that of its settings
running/<hash>/       an unfinished one
failed/<hash>.json    why a cell failed: `reason`, `attempts`, `diverged`
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_steer.files import read_json

from ..runs import Run, RunError
from .study import STUDY, Cell, Study, load

CELLS, RUNNING, FAILED = "cells", "running", "failed"


class Failure(NamedTuple):
    """
    Why a cell failed.

    Attributes:
        reason (`str`): The error in one line.
        attempts (`int`): How often it was tried.
        diverged (`bool`): Whether training diverged.
    """

    reason: str
    attempts: int
    diverged: bool


class Result(NamedTuple):
    """
    A cell, and its run or failure if it has one.

    Attributes:
        cell (`Cell`): The cell.
        run (`Run`, *optional*): Its run if it is finished.
        failure (`Failure`, *optional*): Its failure.
    """

    cell: Cell
    run: Run | None
    failure: Failure | None

    @property
    def accuracy(self) -> float | None:
        """The accuracy. 0 if training diverged, and `None` without a result or for a task that is not evaluated."""
        if self.run is not None and self.cell.settings.task is not None:
            return self._number(lambda run, task: run.scores(task)["accuracy"])
        return 0.0 if self.failure is not None and self.failure.diverged else None

    @property
    def seconds(self) -> float:
        """The time that training and evaluation took, of a finished cell."""
        scoring = 0.0
        if self.cell.settings.task is not None:
            scoring = self._number(lambda run, task: run.scores(task).get("seconds", 0.0))
        return self._number(lambda run, task: run.training["seconds"]) + scoring

    def _number(self, of: Callable[[Any, Any], Any]) -> float:
        run: Any = self.run
        try:
            return float(of(run, self.cell.settings.task))
        except (AttributeError, LookupError, TypeError, ValueError, OSError) as error:
            raise damage(run.folder, error) from error


def results(folder: Path) -> Iterator[Result]:
    """The cells of a study with their runs and failures, in the order of the study.

    Cells of the second stage follow where the rate of their row is chosen, which needs a finished or diverged cell for
    every rate, or a failed one.

    Raises:
        StudyError: The folder has no study.
    """
    yield from results_of(load(folder / STUDY), folder)


def results_of(study: Study, folder: Path) -> Iterator[Result]:
    """As [`results`], for any study and a folder that need not exist."""
    first = [result_of(cell, folder) for cell in study.rate_cells()]
    yield from first
    for cell in study.test_cells(best_rates(first)):
        yield result_of(cell, folder)


def result_of(cell: Cell, folder: Path) -> Result:
    """A cell with what the folder of a study has of it.

    Raises:
        RunError: The record of its failure is damaged.
    """
    run = Run(folder / CELLS / cell.key)
    if run.folder.is_dir():
        return Result(cell, run, None)
    file = folder / FAILED / f"{cell.key}.json"
    try:
        return Result(cell, None, Failure(**read_json(file)))
    except FileNotFoundError:
        return Result(cell, None, None)
    except (TypeError, ValueError) as error:
        raise damage(file, error) from error


def best_rates(first: Sequence[Result]) -> dict[tuple[str, str, str], float]:
    """The best rate by model, task and row: that of the highest accuracy, the lowest one if several have it.

    A row is left out while a cell is unfinished, and if all cells failed. Diverged ones count as 0, so that a row that
    diverged at all rates is tested with the lowest one.
    """
    by_row: dict[tuple[str, str, str], list[Result]] = {}
    for result in first:
        by_row.setdefault((result.cell.model, result.cell.task, result.cell.row), []).append(result)
    best = {}
    for row, found in by_row.items():
        scored = [
            (-result.accuracy, result.run is None, result.cell.rate) for result in found if result.accuracy is not None
        ]
        if scored and all(result.run or result.failure for result in found):
            best[row] = min(scored)[2]
    return best


def damage(path: Path, error: Exception) -> RunError:
    """The error for a file or folder of a study that cannot be read."""
    text = " ".join(str(error).split())
    what = f"it has no {text}" if isinstance(error, KeyError) else text or type(error).__name__
    return RunError(f"{path} is damaged: {what}. Remove it and run the study again.")
