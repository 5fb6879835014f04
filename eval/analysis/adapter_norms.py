"""The norms of the updates of adapters in each block. Needs no model."""

from __future__ import annotations

import argparse
from typing import Any

from ..console import Report as Progress
from . import arguments, figures, inputs
from .report import Report, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_folders(parser)


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from trl_steer.analysis import adapter_norms

    names = inputs.short_names(args.adapter)
    results = {}
    for adapter, name in zip(inputs.tracked(args.adapter, progress, "Reading adapters"), names, strict=True):
        inputs.check_adapter(adapter)
        results[name] = adapter_norms(adapter)
    return Report("Norms of updates", {"adapters": results}, _summary(results), _figure(results))


def series(rows: list[dict[str, Any]]) -> tuple[str, dict[int, float]]:
    """What to draw of an adapter: the norms of steering by block, or for LoRA the largest norm in each block."""
    of_steering = [row for row in rows if row["is_steering"]] or rows
    what = "steering" if any(row["is_steering"] for row in rows) else "LoRA, largest in the block"
    norms: dict[int, float] = {}
    for row in of_steering:
        if row["block"] is not None and row["norm"] is not None:
            norms[row["block"]] = max(norms.get(row["block"], 0.0), row["norm"])
    return what, norms


def _summary(results: dict[str, Any]) -> str:
    cells = []
    for name, rows in results.items():
        for is_steering, what in ((True, "steering"), (False, "LoRA")):
            norms = sorted(r["norm"] for r in rows if r["is_steering"] is is_steering and r["norm"] is not None)
            if norms:
                cells.append((name, what, len(norms), norms[0], norms[len(norms) // 2], norms[-1]))
    return "2-norm of each update's matrix, scaling included (for a vector, its norm).\n\n" + table(
        ("adapter", "update", "number", "smallest", "median", "largest"), cells
    )


def _figure(results: dict[str, Any]) -> Any:
    figure, axes = figures.new_figure()
    for index, (name, rows) in enumerate(results.items()):
        what, norms = series(rows)
        figures.draw(axes, list(norms), list(norms.values()), index, f"{name} ({what})")
    figures.over_blocks(axes, "2-norm of the update")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure
