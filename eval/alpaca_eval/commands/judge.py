"""`trl-steer alpaca-eval judge`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .. import judges, judging, reference, rows
from ..completions import Estimate
from ..judges import LEADERBOARD
from . import options

LOCK = ".lock"


class DeclinedError(RuntimeError):
    """The user does not want to pay."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("outputs", type=Path, help="a model_outputs.json, or the folder that holds it")
    parser.add_argument(
        "--judge", default=LEADERBOARD, help=f"one of the package's, or a YAML file (default: {LEADERBOARD})"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="another model for this judge")
    parser.add_argument("--yes", action="store_true", help="do not ask before paying")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: named after the judge, beside outputs")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="where the judge's answers are kept")
    options.add_limit(parser)
    options.add_reference(parser)
    options.add_endpoint(parser, "base URL of an OpenAI-compatible server that answers for the judge")


def run(arguments: argparse.Namespace) -> int:
    """Judges, and returns 0 if every row has a judgement, else 1."""
    judge = judges.resolve(arguments.judge, arguments.judge_model, arguments.endpoint, arguments.api_key_env)
    file = rows.find(arguments.outputs)
    folder = arguments.output or file.parent / judge.label
    # Before the first paid call: all that will be needed after the last one.
    known = reference.load(arguments.reference)
    given = rows.read(file, known.rows)
    outputs = given.first(arguments.limit)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            if not judging.is_about(folder, given):
                # Should the judge fail now, no report must show what was said of earlier outputs.
                (folder / judging.RESULT).unlink(missing_ok=True)
            judged = judging.ask(
                outputs,
                known,
                judge,
                arguments.cache or judging.default_cache(),
                options.settings(arguments),
                lambda estimate: confirm(estimate, judge, arguments.yes),
            )
            result = judging.evaluate(judged, outputs, known, judge, folder)
    except Timeout as error:
        raise RuntimeError(
            f"another process is judging into {folder}; wait for it, or name another --output"
        ) from error
    print(summary(result))
    print(f"Written: {folder}")
    for warning in warnings(result):
        print(f"WARNING: {warning}", file=sys.stderr)
    return 0 if result["complete"] else 1


def confirm(estimate: Estimate, judge: judges.Judge, yes: bool) -> None:
    """Shows what is about to be asked and, without `yes`, asks whether to go on.

    Raises:
        DeclinedError: if the answer is no, or nobody is there to give one.
    """
    dollars = "an unknown price" if estimate.dollars is None else f"about {estimate.dollars:.2f} dollars"
    print(
        f"{estimate.calls} calls of {', '.join(judge.models)} at {judge.endpoint or 'its provider'}, about "
        f"{estimate.tokens} tokens, {dollars}; {estimate.done} judgements are there already.",
        flush=True,
    )
    if yes:
        return
    if not sys.stdin.isatty():
        raise DeclinedError("nothing was asked: pass --yes to go on without being asked first")
    try:
        answer = input("Go on? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise DeclinedError("nothing was asked")


def summary(result: dict[str, Any]) -> str:
    return (
        f"{result['name']}: LC win rate {shown(result['length_controlled_winrate'])} "
        f"(SE {shown(result['lc_standard_error'])}), win rate {shown(result['win_rate'])} "
        f"(SE {shown(result['standard_error'])}), average length {result['avg_length']}, "
        f"n_total {result['n_total']}, judge {result['judge']['name']}"
    )


def shown(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.2f}"


def warnings(result: dict[str, Any]) -> list[str]:
    """What has to be said loudly about a result."""
    said = []
    if not result["complete"]:
        said.append(
            f"{len(result['missing_rows'])} rows have no judgement and are not counted. The same command asks for "
            "them, and for nothing else, again."
        )
        said += [f"{count} rows failed: {reason}" for reason, count in result["failures"].items()]
    if "glm_error" in result:
        said.append(f"the length-controlled win rate could not be computed ({result['glm_error']})")
    if not result["comparable"]:
        said.append(f"NOT COMPARABLE with the leaderboard: {'; '.join(result['not_comparable_because'])}.")
    return said
