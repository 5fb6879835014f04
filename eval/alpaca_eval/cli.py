"""`trl-steer alpaca-eval`: AlpacaEval 2.0, with the subcommands generate, judge, report and submit."""

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
    """Runs the command with the arguments `argv` and returns the exit status. Errors are printed as one line."""
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
    """Shows the default of every option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default not in (None, []):
            return super()._get_help_string(action)
        is_complete = action.required or not action.option_strings or "default:" in (action.help or "")
        return action.help if is_complete else f"{action.help} (default: none)"


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Generates and judges outputs for AlpacaEval 2.0.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    def command(name: str, line: str, kept: str) -> Callable[..., argparse.Action]:
        description = f"{line[0].upper()}{line[1:]}."
        options: dict[str, Any] = {"formatter_class": _Formatter, "allow_abbrev": False}
        added = commands.add_parser(name, help=line, description=description, **options)
        added.set_defaults(kept=kept)
        return added.add_argument

    kept = "Finished rows are kept in {output}. Run the same command again to continue."
    add = command("generate", "generate a model's outputs for the 805 instructions", kept)
    add("--model", required=True, help="checkpoint or adapter folder, Hub id, or the model's name at --endpoint")
    add("--adapter", help="PEFT adapter to load on top of --model")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder to write model_outputs.json to")
    add("--name", help="name of the model in all results (default: the name of --output)")
    add("--prompt", choices=["auto", "chat", "alpaca"], default="auto", help="auto: chat if there is a chat template")
    add("--max-new-tokens", type=_count, default=2048, help="including thoughts; 512 in the authors' code")
    add("--temperature", type=partial(_number, float, 0.0), default=0.0, help="sampling temperature, 0 is greedy")
    add("--top-p", type=partial(_number, float, 0.0), default=1.0, help="top-p of sampling")
    add("--seed", type=int, default=0, help="random seed of sampling")
    add("--batch-size", type=_count, default=8, help="batch size, without --endpoint")
    add("--dtype", default="auto", help="dtype of the weights, as in torch")
    add("--device", help="device of the model (default: the accelerator, if there is one, else cpu)")
    add("--allow-empty", action="store_true", help="accept answers without text, such as refusals, as empty outputs")
    _add_request_options(add, "runs the model")

    kept = "The judge's answers are kept. Run the same command again to request the missing ones."
    add = command("judge", "have a judge compare outputs with the reference outputs", kept)
    add("outputs", type=Path, help="a model_outputs.json, or the folder with it")
    add("--judge", default="weighted_alpaca_eval_gpt4_turbo", help="a judge of alpaca-eval, or a YAML file")
    add("--judge-model", metavar="NAME", help="another model for this judge (default: the judge's)")
    setting = "another setting of the judge's requests, such as max_tokens=4000; may be repeated"
    add("--judge-setting", action="append", type=_setting, default=[], metavar="NAME=VALUE", help=setting)
    add("--yes", action="store_true", help="do not ask for confirmation of the cost")
    add("--output", type=Path, metavar="FOLDER", help="folder to write to (default: next to the outputs)")
    add("--cache", type=Path, metavar="FOLDER", help="cache of the judge's answers (default: in Hugging Face's cache)")
    _add_request_options(add, "runs the judge (default: the judge's, else OpenAI's)")

    add = command("report", "show the results of several runs side by side", "Run it again.")
    add("runs", type=Path, nargs="*", help="folders with judged outputs, or folders written by `judge`")
    add("--paper", action="store_true", help="include the rows of the paper's Table 3")
    add("--output", type=Path, metavar="FILE", help="Markdown file to write the table to")
    add("--plot", type=Path, metavar="FILE", help="image file to write a plot to, .png or .svg")

    add = command("submit", "write a submission to the leaderboard", "Nothing was written.")
    add("judged", type=Path, help="the folder written by `judge`")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder to write to, which must not exist")
    add("--outputs", type=Path, help="model_outputs.json (default: the one next to the judge's folder)")
    add("--not-comparable", action="store_true", help="even if the result is not comparable with the leaderboard")
    add("--reference", type=Path, metavar="FOLDER", help="copies of the reference files (default: download them)")
    return parser


def _add_request_options(add: Callable[..., argparse.Action], what: str) -> None:
    add("--limit", type=_count, metavar="N", help="use only the first N rows, for testing (default: all)")
    add("--reference", type=Path, metavar="FOLDER", help="copies of the reference files (default: download them)")
    thought = "remove the thoughts of reasoning models from answers"
    add("--strip-thoughts", action=argparse.BooleanOptionalAction, default=True, help=thought)
    pattern = "pattern of thoughts, in which a dot also matches newlines"
    add("--thought-pattern", type=_pattern, default=thoughts.PATTERN, metavar="REGEX", help=pattern)
    add("--endpoint", metavar="URL", help=f"base URL of an OpenAI-compatible server that {what}")
    add("--api-key-env", metavar="NAME", help="environment variable with the key (default: OPENAI_API_KEY)")
    add("--in-flight", type=_count, default=5, help="number of concurrent requests")
    retries = "retries of a request after status 429, 5xx or a connection error"
    add("--retries", type=partial(_number, int, 0), default=8, help=retries)
    add("--timeout", type=partial(_number, float, 1e-3), default=120.0, help="seconds to wait for the next byte")


def _number(kind: type, least: float, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:  # also false for NaN
        raise argparse.ArgumentTypeError(f"expected a number of at least {least:g}, got {text}")
    return value


_count = partial(_number, int, 1)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
