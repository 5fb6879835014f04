"""What simple updates explain of the difference between a fine-tuned model's hidden states and those of its base, on
held-out texts: before any training, which site, which rank and which blocks."""

from __future__ import annotations

import argparse
import statistics
from typing import Any, get_args

from trl_steer.choices import OracleSite

from ..console import Report as Progress
from . import arguments, figures, inputs
from .report import Report, table

_SITES = get_args(OracleSite)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser, tuned=True)
    arguments.add_text(parser, split="train", rows=300)
    arguments.add_blocks(parser, "all")
    parser.add_argument(
        "--sites", nargs="+", choices=_SITES, default=list(_SITES), help="where updates read the state (default: all)"
    )
    arguments.add_relative(parser, "base")
    parser.add_argument(
        "--rank", type=arguments.positive, default=8, help="rank of the shares for each block (default: 8)"
    )


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from trl_steer.analysis import oracle
    from trl_steer.analysis.oracle import RANKS

    base, tuned, tokenizer = inputs.load_pair(args, progress)
    split = inputs.load_split(args, tokenizer)
    progress.step("Running both models")
    ranks = sorted({*RANKS, args.rank})
    rows = oracle(base, tuned, split, args.sites, ranks, args.blocks, args.relative, progress=progress.progress)
    progress.end("done")
    tokens = inputs.count_tokens_of_parts(split)
    results = {"tokens": tokens, "blocks": rows}
    return Report(
        "What updates explain of the oracle", results, _summary(rows, args.rank, tokens), _figure(rows, args.rank)
    )


def _mean(rows: list[dict[str, Any]], site: str, rank: int | None) -> float:
    return statistics.fmean(_share(row, site, rank) for row in rows)


def _share(row: dict[str, Any], site: str, rank: int | None) -> float:
    found = row["sites"][site]
    return found["full"] if rank is None else found["ranks"].get(rank, found["full"])


def _summary(rows: list[dict[str, Any]], rank: int, tokens: dict[str, int]) -> str:
    sites = list(rows[0]["sites"])
    ranks = list(rows[0]["sites"][sites[0]]["ranks"])
    constant = statistics.fmean(row["constant"] for row in rows)
    by_rank = [(r, *(_mean(rows, site, r) for site in sites)) for r in [*ranks, None]]
    by_rank = [("any" if r is None else str(r), *cells) for r, *cells in by_rank]
    by_block = [
        (row["block"], row["oracle"], row["constant"], *(_share(row, site, rank) for site in sites)) for row in rows
    ]
    best = max(sites, key=lambda site: _mean(rows, site, rank))
    return (
        "The oracle of a block is the difference between the fine-tuned model's hidden state and that of the base "
        f"model. Shares of its squared norm that an update explains on {tokens['held_out']} held-out tokens, after a "
        f"fit on {tokens['fit']}: 1 is all of it, and below 0 is worse than no update. A linear function of the state "
        "at `post_block` or `post_mlp` is what an adapter there adds to the block's output. At the other sites, an "
        "adapter also acts through the MLP, so that the share only says what can be read there.\n\n"
        f"At rank {rank}, `{best}` explains most: {_mean(rows, best, rank):.3f} in the mean over blocks, where a "
        f"constant explains {constant:.3f}.\n\n"
        + table(("rank", *(f"{site}, mean over blocks" for site in sites)), by_rank)
        + f"\n\nRank {rank}, by block. The size of the oracle is relative to the base model's state (root mean "
        "squares over tokens).\n\n" + table(("block", "size of the oracle", "constant", *sites), by_block)
    )


def _figure(rows: list[dict[str, Any]], rank: int) -> Any:
    figure, (left, right) = figures.new_row(2, 9.6, 3.8)
    right.sharey(left)
    sites = list(rows[0]["sites"])
    ranks = list(rows[0]["sites"][sites[0]]["ranks"])
    blocks = [row["block"] for row in rows]
    for number, site in enumerate(sites):
        figures.draw(left, ranks, [_mean(rows, site, r) for r in ranks], number, site)
        figures.draw(right, blocks, [_share(row, site, rank) for row in rows], number, site)
    constants = [row["constant"] for row in rows]
    left.axhline(statistics.fmean(constants), color="black", linewidth=1, linestyle=":", label="constant")
    right.plot(blocks, constants, color="black", linewidth=1, linestyle=":", label="constant")
    left.set_xscale("log", base=2)
    left.set_xticks(ranks, [str(r) for r in ranks])
    left.set_xlabel("rank")
    left.set_ylabel("share of the oracle that is explained, held out")
    left.set_title("mean over blocks", fontsize=10)
    left.set_ylim(bottom=max(-0.2, min(0.0, *left.get_ylim())), top=1.02)
    figures.over_blocks(right, "")
    right.set_title(f"rank {rank}", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    return figure
