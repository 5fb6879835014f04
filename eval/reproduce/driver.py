"""Makes the cells of a study, in two stages."""

import shutil
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from trl_steer.files import locked, new_folder, remove, write_json

from ..console import Report
from ..runs import Run
from .results import CELLS, FAILED, Failure, Result, best_rates, result_of
from .study import Cell, Study, key_of, save
from .worker import Outcome

# A cell that fails is tried again twice.
ATTEMPTS = 3


class Engine(Protocol):
    """Makes cells at the same time. See [`LocalEngine`] and [`RayEngine`]."""

    def is_free(self) -> bool: ...

    def is_idle(self) -> bool: ...

    def submit(self, cell: Cell) -> None: ...

    def wait(self) -> list[tuple[Cell, Outcome]]: ...


def reproduce(
    study: Study,
    folder: Path,
    engine: AbstractContextManager[Engine],
    report: Report,
    take_from: Path | None = None,
) -> list[Result]:
    """Makes all cells of a study that are not finished, and returns all cells.

    Cells that failed in an earlier call are tried again, except those that diverged.

    Args:
        study (`Study`): The study.
        folder (`Path`): Its folder.
        engine (`ContextManager[Engine]`): Makes the cells. It is entered when the folder is locked.
        report (`Report`): Receives the progress.
        take_from (`Path`, *optional*): Folder of other runs. Finished ones with the settings of a cell are copied.

    Raises:
        FolderInUseError: Another process makes the cells of this folder.
    """
    with locked(folder), engine as started:
        save(study, folder)
        report.start(1)
        report.step(study.name)
        driver = _Driver(folder, started, report, study.size(), _runs_in(take_from))
        first = driver.make(study.rate_cells())
        second = driver.make(study.test_cells(best_rates(first)))
        report.end(driver.summary())
    return first + second


class _Driver:
    def __init__(self, folder: Path, engine: Engine, report: Report, total: int, others: dict[str, Run]):
        self.folder, self.engine, self.report, self.total = folder, engine, report, total
        self.others = others
        self.counts: Counter[str] = Counter()

    def make(self, cells: Iterable[Cell]) -> list[Result]:
        """Makes the cells that are not finished. Returns all of them."""
        cells = list(cells)
        queue: deque[Cell] = deque()
        for cell in {cell.key: cell for cell in cells}.values():
            self._take(cell)
            found = result_of(cell, self.folder)
            if found.run is not None or (found.failure is not None and found.failure.diverged):
                self._count(found)
            else:
                queue.append(cell)
        self._show_progress()  # once, so that the time that is left does not follow from cells that took none
        attempts: Counter[str] = Counter()
        while queue or not self.engine.is_idle():
            while queue and self.engine.is_free():
                self.engine.submit(queue.popleft())
            for cell, outcome in self.engine.wait():
                attempts[cell.key] += 1
                if self._record(cell, outcome, attempts[cell.key]):
                    self._count(result_of(cell, self.folder))
                    self._show_progress()
                else:
                    queue.append(cell)
        return [result_of(cell, self.folder) for cell in cells]

    def summary(self) -> str:
        """The numbers of finished and failed cells."""
        parts = [f"{self.counts['finished']} finished"]
        parts += [f"{self.counts[name]} {name}" for name in ("diverged", "failed") if self.counts[name]]
        return ", ".join(parts)

    def _record(self, cell: Cell, outcome: Outcome, attempts: int) -> bool:
        """Writes why a cell failed. Returns whether it is not to be tried again."""
        file = self.folder / FAILED / f"{cell.key}.json"
        if outcome.reason is None and not (self.folder / CELLS / cell.key).is_dir():
            outcome = Outcome(f"The worker finished, but {self.folder} does not have its run. Use a shared folder.")
        if outcome.reason is None:
            remove(file)
            return True
        if not outcome.diverged and attempts < ATTEMPTS:
            self.report.note(f"{name_of(cell)} failed and will be tried again: {outcome.reason}")
            return False
        write_json(file, Failure(outcome.reason, attempts, outcome.diverged)._asdict())
        self.report.note(f"{name_of(cell)} failed: {outcome.reason}")
        return True

    def _take(self, cell: Cell) -> None:
        """Copies the run of a cell if there is one in another folder."""
        target = self.folder / CELLS / cell.key
        if cell.key in self.others and not target.is_dir():
            with new_folder(target) as partial:
                shutil.copytree(self.others[cell.key].folder, partial, dirs_exist_ok=True)

    def _count(self, result: Result) -> None:
        failure = result.failure
        self.counts["finished" if failure is None else "diverged" if failure.diverged else "failed"] += 1

    def _show_progress(self) -> None:
        self.report.progress(self.counts.total(), self.total, self.summary())


def _runs_in(folder: Path | None) -> dict[str, Run]:
    """The finished runs in the subfolders of a folder, by the key of the cell that they would be."""
    found = {}
    for path in sorted(folder.iterdir()) if folder is not None else ():
        run = Run(path)
        settings = run.settings
        if settings is not None and run.is_finished(
            settings.get("task"), keep_weights=settings.get("keep_weights", True)
        ):
            found[key_of(settings)] = run
    return found


def name_of(cell: Cell) -> str:
    """A cell in words."""
    return f"{cell.model}, {cell.task}, {cell.row}, rate {cell.rate:g}, seed {cell.seed} ({cell.key})"
