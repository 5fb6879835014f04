"""Several results side by side, as a Markdown table and as a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_steer.files import read_json

from .generation import SETTINGS
from .judging import RESULT

PAPER_JUDGE = "paper, Table 3"
# Columns of the table by the names of result.json.
_NUMBERS = {
    "lc": "length_controlled_winrate",
    "lc_se": "lc_standard_error",
    "win_rate": "win_rate",
    "se": "standard_error",
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Win rates and their standard errors are in percent, lengths in characters; NaN is a number that could not be
    computed, None one that was never given. `doubts` say why it is not comparable with the leaderboard.
    """

    name: str
    parameters: str
    lc: float | None
    lc_se: float | None
    win_rate: float | None = None
    se: float | None = None
    length: int | None = None
    n: int | None = None
    judge: str = ""
    doubts: tuple[str, ...] = ()


# Llama-3.1-8B on Alpaca-Cleaned: method, trainable share, LC win rate, standard error (n = 805).
PAPER = [
    Row("Full SFT", "100%", 11.49, 0.51, n=805, judge=PAPER_JUDGE),
    Row("Post-block steering, nonlinear, r=16", "0.05%", 11.34, 0.48, n=805, judge=PAPER_JUDGE),
    Row("Post-block steering, linear, r=16", "0.05%", 11.00, 0.53, n=805, judge=PAPER_JUDGE),
    Row("LoRA, r=16", "0.52%", 9.59, 0.40, n=805, judge=PAPER_JUDGE),
    Row("LoRA, r=8", "0.26%", 10.52, 0.48, n=805, judge=PAPER_JUDGE),
    Row("ReFT, all layers", "0.05%", 10.96, 0.43, n=805, judge=PAPER_JUDGE),
    Row("ReFT, 4 layers", "0.004%", 9.50, 0.49, n=805, judge=PAPER_JUDGE),
]


def read(path: Path) -> list[Row]:
    """The results in a folder: its own, or those of the judges' folders in it.

    Raises:
        ValueError: if there are none.
    """
    if path.is_file():
        files = [path]
    else:
        files = [path / RESULT] if (path / RESULT).is_file() else sorted(path.glob(f"*/{RESULT}"))
    if not files:
        raise ValueError(
            f"{path} holds no {RESULT}, nor does a folder in it; run `trl-steer alpaca-eval judge` first."
        )
    return [_row(file) for file in files]


def _row(file: Path) -> Row:
    result = read_json(file)
    if not isinstance(result, dict) or not {*_NUMBERS.values(), "judge", "missing_rows"} <= result.keys():
        raise ValueError(f"{file} was not written by `trl-steer alpaca-eval judge`.")
    settings = file.parent.parent / SETTINGS
    counts = (read_json(settings).get("parameters") if settings.is_file() else None) or {}
    judge = result["judge"]
    return Row(
        name=result["name"],
        parameters=_parameters(counts),
        **{field: math.nan if result[name] is None else result[name] for field, name in _NUMBERS.items()},
        length=result["avg_length"],
        n=result["n_total"],
        judge=judge["name"] if judge["shipped"] else f"{judge['name']} ({', '.join(judge['models'])})",
        doubts=_doubts(result),
    )


def _doubts(result: dict[str, Any]) -> tuple[str, ...]:
    """What a reader of the numbers has to know; empty for a whole result that the leaderboard's compare with."""
    missing = len(result["missing_rows"])
    incomplete = (f"INCOMPLETE: {missing} rows have no judgement",) if missing else ()
    return (*incomplete, *result["not_comparable_because"])


def _parameters(counts: dict[str, Any]) -> str:
    """Those of the adapter and their share of the base model's, or those of a whole model."""
    if not counts:
        return ""
    if counts.get("adapter") is None:
        return f"{counts['base']:,}"
    return f"{counts['adapter']:,} ({counts['adapter'] / counts['base']:.3%})"


def markdown(rows: Sequence[Row]) -> str:
    """A table, with a footnote for each result that the leaderboard's cannot be compared with, which says why."""
    lines = [
        "| model | parameters | LC win rate | SE | win rate | SE | length | n | judge |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        numbers = " | ".join(_number(value) for value in (row.lc, row.lc_se, row.win_rate, row.se))
        name = f"{row.name} *" if row.doubts else row.name
        counts = " | ".join("" if value is None else str(value) for value in (row.length, row.n))
        lines.append(f"| {name} | {row.parameters} | {numbers} | {counts} | {row.judge} |")
    for row in rows:
        if row.doubts:
            lines += ["", f"\\* {row.name}: not comparable with the leaderboard: {'; '.join(row.doubts)}."]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:  # the paper does not say
        return ""
    return "**NaN**" if math.isnan(value) else f"{value:.2f}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Length-controlled win rates with their standard errors, one line each, to an image file.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'trl-steer[analysis]'") from error
    drawn = [row for row in rows if row.lc is not None and not math.isnan(row.lc)]
    figure = Figure(figsize=(7, 1 + 0.4 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    for position, row in enumerate(reversed(drawn)):
        color = "tab:gray" if row.judge == PAPER_JUDGE else "tab:blue"
        filled = "white" if row.doubts else color
        axes.errorbar(
            [row.lc or 0.0], [position], xerr=[row.lc_se or 0.0], fmt="o", capsize=3, color=color, mfc=filled
        )
    axes.set_yticks(range(len(drawn)), [row.name for row in reversed(drawn)])
    axes.set_xlabel(
        "LC win rate (%), bars: standard error; gray: paper, hollow: not comparable with the leaderboard",
        fontsize="small",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
