"""What the pictures have in common: size, fonts, and colours that colour-blind readers can tell apart."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

# Okabe and Ito's palette, without yellow, which is faint on white. Series also differ in marker and line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1)), (0, (5, 1)), "-")
# From white, for magnitudes.
SEQUENTIAL = "Blues"


def new_figure(width: float = 6.4, height: float = 3.8) -> tuple[Any, Any]:
    """A figure and its axes. It needs no display."""
    figure, (axes,) = new_row(1, width, height)
    return figure, axes


def new_row(columns: int, width: float, height: float, rows: int = 1, **kwargs: Any) -> tuple[Any, list[Any]]:
    """A figure with several axes beside each other, in one or more rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.6)
        each.set_axisbelow(True)
    return figure, axes


def draw(axes: Any, x: Any, y: Any, series: int, label: str | None = None, **kwargs: Any) -> None:
    """A line in the style of the series with this number. Points are marked where there are few."""
    axes.plot(x, y, **{**_style(series, len(x) <= 64), "label": label, **kwargs})


def draw_errors(axes: Any, x: Any, y: Any, errors: Any, series: int, label: str | None = None, **kwargs: Any) -> None:
    """As [`draw`], with error bars."""
    axes.errorbar(x, y, yerr=errors, **{**_style(series), "capsize": 2.5, "elinewidth": 1, "label": label, **kwargs})


def colour(series: int) -> str:
    return COLOURS[series % len(COLOURS)]


def _style(series: int, marked: bool = True) -> dict[str, Any]:
    turn, number = divmod(series, len(COLOURS))
    style: dict[str, Any] = {"color": colour(series), "linestyle": LINES[number], "linewidth": 1.4}
    # Beyond the last colour, the first one has another marker.
    return style | ({"marker": MARKERS[(number + turn) % len(MARKERS)], "markersize": 3.5} if marked else {})


def plain(text: str) -> str:
    """A text whose dollar signs stand for themselves, and not for formulas between them."""
    return text.replace("$", r"\$")


def legend_above(axes: Any, columns: int = 2) -> None:
    """A legend that covers nothing."""
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns)


def legend_beside(figure: Any, panels: Sequence[Any], order: Sequence[str] = ()) -> None:
    """A legend with each name in any of these axes once, to the right of a figure, which becomes wider. None for a
    single name."""
    named: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        named |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in named}
    named = {label: named[label] for label in (*order, *named) if label in named}
    if len(named) > 1:
        width, height = figure.get_size_inches()
        columns = math.ceil(len(named) / (height / 0.18))  # a line of 8 points, with the space between lines
        figure.set_size_inches(width + columns * (0.6 + 0.065 * max(map(len, named))), height)
        place = {"loc": "outside right center", "ncols": columns}
        figure.legend(named.values(), map(plain, named), frameon=False, fontsize=8, **place)


def png(figure: Any) -> bytes:
    """The PNG file of a figure. It does not name the version of matplotlib, so that equal figures are equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def over_blocks(axes: Any, label: str) -> None:
    """Labels axes whose x axis is the index of a block."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("block")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
