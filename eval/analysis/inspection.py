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
    from trl_steer.tuners.steering.card import public_id

    inputs.check_adapter(args.folder)
    (folder,) = inputs.tracked([args.folder], progress, "Reading the adapter")
    found = inspect_adapter(folder, inputs.base_parameters(folder))
    found["base_model"] = public_id(found["base_model"]) or "a local folder"
    return Report(f"Adapter {inputs.short_names([folder])[0]}", found, _summary(found), _figure(found))


def _summary(found: dict[str, Any]) -> str:
    share = "not known: its configuration is not on this machine"
    cells = [
        ("type", found["type"]),
        ("base model", found["base_model"]),
        ("rank", "none" if found["rank"] is None else found["rank"]),
        ("parameters", f"{found['parameters']:,}"),
        ("share of the base model", share if found["share"] is None else f"{found['share']:.3%}"),
        ("dtype", ", ".join(found["dtypes"])),
        *((f"overlap with LoRA on {name}", f"{overlap:.2g}") for name, overlap in sorted(found["overlap"].items())),
    ]
    problems = "\n".join(f"- {problem}" for problem in found["problems"]) or "No problems found."
    modules = dict.fromkeys(row["module"] for row in found["updates"])
    header = ("module or site", "updates", "2-norm: smallest", "median", "largest", "effective rank: mean")
    rows = [_module_row(name, [row for row in found["updates"] if row["module"] == name]) for name in modules]
    return f"{table(('', ''), cells)}\n\n{problems}\n\n{table(header, rows)}"


def _module_row(name: str, updates: list[dict[str, Any]]) -> tuple[Any, ...]:
    norms = sorted(row["norm"] for row in updates if row["norm"] is not None) or [float("nan")]
    ranks = [row["effective_rank"] for row in updates if row["effective_rank"] is not None]
    mean = f"{sum(ranks) / len(ranks):.3g}" if ranks else ""
    return (name, len(updates), norms[0], norms[len(norms) // 2], norms[-1], mean)


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
        for index, spectrum in enumerate(values):
            label = None if index else "an update each"
            axes.plot(ranks, spectrum, color=figures.COLOURS[0], alpha=0.35, linewidth=0.8, label=label)
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
