"""The result of a measure, and its three files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_steer.files import write_bytes

from . import figures


@dataclass(frozen=True)
class Report:
    """
    The result of a measure.

    Args:
        title (`str`): Heading of the summary.
        results (`dict`): The numbers, which can be saved as JSON.
        summary (`str`): What they say, in Markdown.
        figure (`matplotlib.figure.Figure`, *optional*): The picture, see `figures.py`.
    """

    title: str
    results: dict[str, Any]
    summary: str
    figure: Any = None


def write(report: Report, folder: Path, stem: str, command: Sequence[str]) -> list[Path]:
    """Writes `STEM.json`, `STEM.md` and, if there is a picture, `STEM.png`.

    Everything is made before the first file is written, and each file is written atomically.

    Args:
        report ([`Report`]): The result.
        folder (`Path`): The folder. Files of an earlier result are replaced.
        stem (`str`): Name of the files.
        command (`Sequence[str]`): The command line that gave the result, for the files.

    Returns:
        `list[Path]`: The files.
    """
    line = shlex.join(command)
    files: dict[str, bytes] = {}
    picture = ""
    if report.figure is not None:
        files["png"] = figures.png(report.figure)
        picture = f"![{report.title}]({stem}.png)\n\n"
    files["md"] = f"# {report.title}\n\n`{line}`\n\n{picture}{report.summary.strip()}\n".encode()
    content = {"command": line, **report.results}
    files["json"] = (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    paths = [folder / f"{stem}.{ending}" for ending in files]
    for path, content_bytes in zip(paths, files.values(), strict=True):
        write_bytes(path, content_bytes)
    return paths


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], left: int | None = None) -> str:
    """A Markdown table. Floats have three digits. Columns of numbers are aligned on the right, or all after the first
    `left`."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    numeric = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    if left is not None:
        numeric = [i >= left for i in range(len(header))]
    marks = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, marks, *cells))
