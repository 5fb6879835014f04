"""How far an adapter moves the model from its base on text, as a function of the scaling of its update."""

from __future__ import annotations

import argparse
from typing import Any

from ..console import Report as Progress
from . import arguments, figures, inputs
from .report import Report, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser, adapter="several")
    arguments.add_text(parser)
    parser.add_argument(
        "--scaling",
        type=float,
        nargs="+",
        metavar="FACTOR",
        help="factors on the update as trained (default: 0 0.25 0.5 0.75 1 1.25 1.5 2)",
    )


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from trl_steer.analysis import drift
    from trl_steer.analysis.drift import SCALINGS

    results = {
        name: drift(model, batches, args.scaling or SCALINGS)
        for name, model, batches in inputs.each_adapter(args, progress)
    }
    return Report("Drift from the base model", {"adapters": results}, _summary(results), _figure(results))


def _summary(results: dict[str, Any]) -> str:
    cells = [
        (name, f"{row['scaling']:g}", row["kl"], row["agreement"], row["perplexity"])
        for name, found in results.items()
        for row in found["scalings"]
    ]
    first = next(iter(results.values()))
    return (
        f"Over {first['tokens']} tokens, where the base model has perplexity {first['base_perplexity']:.4g}. KL: "
        "divergence of the next token from that of the base model, in nats. Agreement: share of tokens after which "
        "both models find the same next token most likely. Scaling: factor on the update as trained.\n\n"
        + table(("adapter", "scaling", "KL per token", "agreement", "perplexity"), cells)
    )


def _figure(results: dict[str, Any]) -> Any:
    figure, axes = figures.new_figure()
    for index, (name, found) in enumerate(results.items()):
        rows = sorted(found["scalings"], key=lambda row: row["scaling"])
        figures.draw(axes, [row["scaling"] for row in rows], [row["kl"] for row in rows], index, name)
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.annotate(
        "as trained",
        (1, 0.97),
        xycoords=("data", "axes fraction"),
        fontsize=8,
        color="0.4",
        ha="right",
        rotation=90,
        va="top",
    )
    axes.set_xlabel("factor on the update (scaling)")
    axes.set_ylabel("KL from the base model (nats per token)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure
