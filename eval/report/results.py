"""The tables of a study's results, in the form of the paper's tables."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from .comparisons import Comparison
from .paper import title
from .records import Record
from .summary import Score, Summary
from .tables import Bold, Table

# What follows a number, and what stands where there is none.
COLLAPSED, DIVERGED, LOWEST, HIGHEST, NONE = "†", "‡", "↓", "↑", "-"
MARKS = (
    f"{COLLAPSED}: a seed collapsed; its accuracy is not above that of giving the most frequent answer of the test "
    f"set to everything. {DIVERGED}: a seed diverged, which counts as an accuracy of 0. (n/m): the mean of the n of m "
    f"seeds that have a result. {NONE}: no result. A difference needs all seeds of both rows, and an average those "
    "of all tasks. Differences are those of unrounded values."
)


def percent(value: float | None) -> str:
    """A share in percent."""
    return NONE if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference of two shares in points."""
    if value is None or math.isinf(value):
        return NONE
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text


def trainable(shares: Sequence[float]) -> str:
    """The trainable share in percent, from the smallest to the largest one if tasks differ."""
    texts = list(dict.fromkeys(f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%" for share in shares))
    return NONE if not texts else texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def rate(value: float) -> str:
    """A learning rate, such as 2e-3."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def accuracy_table(summary: Summary) -> Table:
    """Mean accuracies and their differences to SFT, as in the paper's Tables 1 and 2."""
    record, delta = summary.record, ["Δ"] if summary.sft else []
    header = ["Model", "Method", "Trainable", *(name for task in _columns(record) for name in (task, *delta))]
    rows = []
    for model, row, first in _groups(record):
        cells = [model if first else "", row, trainable(summary.trained(model, row, "trainable_share"))]
        for task in record.tasks:
            cells += [
                _score(summary.score(model, row, task)),
                *(points(summary.delta(model, row, task)) for _ in delta),
            ]
        average = summary.average(model, row)
        cells += [percent(average.accuracy if average else None)]
        cells += [points(average.delta if average else None) for _ in delta]
        rows.append(cells[: len(header)])
    minus_sft = f", and its difference to {summary.sft} in points" if summary.sft else ""
    return Table("accuracy", f"Accuracy in percent, mean over seeds{minus_sft}. {MARKS}", header, rows)


def deviation_table(summary: Summary) -> Table:
    """Standard deviations over seeds, as in the paper's appendix F.3."""
    record, rows = summary.record, []
    header = ["Model", "Method", *_columns(record)]
    for model, row, first in _groups(record):
        scores = [summary.score(model, row, task) for task in record.tasks]
        average = summary.average(model, row)
        deviations = [*(score.deviation for score in scores), average.deviation if average else None]
        rows.append([model if first else "", row, *map(percent, deviations)][: len(header)])
    return Table("deviation", "Standard deviation of the accuracy over seeds, in points.", header, rows)


def rate_table(summary: Summary) -> Table:
    """The learning rates of the test stage, as in the paper's appendix F.2."""
    record, rows = summary.record, []
    for model, row, first in _groups(record):
        cells = []
        for task in record.tasks:
            grid = sorted({cell.rate for cell in record.of("rates", model, row, task) if cell.rate is not None})
            chosen = sorted({cell.rate for cell in record.of("test", model, row, task) if cell.rate is not None})
            cells.append(", ".join(rate(value) + _edge(value, grid) for value in chosen) or NONE)
        rows.append([model if first else "", row, *cells])
    return Table("rates", "Learning rates of the test stage.", ["Model", "Method", *map(title, record.tasks)], rows)


def comparison_table(reference: str, comparisons: Sequence[Comparison]) -> Table:
    """All other rows against a reference."""
    rows, before = [], ("", "")
    for found in comparisons:
        difference, group = points(found.difference), (found.model, found.task)
        cells = [
            found.model if found.model != before[0] else "",
            title(found.task) if group != before else "",
            found.row,
        ]
        cells += [str(len(found.seeds)), Bold(difference) if found.beyond_noise else difference]
        cells += [_interval(interval) for interval in (found.over_examples, found.over_seeds)]
        rows.append([*cells, f"{found.p_value:.2g}", f"{found.corrected:.2g}"])
        before = group
    header = ["Model", "Task", "Method", "Seeds", "Difference", "95%, examples", "95%, seeds", "p", "p, Holm"]
    caption = f"Differences to {reference} on the same examples, in points."
    name = "-".join(re.findall(r"[a-z0-9]+", f"against {reference}".lower()))
    return Table(name, caption, header, rows, left=3)


def _columns(record: Record) -> list[str]:
    """The tasks, and the average if there are several."""
    return [*map(title, record.tasks), *(["Avg."] if len(record.tasks) > 1 else [])]


def _groups(record: Record) -> list[tuple[str, str, bool]]:
    """Model and row of each row of a table, and whether it is the first one of the model."""
    found = []
    for model in record.models:
        rows = [row for row in record.rows if any((cell.model, cell.row) == (model, row) for cell in record.cells)]
        found += [(model, row, row == rows[0]) for row in rows]
    return found


def _score(score: Score) -> str:
    marks = (COLLAPSED if score.collapsed else "") + (DIVERGED if score.seeds("diverged") else "")
    seeds = "" if score.complete or score.mean is None else f" ({len(score.by_seed)}/{len(score.cells)})"
    return f"{percent(score.mean)}{marks}{seeds}"


def _edge(value: float, grid: Sequence[float]) -> str:
    if len(grid) < 2 or value not in (grid[0], grid[-1]):
        return ""
    return LOWEST if value == grid[0] else HIGHEST


def _interval(interval: tuple[float, float]) -> str:
    return NONE if math.isinf(interval[0]) else " to ".join(map(points, interval))
