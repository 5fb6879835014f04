"""What a report is computed from: the cells of a study, read once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trl_steer.tasks.registry import BENCHMARKS

from ..reproduce.results import Result, damage, results
from ..reproduce.study import STUDY, Stage, load
from ..runs import Run, RunError

State = Literal["finished", "diverged", "failed", "missing"]


class Example(NamedTuple):
    """The answer to an example of a test set."""

    id: str
    target: str
    correct: bool


@dataclass(frozen=True)
class Cell:
    """
    A cell of a study: a method at a learning rate, with a seed, on a model and a task.

    Attributes:
        stage (`str`): `"rates"`, scored on validation examples, or `"test"`.
        model (`str`), task (`str`), row (`str`): What the study calls them. The row is the method with its settings.
        rate (`float`, *optional*): The learning rate. `None` in the test stage as long as no rate is chosen.
        seed (`int`): The seed.
        state (`str`): `"finished"`, `"diverged"` or `"failed"` after all attempts, or `"missing"`: not run yet.
        settings (`dict`): The settings of the run.
        examples (`Sequence[Example]`): All answers of a finished run.
        training (`dict`): The statistics of training of a finished run.
        reason (`str`): Why the cell failed.
        attempts (`int`): How often a failed cell was tried.
    """

    stage: Stage
    model: str
    task: str
    row: str
    rate: float | None
    seed: int
    state: State = "missing"
    settings: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    attempts: int = 0

    @property
    def accuracy(self) -> float | None:
        """Share of correct answers. 0 if training diverged, which is the worst one, and `None` without a result."""
        if self.state == "diverged":
            return 0.0
        return sum(example.correct for example in self.examples) / len(self.examples) if self.examples else None

    @property
    def majority(self) -> float | None:
        """The accuracy of giving the same answer everywhere, the most frequent one of these examples."""
        if not self.examples:
            return None
        return Counter(example.target for example in self.examples).most_common(1)[0][1] / len(self.examples)

    @property
    def collapsed(self) -> bool:
        """Whether a finished run is not better than the most frequent answer."""
        return self.accuracy is not None and self.majority is not None and self.accuracy <= self.majority


@dataclass(frozen=True)
class Record:
    """
    A study with its results. Everything is in the order of the study.

    Attributes:
        title (`str`): What the study measures.
        models (`Sequence[str]`), tasks (`Sequence[str]`), rows (`Sequence[str]`): The names of the grid. Tasks that
            are only trained on are left out.
        cells (`Sequence[Cell]`): All cells, run or not.
        guessed (`Sequence[str]`): What the study had to assume.
    """

    title: str
    models: Sequence[str]
    tasks: Sequence[str]
    rows: Sequence[str]
    cells: Sequence[Cell]
    guessed: Sequence[str] = ()

    def of(self, stage: Stage, model: str, row: str, task: str) -> list[Cell]:
        """The cells of a stage, in the order of the study."""
        wanted = (stage, model, row, task)
        return [cell for cell in self.cells if (cell.stage, cell.model, cell.row, cell.task) == wanted]

    def setting(self, row: str, *path: str) -> Any:
        """A setting that all cells of a row share, such as `"method"`, or `None`."""
        for cell in self.cells:
            if cell.row == row and cell.settings:
                found: Any = cell.settings
                for name in path:
                    found = found.get(name) if isinstance(found, Mapping) else None
                return found
        return None

    def with_method(self, method: str) -> list[str]:
        """The rows with a method, for example `"full"` or `"lora"`."""
        return [row for row in self.rows if self.setting(row, "method") == method]


def read(folder: Path) -> Record:
    """The record of a study.

    Raises:
        StudyError: The study is invalid.
        RunError: The folder is not that of a study, or a run is damaged.
    """
    if not (folder / STUDY).is_file():
        raise RunError(f"{folder} has no {STUDY}. Give the output folder of `trl-steer reproduce`.")
    study = load(folder / STUDY)
    made = [_cell(result, folder) for result in results(folder)]
    models, rows = [model.label for model in study.models], [row.name for row in study.rows]
    cells, tested = [cell for cell in made if cell.stage == "rates"], defaultdict(list)
    for cell in made:
        if cell.stage == "test":
            tested[cell.model, cell.task, cell.row].append(cell)
    for model, task, row in product(models, study.tasks, rows):
        missing = [Cell("test", model, task.name, row, None, seed) for seed in task.seeds or study.seeds]
        cells += tested[model, task.name, row] or missing
    scored = [task.name for task in study.tasks if task.name in BENCHMARKS]
    return Record(study.title, models, scored, rows, cells, study.guessed)


def _cell(result: Result, folder: Path) -> Cell:
    planned, failure = result.cell, result.failure
    # Paths are relative, so that the same study gives the same report in another folder.
    inside = f"{folder.resolve()}/"
    settings = {**planned.settings.to_dict(), "model": planned.settings.model.removeprefix(inside)}
    found: dict[str, Any] = {}
    if result.run is not None:
        found = _finished(result.run, planned.settings.task)
    elif failure is not None:
        state = "diverged" if failure.diverged else "failed"
        found = {"state": state, "reason": failure.reason.replace(inside, ""), "attempts": failure.attempts}
    names = (planned.stage, planned.model, planned.task, planned.row)
    return Cell(*names, planned.rate, planned.seed, settings=settings, **found)


def _finished(run: Run, task: str | None) -> dict[str, Any]:
    """The fields of a [`Cell`] with the results of a run on an lm-eval task."""
    try:
        rows = [] if task is None else run.scores(task)["examples"]
        examples = [Example(str(row["id"]), str(row["target"]), bool(row["correct"])) for row in rows]
        training = dict(run.training)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damage(run.folder, error) from error
    if task is not None and not examples:
        raise RunError(f"{run.folder} is damaged: it has no examples of {task}. Remove it and run the study again.")
    return {"state": "finished", "examples": examples, "training": training}
