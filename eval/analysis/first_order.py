"""The change of an MLP's output by steering and by weight updates, against its first-order prediction."""

from __future__ import annotations

import argparse
from typing import Any

from ..console import Report as Progress
from . import arguments, figures, inputs
from .report import Report, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser, adapter="optional")
    arguments.add_text(parser)
    arguments.add_blocks(parser, "the first, the middle and the last one")


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from trl_steer.analysis import first_order
    from trl_steer.analysis.states import spread

    model, tokenizer = inputs.load_model(args, progress, args.adapter)
    batches = inputs.load_batches(args, tokenizer)
    blocks = args.blocks or spread(model)
    rows = first_order(model, inputs.tracked(batches, progress, "Running the MLPs"), blocks=blocks, seed=args.seed)
    results = {"tokens": inputs.count_tokens(batches), "paths": rows}
    return Report("First-order prediction of the MLP's output", results, _summary(results), _figure(rows))


def _summary(results: dict[str, Any]) -> str:
    cells = []
    for row in results["paths"]:
        largest = row["scale"].index(max(row["scale"]))
        error = row["remainder"][largest] / row["change"][largest] if row["change"][largest] else float("nan")
        last, others = row.get("last_layer"), row.get("other_layers")
        share = "" if not last else f"{last**2 / (last**2 + others**2):.3g}"
        slope = "" if row["slope"] is None else f"{row['slope']:.3f}"
        cells.append((row["block"], row["path"], row["source"], slope, error, share))
    return (
        f"Over {results['tokens']} tokens. Slope: of the logarithm of the remainder over that of the scale, 2 for a "
        "remainder of second order. Error: the remainder divided by the change, at the largest scale. Last layer: the "
        "share of the last linear layer in the squared norms of the first-order terms of a weight update, which no "
        "steering before the MLP can express.\n\n"
        + table(("block", "path", "direction", "slope", "error", "last layer"), cells)
    )


def _figure(rows: list[dict[str, Any]]) -> Any:
    figure, axes = figures.new_figure(width=6.4, height=4.2)
    blocks = sorted({row["block"] for row in rows})
    for row in rows:
        index = blocks.index(row["block"])
        is_steering = row["path"] == "steering"
        relative = [r / c if c else float("nan") for r, c in zip(row["remainder"], row["change"], strict=True)]
        figures.draw(
            axes,
            row["scale"],
            relative,
            index,
            f"block {row['block']}, {row['path']} ({row['source']})",
            linestyle="-" if is_steering else "--",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("scale of the update (1: as trained; if random, as large as the input or the weight)")
    axes.set_ylabel("remainder / change of the MLP's output")
    figures.legend_above(axes, 3)
    return figure
