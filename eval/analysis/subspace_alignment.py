"""Whether a weight update of the MLP and steering of the block's output would learn the same subspace at first."""

from __future__ import annotations

import argparse
from typing import Any

from ..console import Report as Progress
from . import arguments, figures, inputs
from .report import Report, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser, tuned=True)
    arguments.add_text(parser)
    arguments.add_blocks(parser, "the first, the middle and the last one")
    parser.add_argument(
        "--k", type=arguments.positive, default=50, help="number of singular vectors to compare (default: 50)"
    )
    parser.add_argument(
        "--target",
        choices=("output", "shift"),
        default="output",
        help="what is to be learned: the output of the block in the fine-tuned model, or its difference from that of "
        "the base model (default: output)",
    )


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from trl_steer.analysis import subspace_alignment

    base, tuned, tokenizer = inputs.load_pair(args, progress)
    batches = inputs.load_batches(args, tokenizer)
    rows = subspace_alignment(
        base, tuned, inputs.tracked(batches, progress, "Running the models"), args.blocks, args.k, args.target
    )
    results = {"tokens": inputs.count_tokens(batches), "target": args.target, "blocks": rows}
    return Report(
        "Alignment of the subspaces of weight updates and steering", results, _summary(results), _figure(rows)
    )


def _summary(results: dict[str, Any]) -> str:
    what = {
        "output": "the output of the block in the fine-tuned model",
        "shift": "the shift of the block's output by fine-tuning",
    }[results["target"]]
    cells = [(row["block"], row["k"], row["overlap"], row["chance"], row["diagonal"]) for row in results["blocks"]]
    return (
        "The leading left singular vectors of `Y F^T` (which a weight update of the MLP learns first) against those "
        f"of `Y H^T` (steering), with `Y` {what}, over {results['tokens']} tokens. Overlap: mean squared cosine of "
        "the principal angles between the two subspaces. Chance: that of random subspaces. Diagonal: mean absolute "
        "inner product of vectors of the same index.\n\n"
        + table(("block", "vectors", "overlap", "chance", "diagonal"), cells)
    )


def _figure(rows: list[dict[str, Any]]) -> Any:
    figure, axes = figures.new_row(len(rows), width=1.2 + 2.7 * len(rows), height=3.2)
    for index, (each, row) in enumerate(zip(axes, rows, strict=True)):
        image = each.imshow(row["inner_products"], vmin=0, vmax=1, cmap=figures.SEQUENTIAL, interpolation="nearest")
        each.grid(False)
        each.set_title(f"block {row['block']}", fontsize=10)
        each.set_xlabel("singular vector of $YH^T$ (steering)", fontsize=8)
        if not index:
            each.set_ylabel("singular vector of $YF^T$ (weights)", fontsize=8)
    figure.colorbar(image, ax=axes, label="absolute inner product")
    return figure
