"""`trl-steer alpaca-eval`: generate, judge, report, submit."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each has `add_arguments(parser)` and `run(arguments) -> int`, and is imported when it is asked for.
COMMANDS = {
    "generate": "write a model's outputs for the 805 instructions",
    "judge": "have a judge compare them with the reference outputs",
    "report": "show the results of several runs side by side",
    "submit": "write what a submission to the leaderboard consists of",
}
STOPPED = 1
MISUSED = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None, prog: str = "trl-steer alpaca-eval") -> int:
    """Runs the command line `argv` and returns the exit status; what goes wrong is said in one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    chosen = next((argument for argument in arguments if argument in COMMANDS), None)
    for name, help_line in COMMANDS.items():
        # In full only: `--api-key` would be taken for `--api-key-env`, and the key for the name of a variable.
        subparser = subparsers.add_parser(name, help=help_line, description=help_line, allow_abbrev=False)
        if name == chosen:
            command = importlib.import_module(f".commands.{name}", __package__)
            command.add_arguments(subparser)
    parsed = parser.parse_args(arguments)
    try:
        return command.run(parsed)
    except (ValueError, ImportError, OSError) as error:
        print(f"{prog} {parsed.command}: error: {error}", file=sys.stderr)
        return MISUSED
    except RuntimeError as error:
        print(f"{prog} {parsed.command}: {error}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print(f"\n{prog} {parsed.command}: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
