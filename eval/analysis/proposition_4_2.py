"""Proposition 4.2 on the construction of its proof: do weight and steering updates learn the same subspace?"""

from __future__ import annotations

import argparse
from typing import Any

from ..console import Report as Progress
from . import arguments, figures, inputs
from .report import Report, table

COLUMNS = ("largest_cosine", "mean_cosine", "shift_cosine", "test_loss")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=arguments.positive, default=20, help="number of seeds (default: 20)")


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from trl_steer.analysis import proposition_4_2

    if args.seeds < 2:
        raise ValueError("Expected at least 2 seeds, for a standard deviation.")
    rows = proposition_4_2(inputs.tracked(range(args.seeds), progress, "Training the simplified model"))
    return Report(
        "Proposition 4.2: do the two updates learn the same subspace?",
        {"seeds": args.seeds, "results": rows},
        _summary(rows, args.seeds),
        _figure(rows),
    )


def _summary(rows: list[dict[str, Any]], seeds: int) -> str:
    from trl_steer.analysis.proposition_4_2 import RANK, D

    cells = [
        (
            row["teacher"],
            row["training"],
            row["step"],
            *(f"{row[name][0]:.3f} ({row[name][1]:.3f})" for name in COLUMNS),
        )
        for row in rows
    ]
    return (
        f"Mean (standard deviation) over {seeds} seeds, d = {D}, rank {RANK}. The construction is in the "
        "documentation of `trl_steer/analysis/proposition_4_2.py`.\n\n"
        + table(("teacher", "training", "step", *(name.replace("_", " ") for name in COLUMNS)), cells)
    )


def _figure(rows: list[dict[str, Any]]) -> Any:
    figure, axes = figures.new_figure()
    cases = dict.fromkeys((row["teacher"], row["training"]) for row in rows)
    for index, (teacher, training) in enumerate(cases):
        own = [row for row in rows if (row["teacher"], row["training"]) == (teacher, training)]
        figures.draw(
            axes,
            [row["step"] for row in own],
            [row["shift_cosine"][0] for row in own],
            index,
            f"{teacher}, {training}",
        )
    axes.set_xlabel("training step")
    axes.set_ylabel("mean absolute cosine of the two shifts")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8)
    return figure
