"""The numbers of a report: means and standard deviations over seeds, differences to full fine-tuning, and averages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .records import Cell, Record

SFT, LORA = "full", "lora"


@dataclass(frozen=True)
class Score:
    """
    The test results of a row on a model and a task.

    Attributes:
        cells (`Sequence[Cell]`): The cells of all seeds of the study, run or not.
    """

    cells: Sequence[Cell]

    @cached_property
    def by_seed(self) -> dict[int, float]:
        """The accuracy of each seed that has one. It is 0 if training diverged."""
        return {cell.seed: cell.accuracy for cell in self.cells if cell.accuracy is not None}

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds. `None` for a single one."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    @property
    def complete(self) -> bool:
        return 0 < len(self.by_seed) == len(self.cells)

    def seeds(self, state: str) -> list[int]:
        """The seeds whose cells are in a state."""
        return [cell.seed for cell in self.cells if cell.state == state]

    @property
    def collapsed(self) -> list[int]:
        """The seeds whose runs are not better than the most frequent answer."""
        return [cell.seed for cell in self.cells if cell.collapsed]


@dataclass(frozen=True)
class Average:
    """
    The average over all tasks of a row, on a model. It exists only if all seeds of all tasks have a result.

    Attributes:
        accuracy (`float`): Mean of the tasks' means.
        deviation (`float`, *optional*): Sample standard deviation of the average over tasks of one seed, for the seeds
            that all tasks share. `None` if there is only one.
        delta (`float`, *optional*): The difference to the average of SFT, which is the average of the differences.
            `None` if SFT has no average.
    """

    accuracy: float
    deviation: float | None
    delta: float | None


class Summary:
    """
    All numbers of a report on the test stage of a study.

    Args:
        record ([`Record`]): The study.
        references (`Sequence[str]`, *optional*): The rows that all others are compared with. Default: those of full
            fine-tuning and LoRA, or the first one without them.

    Raises:
        ValueError: The study does not have one of `references`.
    """

    def __init__(self, record: Record, references: Sequence[str] = ()):
        self.record = record
        for name in references:
            if name not in record.rows:
                raise ValueError(f"There is no row {name!r} in this study. Its rows are: {', '.join(record.rows)}.")
        self.references = (
            list(dict.fromkeys(references))
            or [*record.with_method(SFT), *record.with_method(LORA)]
            or [*record.rows[:1]]
        )
        self._scores = {
            (model, row, task): Score(record.of("test", model, row, task))
            for model in record.models
            for row in record.rows
            for task in record.tasks
        }

    @property
    def sft(self) -> str | None:
        """The row of full fine-tuning that differences refer to: the first one."""
        return next(iter(self.record.with_method(SFT)), None)

    def score(self, model: str, row: str, task: str) -> Score:
        return self._scores[model, row, task]

    def tasks(self, model: str) -> list[str]:
        """The tasks on which a model is tested."""
        return [
            task for task in self.record.tasks if any(self.score(model, row, task).cells for row in self.record.rows)
        ]

    def delta(self, model: str, row: str, task: str) -> float | None:
        """The difference of the mean accuracy to that of SFT. `None` if a seed of either has no result."""
        if self.sft is None:
            return None
        ours, theirs = (self.score(model, name, task) for name in (row, self.sft))
        both = ours.complete and theirs.complete
        return (ours.mean or 0.0) - (theirs.mean or 0.0) if both else None

    def average(self, model: str, row: str) -> Average | None:
        scores = [self.score(model, row, task) for task in self.tasks(model)]
        if not scores or not all(score.complete for score in scores):
            return None
        accuracy = statistics.fmean(score.mean or 0.0 for score in scores)
        seeds = set.intersection(*(set(score.by_seed) for score in scores))
        of_seeds = [statistics.fmean(score.by_seed[seed] for score in scores) for seed in sorted(seeds)]
        deviation = statistics.stdev(of_seeds) if len(of_seeds) > 1 else None
        sft = None if self.sft in (None, row) else self.average(model, self.sft)
        delta = 0.0 if row == self.sft else None if sft is None else accuracy - sft.accuracy
        return Average(accuracy, deviation, delta)

    def trained(self, model: str, row: str, name: str) -> list[float]:
        """The different values of a statistic of training over a row's finished runs, sorted."""
        return sorted(
            {
                cell.training[name]
                for task in self.record.tasks
                for cell in self.score(model, row, task).cells
                if name in cell.training
            }
        )
