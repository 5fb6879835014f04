"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TypeVar

from ..completions import Settings

_Number = TypeVar("_Number", int, float)


def add_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference", type=Path, metavar="FOLDER", help="copies of the reference files; otherwise they are fetched"
    )


def add_endpoint(parser: argparse.ArgumentParser, what: str) -> None:
    defaults = Settings()
    group = parser.add_argument_group("endpoint")
    group.add_argument("--endpoint", metavar="URL", help=what)
    group.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable that holds the key (default: OPENAI_API_KEY)"
    )
    group.add_argument("--api-key", nargs="?", action=_RefuseKey, help=argparse.SUPPRESS)
    group.add_argument("--in-flight", type=positive_int, default=defaults.in_flight, help="most requests at a time")
    group.add_argument(
        "--retries",
        type=natural_number,
        default=defaults.retries,
        help="repeats of a request that met 429, 5xx or no connection",
    )
    group.add_argument("--timeout", type=positive, default=defaults.timeout, help="seconds to wait for the next byte")


class _RefuseKey(argparse.Action):
    """Does not repeat what argparse would: the unknown argument with its value."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(
            "a key on the command line can be read by every user of the machine; put it into an environment variable, "
            "OPENAI_API_KEY or the one that --api-key-env names"
        )


def settings(arguments: argparse.Namespace) -> Settings:
    return Settings(arguments.in_flight, arguments.retries, arguments.timeout)


def add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N rows; for trying things out")


# argparse names these where a value is no number at all.
def positive_int(text: str) -> int:
    return _bounded(int(text), 1)


def natural_number(text: str) -> int:
    return _bounded(int(text), 0)


def not_negative(text: str) -> float:
    return _bounded(float(text), 0)


def positive(text: str) -> float:
    return _bounded(float(text), math.ulp(0.0), "more than 0")


def _bounded(value: _Number, least: float, wanted: str | None = None) -> _Number:
    if not least <= value < math.inf:  # not a number is refused too
        raise argparse.ArgumentTypeError(f"expected {wanted or f'at least {least}'}, got {value}")
    return value
