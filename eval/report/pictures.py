"""The pictures of a report. Each shows one thing, in a panel for each model or method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

from trl_steer.statistics import binomial_standard_error

from ..analysis import figures
from .paper import title
from .records import Cell, Record
from .results import rate as format_rate
from .summary import Summary

PARAMETERS, RANK, RATES = "parameters", "rank", "rates"  # how the names of the files begin
PANEL, SMALL_PANEL = 3.6, 2.3  # the sides of a panel in inches
COLUMNS = 4
# The methods whose rank has a picture, and what it calls them.
WITH_RANKS = {"low_rank": "low-rank steering", "sublayer": "sublayer steering", "loreft": "LoReFT"}


def pictures(summary: Summary) -> dict[str, bytes]:
    """The PNG files by name: those for which the study has results."""
    made = {f"{PARAMETERS}.png": against_parameters(summary)}
    for task in summary.record.tasks:
        for method in WITH_RANKS:
            made[f"{RANK}_{method}_{task}.png"] = against_rank(summary, method, task)
        made[f"{RATES}_{task}.png"] = against_rate(summary.record, task)
    return {name: figures.png(figure) for name, figure in made.items() if figure is not None}


def is_ours(name: str) -> bool:
    """Whether [`pictures`] makes files of this name."""
    return name.endswith(".png") and name.startswith((PARAMETERS, RANK, RATES))


def against_parameters(summary: Summary) -> Any:
    """The average accuracy over tasks against the trainable parameters, with standard deviations over seeds."""
    record = summary.record
    points: dict[str, dict[int, float]] = {}
    for model in record.models:
        for series, row in enumerate(record.rows):
            found = summary.trained(model, row, "trainable_parameters")
            if summary.average(model, row) and found:
                points.setdefault(model, {})[series] = found[-1]
    if not points:
        return None
    figure, panels = _panels(len(points), PANEL)
    for axes, (model, of_model) in zip(panels, points.items(), strict=True):
        for series, parameters in _spread(of_model).items():
            row = record.rows[series]
            average = summary.average(model, row)
            if average:
                point = ([parameters], [100 * average.accuracy], [100 * (average.deviation or 0.0)])
                figures.draw_errors(axes, *point, series, row, linestyle="none", markersize=6)
        _count_axis(axes, max(of_model.values()) / min(of_model.values()))
        axes.set_xlabel("trainable parameters")
        axes.set_title(figures.plain(model), fontsize=9)
    tasks = len(record.tasks)
    panels[0].set_ylabel(f"accuracy (%), average over {tasks} tasks" if tasks > 1 else "accuracy (%)")
    figures.legend_beside(figure, panels, record.rows)
    return figure


def against_rank(summary: Summary, method: str, task: str) -> Any:
    """Accuracy on a task against the rank of a method, with and without nonlinearity, as in the paper's Figure 5.

    There is a panel for each model and site.
    """
    record, drawn = summary.record, {}
    for model, (site, lines) in product(record.models, _rows_by_rank(record, method).items()):
        found = {label: _line(summary, model, task, rows) for label, rows in lines.items()}
        if any(ranks for ranks, *_ in found.values()):
            drawn[", ".join(filter(None, (model, site)))] = found
    ranks = sorted({rank for found in drawn.values() for of_line, *_ in found.values() for rank in of_line})
    if len(ranks) < 2:
        return None
    figure, panels = _panels(len(drawn), PANEL)
    for axes, (name, found) in zip(panels, drawn.items(), strict=True):
        for series, (label, (of_line, means, errors)) in enumerate(found.items()):
            apart = 1.04 ** (series - (len(found) - 1) / 2)  # so that error bars do not cover each other
            figures.draw_errors(axes, [rank * apart for rank in of_line], means, errors, series, label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set_title(figures.plain(name), fontsize=9)
    figure.supxlabel(f"rank of {WITH_RANKS[method]}", fontsize=9)
    figure.supylabel(f"{title(task)}, accuracy (%)", fontsize=9)
    figures.legend_beside(figure, panels)
    return figure


def against_rate(record: Record, task: str) -> Any:
    """Validation accuracy on a task against the learning rate, in a panel for each row.

    Error bars are standard errors over examples for a single seed, and standard deviations over seeds for several.
    Crosses are rates at which a run diverged. The rate of the test stage has a ring.
    """
    rows = [row for row in record.rows if any(record.of("rates", model, row, task) for model in record.models)]
    tried = {row: [_rates(record, model, row, task) for model in record.models] for row in rows}
    rows = [row for row in rows if max(map(len, tried[row])) > 1]
    if not rows:
        return None
    figure, panels = _panels(len(rows), SMALL_PANEL)
    for axes, row in zip(panels, rows, strict=True):
        for series, (model, rates) in enumerate(zip(record.models, tried[row], strict=True)):
            _rate_line(axes, rates, series, model)
            chosen = {cell.rate for cell in record.of("test", model, row, task)}
            _ring(axes, {rate: cells for rate, cells in rates.items() if rate in chosen}, series)
        axes.set_xscale("log")
        ticks = sorted({rate for rates in tried[row] for rate in rates})
        axes.set_xticks(ticks, [format_rate(rate) for rate in ticks], fontsize=7, rotation=45)
        axes.set_xticks([], minor=True)
        axes.set_title(figures.plain(row), fontsize=8)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel(f"{title(task)}, validation accuracy (%)", fontsize=9)
    figures.legend_beside(figure, panels)
    return figure


def _panels(count: int, side: float) -> tuple[Any, list[Any]]:
    """A figure with this many panels that share the y axis, in several lines if there are many."""
    columns = min(COLUMNS, count)
    lines = math.ceil(count / columns)
    figure, panels = figures.new_row(columns, side * columns, side * lines, lines, sharey=True)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _count_axis(axes: Any, ratio: float) -> None:
    """A logarithmic axis of counts, such as 20k, which span this ratio."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 100 else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _spread(values: dict[int, float], nearest: float = 1.18) -> dict[int, float]:
    """Moves positive values that are closer than this factor apart, around their geometric mean."""
    groups: list[list[int]] = []
    for name in sorted(values, key=lambda name: (values[name], name)):
        near = bool(groups) and values[name] < nearest * values[groups[-1][-1]]
        groups = [*groups[:-1], [*groups[-1], name]] if near else [*groups, [name]]
    return {
        name: statistics.geometric_mean(values[other] for other in group) * nearest ** (place - (len(group) - 1) / 2)
        for group in groups
        for place, name in enumerate(group)
    }


