"""Several results side by side, as a Markdown table and as a plot."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trl_steer.extras import require
from trl_steer.files import read_json

from ..report.paper import TABLE_3
from .generation import SETTINGS
from .judging import NUMBERS, RESULT

# The settings of the authors' code.
PAPER_SETTINGS = "paper: prompt alpaca, 512 new tokens; alpaca_eval_gpt4_turbo_fn (gpt-4-1106-preview)"


class Row(NamedTuple):
    """A row of the table.

    `numbers` are the LC win rate, its standard error, the win rate and its standard error, in percent: NaN if it could
    not be computed, `None` if it is not given. `doubts` are reasons why they are not comparable with the leaderboard.
    """

    name: str
    parameters: str
    numbers: Sequence[float | None]
    length: int | None = None
    n: int = 805
    settings: str = PAPER_SETTINGS
    doubts: Sequence[str] = ()


PAPER = [Row(name, f"{share:g}%", (rate, error, None, None)) for name, share, rate, error in TABLE_3]


def read(path: Path) -> list[Row]:
    """The results in a folder of a judge, or in the judges' folders inside."""
    files = [path / RESULT] if (path / RESULT).is_file() else sorted(path.glob(f"*/{RESULT}"))
    if not files:
        raise ValueError(f"There is no {RESULT} in {path} or a folder inside. Run `judge` first.")
    return [_row(file) for file in files]


def _row(file: Path) -> Row:
    result, generation = read_json(file), file.parent.parent / SETTINGS
    if not isinstance(result, dict) or not {*NUMBERS, "judge", "missing_rows"} <= result.keys():
        raise ValueError(f"{file} is not a result of `trl-steer alpaca-eval judge`.")
    written = read_json(generation) if generation.is_file() else {}
    judge, missing = result["judge"], len(result["missing_rows"])
    generated = f"prompt {written.get('prompt_form')}, {written.get('max_new_tokens')} new tokens; " if written else ""
    numbers = [math.nan if result[name] is None else result[name] for name in NUMBERS]
    incomplete = [f"INCOMPLETE: {missing} rows without a judgement"] if missing else []
    settings, doubts = f"{generated}{judge['name']} ({judge['model']})", incomplete + result["not_comparable_because"]
    counts = written.get("parameters") or {"base": None}
    parameters = "" if counts["base"] is None else f"{counts['base']:,}"
    if counts.get("adapter"):
        parameters = f"{counts['adapter']:,} ({counts['adapter'] / counts['base']:.3%})"
    return Row(result["name"], parameters, numbers, result["avg_length"], result["n_total"], settings, doubts)


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, with a footnote for each result that is not comparable with the leaderboard."""
    lines = [
        "| model | parameters | LC win rate | SE | win rate | SE | length | n | settings; judge |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        name, values = f"{row.name} *" if row.doubts else row.name, (*row.numbers, row.length, row.n)
        cells = [name, row.parameters, *map(_cell, values), row.settings]
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if row.doubts:
            lines += ["", f"\\* {row.name}: not comparable with the leaderboard: {'; '.join(row.doubts)}."]
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    if isinstance(value, float):
        return "**NaN**" if math.isnan(value) else f"{value:.2f}"
    return "" if value is None else str(value)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plots length-controlled win rates with their standard errors to an image file."""
    require("alpaca", "matplotlib")
    from matplotlib.figure import Figure

    drawn = [row for row in reversed(rows) if not math.isnan(row.numbers[0] or math.nan)]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    for position, row in enumerate(drawn):
        color = "tab:gray" if row.settings == PAPER_SETTINGS else "tab:blue"
        filled = "white" if row.doubts else color
        rate, error_bar = (0.0 if value is None or math.isnan(value) else value for value in row.numbers[:2])
        axes.errorbar(rate, position, xerr=error_bar, fmt="o", capsize=3, color=color, mfc=filled)
    axes.set_yticks(range(len(drawn)), [row.name for row in drawn])
    axes.set_xlabel("LC win rate (%) and its standard error\ngray: paper; hollow: not comparable with the leaderboard")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
