"""What is in an adapter folder: type, size, norms, effective ranks, orthogonality and problems. Needs no model."""

from __future__ import annotations

import argparse
from typing import Any

from ..console import Report as Progress
from . import figures, inputs
from .report import Report, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="folder or Hub id of an adapter, ours or LoRA")


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from trl_steer.analysis import inspect_adapter

    inputs.check_adapter(args.folder)
    (folder,) = inputs.tracked([args.folder], progress, "Reading the adapter")
    found = inspect_adapter(folder, inputs.base_parameters(folder))
    return Report(f"Adapter {inputs.short_names([folder])[0]}", found, _summary(found), _figure(found))


def _summary(found: dict[str, Any]) -> str:
    share = (
        "not known, since its configuration is not on this machine"
        if found["share"] is None
        else f"{found['share']:.3%}"
    )
    cells = [
        ("type", found["type"]),
        ("rank", "none" if found["rank"] is None else found["rank"]),
        ("parameters", f"{found['parameters']:,}"),
        ("share of the base model", share),
        ("dtype", ", ".join(found["dtypes"])),
        ("updates", len(found["updates"])),
    ]
    if found["overlap"]:
        cells += [
            (f"overlap with LoRA on {module}", f"{overlap:.2g}")
            for module, overlap in sorted(found["overlap"].items())
        ]
    health = "\n".join(f"- {problem}" for problem in found["problems"]) or "No problems found."
    rows = [
        (
            "" if row["block"] is None else row["block"],
            row["module"],
            _digits(row["norm"]),
            _digits(row["frobenius"]),
            _digits(row["effective_rank"]),
        )
        for row in found["updates"]
    ]
    header = ("block", "module or site", "2-norm", "Frobenius norm", "effective rank")
    return f"{table(('', ''), cells)}\n\n{health}\n\n{table(header, rows)}"


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _figure(found: dict[str, Any]) -> Any:
    import numpy as np

    figure, axes = figures.new_figure()
    steering = [row for row in found["updates"] if row["is_steering"]] or found["updates"]
    spectra = [row["spectrum"] for row in steering if row["spectrum"]]
    if spectra:
        longest = max(map(len, spectra))
        values = np.full((len(spectra), longest), np.nan)
        for index, spectrum in enumerate(spectra):
            values[index, : len(spectrum)] = spectrum
        ranks = np.arange(1, longest + 1)
        for spectrum in values:
            axes.plot(ranks, spectrum, color=figures.COLOURS[0], alpha=0.25, linewidth=0.8)
        figures.draw(axes, ranks, np.nanmedian(values, axis=0), 1, "median")
        axes.set_xlabel("index of the singular value")
        axes.set_ylabel("singular value of the update")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    else:
        blocks = [
            (row["block"], row["norm"]) for row in steering if row["block"] is not None and row["norm"] is not None
        ]
        figures.draw(axes, [block for block, _ in blocks], [norm for _, norm in blocks], 0)
        figures.over_blocks(axes, "norm of the update")
        axes.set_ylim(bottom=0)
    return figure
