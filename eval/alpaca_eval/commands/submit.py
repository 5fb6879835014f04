"""`trl-steer alpaca-eval submit`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import reference, rows, submission
from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("judged", type=Path, help="the folder that `judge` wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the submission; must not exist")
    parser.add_argument("--outputs", type=Path, help="model_outputs.json (default: the one above the judge's folder)")
    parser.add_argument("--pretty-name", help="for the leaderboard's page (default: the model's name)")
    parser.add_argument("--link", help="for the leaderboard's page")
    parser.add_argument(
        "--not-comparable", action="store_true", help="write it also if it cannot be compared with the leaderboard"
    )
    options.add_reference(parser)


def run(arguments: argparse.Namespace) -> int:
    known = reference.load(arguments.reference)
    outputs = rows.read(rows.find(arguments.outputs or arguments.judged.resolve().parent), known.rows)
    folder = submission.write(
        arguments.output,
        arguments.judged,
        outputs,
        known,
        arguments.pretty_name,
        arguments.link,
        arguments.not_comparable,
    )
    print(f"Written: {folder}")
    return 0
