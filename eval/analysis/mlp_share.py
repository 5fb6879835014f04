"""The share of the MLP in each block: of the norms of both sublayers, and of the norm of the block's output."""

from __future__ import annotations

import argparse
from typing import Any

from ..console import Report as Progress
from . import arguments, figures, inputs
from .report import Report, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser, adapter="optional")
    arguments.add_text(parser)


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from trl_steer.analysis import mlp_share

    model, tokenizer = inputs.load_model(args, progress, args.adapter)
    batches = inputs.load_batches(args, tokenizer)
    rows = mlp_share(model, inputs.tracked(batches, progress, "Running the model"))
    tokens = inputs.count_tokens(batches)
    return Report(
        "Share of the MLP in each block", {"tokens": tokens, "blocks": rows}, _summary(rows, tokens), _figure(rows)
    )


def _summary(rows: list[dict[str, Any]], tokens: int) -> str:
    means = {name: sum(row[name] for row in rows) / len(rows) for name in ("of_sublayers", "of_output")}
    cells = [(row["block"], row["of_sublayers"], row["of_output"]) for row in rows]
    return (
        f"Mean over {tokens} tokens, for each block. Over all blocks, the MLP has {means['of_sublayers']:.2f} of the "
        f"norms of both sublayers, and its norm is {means['of_output']:.2f} of that of the block's output. The "
        "paper's Figure 3 shows the first, its text speaks of the second.\n\n"
        + table(("block", "MLP / (MLP + attention)", "MLP / block output"), cells)
    )


def _figure(rows: list[dict[str, Any]]) -> Any:
    figure, axes = figures.new_figure()
    blocks = [row["block"] for row in rows]
    figures.draw(axes, blocks, [row["of_sublayers"] for row in rows], 0, "MLP / (MLP + attention)")
    figures.draw(axes, blocks, [row["of_output"] for row in rows], 1, "MLP / block output")
    figures.over_blocks(axes, "ratio of norms, mean over tokens")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure
