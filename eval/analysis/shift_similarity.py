"""The cosine similarity between the shifts of steering and of LoRA in joint adapters."""

from __future__ import annotations

import argparse
from typing import Any

from ..console import Report as Progress
from . import arguments, figures, inputs
from .report import Report, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser, adapter="several")
    arguments.add_text(parser)


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from trl_steer.analysis import shift_similarity

    results = {name: shift_similarity(model, batches) for name, model, batches in inputs.each_adapter(args, progress)}
    return Report(
        "Similarity of the shifts of steering and LoRA", {"adapters": results}, _summary(results), _figure(results)
    )


def _summary(results: dict[str, Any]) -> str:
    cells = [
        (name, found["tokens"], found["mean"], found["std"], found["mean_abs"]) for name, found in results.items()
    ]
    return (
        "Cosine similarity between what steering adds to the output of a block and the difference that LoRA makes to "
        "the output of its MLP, over tokens and blocks.\n\n"
        + table(("adapter", "tokens x blocks", "mean", "standard deviation", "mean of absolute values"), cells)
    )


def _figure(results: dict[str, Any]) -> Any:
    figure, axes = figures.new_figure()
    for index, (name, found) in enumerate(results.items()):
        edges, total = found["edges"], sum(found["counts"])
        width = edges[1] - edges[0]
        density = [count / total / width for count in found["counts"]]
        axes.stairs(density, edges, fill=True, alpha=0.25, color=figures.COLOURS[index % len(figures.COLOURS)])
        axes.stairs(
            density,
            edges,
            color=figures.COLOURS[index % len(figures.COLOURS)],
            linestyle=figures.LINES[index % len(figures.LINES)],
            linewidth=1.4,
            label=name,
        )
    axes.set_xlim(-1, 1)
    axes.set_xlabel("cosine similarity of the two shifts")
    axes.set_ylabel("density over tokens and blocks")
    axes.legend(frameon=False)
    return figure