def _rows_by_rank(record: Record, method: str) -> dict[str, dict[str, dict[int, str]]]:
    """The rows of a method by site, by what else is different between them, such as the activation, and by rank."""
    settings = {row: dict(record.setting(row, "steering") or {}) for row in record.with_method(method)}
    settings = {row: values for row, values in settings.items() if values.pop("steering_type", None) != "vector"}
    sites = {row: values.pop("site", "") for row, values in settings.items()}
    texts = {
        row: {"activation": values.pop("activation", None) or "linear"}
        | {name: f"{name}={values[name]}" for name in values}
        for row, values in settings.items()
    }
    names = sorted({name for values in texts.values() for name in values})
    different = [name for name in names if len({values.get(name) for values in texts.values()}) > 1] or ["activation"]
    found: dict[str, dict[str, dict[int, str]]] = {}
    for row, values in texts.items():
        label = ", ".join(values[name] for name in different if name in values)
        found.setdefault(sites[row], {}).setdefault(label, {}).setdefault(record.setting(row, "r"), row)
    return found


def _line(summary: Summary, model: str, task: str, rows: dict[int, str]) -> tuple[list[int], list[float], list[float]]:
    """Ranks, accuracies in percent and their standard deviations."""
    scores = [(rank, summary.score(model, rows[rank], task)) for rank in sorted(rows)]
    known = [(rank, score.mean, score.deviation or 0.0) for rank, score in scores if score.mean is not None]
    return [rank for rank, *_ in known], [100 * mean for _, mean, _ in known], [100 * sd for *_, sd in known]


def _rates(record: Record, model: str, row: str, task: str) -> dict[float, list[Cell]]:
    """The cells with a result at each rate."""
    found: dict[float, list[Cell]] = {}
    for cell in record.of("rates", model, row, task):
        if cell.rate is not None and cell.accuracy is not None:
            found.setdefault(cell.rate, []).append(cell)
    return dict(sorted(found.items()))


def _rate_line(axes: Any, rates: dict[float, list[Cell]], series: int, label: str) -> None:
    means = _means(rates)
    errors = [100 * _error(cells) for cells in rates.values()]
    figures.draw_errors(axes, list(rates), means, errors, series, label)
    lost = [(rate, mean) for (rate, cells), mean in zip(rates.items(), means, strict=True) if _diverged(cells)]
    axes.plot([rate for rate, _ in lost], [mean for _, mean in lost], "x", color="black", markersize=7, zorder=3)


def _ring(axes: Any, rates: dict[float, list[Cell]], series: int) -> None:
    axes.plot(list(rates), _means(rates), "o", markersize=9, markerfacecolor="none", color=figures.colour(series))


def _means(rates: dict[float, list[Cell]]) -> list[float]:
    return [100 * statistics.fmean(cell.accuracy or 0.0 for cell in cells) for cells in rates.values()]


def _diverged(cells: Sequence[Cell]) -> bool:
    return any(cell.state == "diverged" for cell in cells)


def _error(cells: Sequence[Cell]) -> float:
    if len(cells) > 1:
        return statistics.stdev(cell.accuracy or 0.0 for cell in cells)
    examples = cells[0].examples
    return binomial_standard_error(sum(example.correct for example in examples), len(examples)) if examples else 0.0
