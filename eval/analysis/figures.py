"""What the pictures have in common: size, fonts, and colours that colour-blind readers can tell apart."""

from __future__ import annotations

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


def new_row(columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with several axes beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.6)
        each.set_axisbelow(True)
    return figure, axes


def draw(axes: Any, x: Any, y: Any, series: int, label: str | None = None, **kwargs: Any) -> None:
    """A line in the style of the series with this number. Points are marked where there are few."""
    style: dict[str, Any] = {"color": COLOURS[series % len(COLOURS)], "linestyle": LINES[series % len(LINES)]}
    if len(x) <= 64:
        style |= {"marker": MARKERS[series % len(MARKERS)], "markersize": 3.5}
    axes.plot(x, y, **{**style, "linewidth": 1.4, "label": label, **kwargs})


def legend_above(axes: Any, columns: int = 2) -> None:
    """A legend that covers nothing."""
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns)


def over_blocks(axes: Any, label: str) -> None:
    """Labels axes whose x axis is the index of a block."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("block")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
