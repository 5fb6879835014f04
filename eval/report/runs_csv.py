"""All runs of a study as a CSV file, a line for each cell."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from .records import Cell, Record

RESULT = (
    *("stage", "model", "task", "method", "rate", "seed", "state", "accuracy", "examples", "majority", "collapsed"),
    *("trainable_parameters", "trainable_share", "steps", "tokens", "last_loss", "reason"),
)
# They depend on the machine, and are the only ones that do.
MACHINE = ("attempts", "seconds", "tokens_per_second", "peak_memory_bytes")


def write(record: Record) -> str:
    """The text of the file: the columns of [`RESULT`], all settings, and those of [`MACHINE`]."""
    settings = [_flat(cell.settings) for cell in record.cells]
    names = sorted({name for of_cell in settings for name in of_cell})
    text = io.StringIO()
    writer = csv.DictWriter(text, [*RESULT, *names, *MACHINE], restval="", lineterminator="\n")
    writer.writeheader()
    for cell, of_cell in zip(record.cells, settings, strict=True):
        writer.writerow({**_results(cell), **of_cell})
    return text.getvalue()


def _results(cell: Cell) -> dict[str, Any]:
    losses = cell.training.get("losses")
    values = {
        **{name: cell.training.get(name) for name in (*RESULT, *MACHINE)},
        **{name: getattr(cell, name) for name in ("stage", "model", "task", "rate", "seed", "state", "reason")},
        "method": cell.row,
        "accuracy": cell.accuracy,
        "examples": len(cell.examples) or None,
        "majority": cell.majority,
        "collapsed": cell.collapsed if cell.examples else None,
        "last_loss": losses[-1] if losses else None,
        "attempts": cell.attempts or None,
    }
    return {name: "" if value is None else value for name, value in values.items()}


def _flat(settings: Mapping[str, Any], prefix: str = "settings.") -> dict[str, Any]:
    """Dotted names. Lists are JSON."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif prefix != "settings." or name != "format":
            found[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return found
