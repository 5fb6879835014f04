"""`trl-steer alpaca-eval`: generate, judge, report, submit. Help and mistakes import nothing heavy."""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import thoughts

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None, prog: str = "trl-steer alpaca-eval") -> int:
    """Runs the command line `argv` and returns the exit status; what goes wrong is said in one line."""
    parsed = _parser(prog).parse_args(argv)
    try:
        from . import commands

        return getattr(commands, parsed.command)(parsed)
    except KeyboardInterrupt:
        print(f"\n{prog} {parsed.command}: Interrupted. {parsed.kept.format(**vars(parsed))}", file=sys.stderr)
        return INTERRUPTED
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"{prog} {parsed.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED if isinstance(error, RuntimeError) else MISUSED


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False or action.default == []
        return action.help if hidden else super()._get_help_string(action)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    def command(name: str, line: str, kept: str) -> Callable[..., argparse.Action]:
        added = commands.add_parser(name, help=line, description=line, formatter_class=_Formatter, allow_abbrev=False)
        added.set_defaults(kept=kept)
        return added.add_argument

    kept = "Finished rows are kept in {output}; the same command goes on from there."
    add = command("generate", "write a model's outputs for the 805 instructions", kept)
    add("--model", required=True, help="checkpoint or adapter folder, Hub id, or the model's name at --endpoint")
    add("--adapter", help="PEFT adapter on top of --model")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where model_outputs.json goes")
    add("--name", help="the model's name in all results (default: the name of --output)")
    add("--prompt", choices=["auto", "chat", "alpaca"], default="auto", help="auto: chat, if there is a template")
    add("--max-new-tokens", type=_count, default=2048, help="thoughts included; the authors' code has 512")
    add("--temperature", type=partial(_number, float, 0.0), default=0.0, help="0 is greedy")
    add("--top-p", type=partial(_number, float, 0.0), default=1.0, help="of sampling")
    add("--seed", type=int, default=0, help="of sampling")
    add("--batch-size", type=_count, default=8, help="of a model in this process")
    add("--dtype", default="auto", help="of the weights, by its name in torch")
    add("--device", help="default: the accelerator, if there is one")
    add("--allow-empty", action="store_true", help="count answers without text, refusals for example, as empty ones")
    _add_asking(add, "runs the model")

    kept = "The judge's answers are kept; the same command asks for the others only."
    add = command("judge", "have a judge compare them with the reference outputs", kept)
    add("outputs", type=Path, help="a model_outputs.json, or the folder that holds it")
    add("--judge", default="weighted_alpaca_eval_gpt4_turbo", help="one of alpaca-eval's, or a YAML file")
    add("--judge-model", metavar="NAME", help="another model for this judge")
    setting = "another setting of its requests, such as max_tokens=4000"
    add("--judge-setting", action="append", type=_setting, default=[], metavar="NAME=VALUE", help=setting)
    add("--yes", action="store_true", help="do not ask before paying")
    add("--output", type=Path, metavar="FOLDER", help="default: named after the judge, beside the outputs")
    add("--cache", type=Path, metavar="FOLDER", help="for the judge's answers (default: in Hugging Face's cache)")
    _add_asking(add, "answers for the judge")

    add = command("report", "show the results of several runs side by side", "Run it again.")
    add("runs", type=Path, nargs="*", help="folders of outputs that were judged, or judges' folders")
    add("--paper", action="store_true", help="with the rows of the paper's Table 3")
    add("--output", type=Path, metavar="FILE", help="Markdown file to write the table to")
    add("--plot", type=Path, metavar="FILE", help="image file to draw to, .png or .svg")

    add = command("submit", "write what a submission to the leaderboard consists of", "Nothing was written.")
    add("judged", type=Path, help="the folder that `judge` wrote")
    add("--output", type=Path, required=True, metavar="FOLDER", help="the submission; must not exist")
    add("--outputs", type=Path, help="model_outputs.json (default: the one above the judge's folder)")
    add("--not-comparable", action="store_true", help="also if it cannot be compared with the leaderboard")
    add("--reference", type=Path, metavar="FOLDER", help="copies of the reference files (default: fetch them)")
    return parser


def _add_asking(add: Callable[..., argparse.Action], what: str) -> None:
    add("--limit", type=_count, metavar="N", help="only the first N rows; for trying things out")
    add("--reference", type=Path, metavar="FOLDER", help="copies of the reference files (default: fetch them)")
    thought = "take what a model thinks before it answers out of the answer"
    add("--strip-thoughts", action=argparse.BooleanOptionalAction, default=True, help=thought)
    pattern = "what is a thought; a dot matches line ends too"
    add("--thought-pattern", type=_pattern, default=thoughts.PATTERN, metavar="REGEX", help=pattern)
    add("--endpoint", metavar="URL", help=f"base URL of an OpenAI-compatible server that {what}")
    add("--api-key-env", metavar="NAME", help="environment variable that holds the key (default: OPENAI_API_KEY)")
    add("--in-flight", type=_count, default=5, help="requests at a time")
    add("--retries", type=partial(_number, int, 0), default=8, help="of requests that met 429, 5xx or no connection")
    add("--timeout", type=partial(_number, float, 1e-3), default=120.0, help="seconds to wait for the next byte")


def _number(kind: type, least: float, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:  # not a number is refused too
        raise argparse.ArgumentTypeError(f"expected a number of at least {least:g}, got {text}")
    return value


_count = partial(_number, int, 1)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
