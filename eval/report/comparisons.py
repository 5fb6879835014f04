"""Paired tests of all rows against the reference rows: full fine-tuning and LoRA."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from trl_steer.statistics import Interval, exact_sign_flip, holm, paired_bootstrap, t_interval

from ..runs import RunError
from .records import Cell, Record
from .summary import Summary

LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """
    A row and a reference on the same examples of a task, over the seeds for which both have a result.

    Attributes:
        model (`str`), task (`str`), row (`str`), reference (`str`): What is compared.
        seeds (`Sequence[int]`): The seeds.
        difference (`float`): The mean over seeds of the accuracy of the row minus that of the reference.
        over_examples (`tuple[float, float]`): 95% interval for other examples and these seeds: a bootstrap.
        over_seeds (`tuple[float, float]`): 95% interval for other seeds and these examples: Student's t.
        p_value (`float`): Of the exact sign-flip test over examples.
        corrected (`float`): The same after Holm's correction over all comparisons with this reference.
    """

    model: str
    task: str
    row: str
    reference: str
    seeds: Sequence[int]
    difference: float
    over_examples: Interval
    over_seeds: Interval
    p_value: float
    corrected: float

    @property
    def beyond_noise(self) -> bool:
        """Whether neither the choice of examples nor that of seeds explains the difference."""
        low, high = self.over_seeds
        return self.corrected < LEVEL and not low <= 0 <= high


@dataclass(frozen=True)
class _Pair:
    """The answers of a row and a reference: for each seed, the difference of each example, -1, 0 or 1."""

    ours: Sequence[Cell]
    differences: Sequence[Sequence[int]]
    same_examples: bool

    @property
    def units(self) -> list[int]:
        """What is independent under the null hypothesis: examples, with the sum over seeds that share them."""
        if self.same_examples:
            return [sum(of_example) for of_example in zip(*self.differences, strict=True)]
        return [value for of_seed in self.differences for value in of_seed]


def compare(summary: Summary) -> dict[str, list[Comparison]]:
    """For each reference, the comparisons of all other rows with it, on all models and tasks.

    Raises:
        RunError: Two runs with the same seed were evaluated on different examples.
    """
    return {reference: _against(reference, summary) for reference in summary.references}


def _against(reference: str, summary: Summary) -> list[Comparison]:
    pairs = list(_pairs(reference, summary.record))
    p_values = [exact_sign_flip(pair.units) for pair in pairs]
    return [
        _comparison(reference, pair, p_value, corrected)
        for pair, p_value, corrected in zip(pairs, p_values, holm(p_values), strict=True)
    ]


def _comparison(reference: str, pair: _Pair, p_value: float, corrected: float) -> Comparison:
    by_seed = [statistics.fmean(of_seed) for of_seed in pair.differences]
    scale = len(by_seed) if pair.same_examples else 1
    _, over_examples = paired_bootstrap([unit / scale for unit in pair.units], [0.0] * len(pair.units))
    cell = pair.ours[0]
    return Comparison(
        *(cell.model, cell.task, cell.row, reference),
        seeds=[cell.seed for cell in pair.ours],
        difference=statistics.fmean(by_seed),
        over_examples=over_examples,
        over_seeds=t_interval(by_seed),
        p_value=p_value,
        corrected=corrected,
    )


def _pairs(reference: str, record: Record) -> Iterator[_Pair]:
    for model, task, row in product(record.models, record.tasks, record.rows):
        theirs = {cell.seed: cell for cell in record.of("test", model, reference, task)}
        both = [(cell, theirs[cell.seed]) for cell in record.of("test", model, row, task) if cell.seed in theirs]
        # Two runs that diverged gave no answers to compare.
        compared = [(a, b) for a, b in both if None not in (a.accuracy, b.accuracy) and (a.examples or b.examples)]
        if row != reference and compared:
            yield _pair(compared)


def _pair(compared: Sequence[tuple[Cell, Cell]]) -> _Pair:
    differences, examples = [], set()
    for ours, theirs in compared:
        asked = [[(example.id, example.target) for example in cell.examples] for cell in (ours, theirs)]
        if ours.examples and theirs.examples and asked[0] != asked[1]:
            shared = len({*asked[0]} & {*asked[1]})
            raise RunError(
                f"{ours.model}, {ours.task}, seed {ours.seed}: a paired test needs the same examples, but the runs of "
                f"{ours.row} and {theirs.row} were evaluated on {len(asked[0])} and {len(asked[1])}, {shared} in "
                "common. Remove those of one row and run them again."
            )
        examples.add(tuple(asked[0] or asked[1]))
        correct = [[example.correct for example in cell.examples] for cell in (ours, theirs)]
        # A run that diverged answered nothing correctly.
        sides = [side or [False] * len(asked[0] or asked[1]) for side in correct]
        differences.append([a - b for a, b in zip(*sides, strict=True)])
    return _Pair([ours for ours, _ in compared], differences, same_examples=len(examples) == 1)
