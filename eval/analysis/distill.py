"""A steering adapter that explains a fine-tuned model best, in closed form: block by block, by ridge regression on the
states of the base model with the adapter in all earlier blocks. No gradient step is made."""

from __future__ import annotations

import argparse
import math
from typing import Any, get_args

from trl_steer.choices import SteeringType
from trl_steer.files import new_folders

from ..console import Report as Progress
from . import arguments, figures, inputs
from .report import Report, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser, tuned=True)
    arguments.add_text(parser, split="train", rows=500)
    arguments.add_blocks(parser, "all")
    arguments.add_relative(parser, "fine-tuned")
    arguments.add_save(parser, "adapter")
    parser.add_argument(
        "--steering_type", choices=get_args(SteeringType), default="low_rank", help="the update (default: low_rank)"
    )
    parser.add_argument("--r", type=arguments.positive, default=8, help="rank of low-rank steering (default: 8)")
    parser.add_argument(
        "--choose_rank",
        action="store_true",
        help="choose the rank of each block by its error on validation texts, at most --r (default: off)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="with --choose_rank, the share of the difference that a smaller rank may explain less (default: 0.001)",
    )


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from trl_steer import PostBlockSteeringConfig
    from trl_steer.analysis import distill

    config = PostBlockSteeringConfig(
        task_type="CAUSAL_LM", r=args.r, steering_type=args.steering_type, layers_to_transform=args.blocks
    )
    with new_folders(args.save) as (partial,):
        base, tuned, tokenizer = inputs.load_separate_pair(args, progress, args.tuned)
        split = inputs.load_split(args, tokenizer)
        progress.step("Fitting")
        made = distill(
            base,
            tuned,
            split,
            config,
            choose_rank=args.choose_rank,
            relative=args.relative,
            tolerance=args.tolerance,
            progress=progress.progress,
        )
        progress.end("done")
        made.model.save_pretrained(str(partial))
    tokens = inputs.count_tokens_of_parts(split)
    return Report(
        "A steering adapter distilled from a fine-tuned model",
        {"tokens": tokens, "blocks": made.report},
        summary("The steering adapter", "the fine-tuned model", made.report, tokens),
        figure(made.report),
    )


def summary(made: str, goal: str, rows: list[dict[str, Any]], tokens: dict[str, int]) -> str:
    """What an adapter leaves of the difference to its goal, in words and by block."""
    last = rows[-1]
    header = ["block", "rank", "ridge", "without the update", "with it", "explained"]
    names = ["block", "rank", "ridge", "before", "after", "explained"]
    kept = [index for index, name in enumerate(names) if name in last]
    return (
        f"{made} was fitted on {tokens['fit']} tokens, and measured on {tokens['held_out']} held-out ones. Distance "
        f"of the hidden state from that of {goal}, relative to its norm (root mean squares), with the updates of all "
        f"earlier blocks; and the share of the squared distance that the update of the block explains. After the last "
        f"block, the distance is {last['after']:.3g}.\n\n"
        + table([header[i] for i in kept], [[row[names[i]] for i in kept] for row in rows])
    )


def figure(rows: list[dict[str, Any]]) -> Any:
    """The distance from the goal, with and without the update of each block."""
    picture, axes = figures.new_figure()
    blocks = [row["block"] for row in rows]
    figures.draw(axes, blocks, [row["before"] for row in rows], 1, "without the update of the block")
    figures.draw(axes, blocks, [row["after"] for row in rows], 0, "with it")
    figures.over_blocks(axes, "distance / norm of the state, held out")
    values = [value for row in rows for value in (row["before"], row["after"]) if value > 0]
    if values and math.log10(max(values) / min(values)) > 2:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return picture
