"""`trl-steer alpaca-eval report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from trl_steer.files import write_text

from .. import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="*", help="folders of outputs that were judged, or judges' folders")
    parser.add_argument("--paper", action="store_true", help="with the rows of the paper's Table 3")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown file to write the table to")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="image file to draw to, .png or .svg")


def run(arguments: argparse.Namespace) -> int:
    rows = [row for path in arguments.runs for row in report.read(path)]
    rows += report.PAPER if arguments.paper else []
    if not rows:
        raise ValueError("nothing to report: name folders that were judged, or pass --paper.")
    table = report.markdown(rows)
    print(table, end="")
    if arguments.output:
        write_text(arguments.output, table)
    if arguments.plot:
        report.plot(rows, arguments.plot)
    return 0
