"""The error of the best steering of the block's output in place of one of the MLP's, and Theorem 3.1's bounds."""

from __future__ import annotations

import argparse
from typing import Any

from ..console import Report as Progress
from . import arguments, figures, inputs
from .report import Report, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser, adapter="optional")
    arguments.add_text(parser)
    arguments.add_blocks(parser, "all")


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from trl_steer.analysis import theorem_3_1

    model, tokenizer = inputs.load_model(args, progress, args.adapter)
    batches = inputs.load_batches(args, tokenizer)
    rows = theorem_3_1(model, inputs.tracked(batches, progress, "Running the model"), args.blocks)
    tokens = inputs.count_tokens(batches)
    # Without the angles, which are as many as the hidden size.
    rows = [{name: value for name, value in row.items() if name != "angles"} for row in rows]
    results = {"tokens": tokens, "blocks": rows}
    return Report(
        "Theorem 3.1: steering the block's output in place of the MLP's", results, _summary(results), _figure(rows)
    )


def _summary(results: dict[str, Any]) -> str:
    rows = results["blocks"]
    cells = [(row["block"], row["lower"], row["error"], row["upper"]) for row in rows]
    return (
        f"Over {results['tokens']} tokens: the relative error of the best linear map of the block's output in place "
        "of a linear map of the MLP's output, and its bounds from the principal angles between their row spaces.\n\n"
        + table(("block", "lower bound", "error", "upper bound"), cells)
    )


def _figure(rows: list[dict[str, Any]]) -> Any:
    figure, axes = figures.new_figure()
    blocks = [row["block"] for row in rows]
    figures.draw(axes, blocks, [row["error"] for row in rows], 0, "best linear map, measured")
    bounds = [[row[name] for row in rows] for name in ("lower", "upper")]
    axes.fill_between(blocks, *bounds, color="0.88", linewidth=0, label="between the bounds of Theorem 3.1")
    figures.over_blocks(axes, "relative error (Frobenius norm)")
    axes.set_ylim(bottom=0)
    figures.legend_above(axes)
    return figure
