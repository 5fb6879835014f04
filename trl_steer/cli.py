"""The `trl-steer` command: hands each subcommand's arguments to the program behind it."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

# name -> (module:function called with `(argv, prog)`, one line of help). Imported only when the command is asked for.
COMMANDS = {
    "demo": (
        "trl_steer.eval.demo.cli:main",
        "train and score a steering adapter on a small real model, in minutes on a CPU",
    ),
    "sft": ("trl_steer.integrations.trl.sft:main", "train with TRL: steering, LoRA, both together, or all parameters"),
    "joint": (
        "trl_steer.integrations.trl.sft:joint",
        "sft --method joint_orth: LoRA and steering together",
    ),
    "split": ("trl_steer.adapter_commands:split", "write the two halves of a joint adapter"),
    "join": ("trl_steer.adapter_commands:join", "join a LoRA and a steering adapter into one"),
    "alpaca-eval": ("trl_steer.eval.alpaca_eval.cli:main", "AlpacaEval 2.0: generate, judge, report, submit"),
    "compare": ("trl_steer.eval.reproduce.compare:main", "the paired test of two runs on the same examples"),
    "lm-eval": ("trl_steer.integrations.lm_eval.launcher:main", "lm-evaluation-harness with our adapters and tasks"),
    "tasks": (
        "trl_steer.integrations.lm_eval.launcher:print_tasks_folder",
        "print the folder of our tasks, for lm_eval --include_path",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: that of the process) and returns the exit status."""
    parser = _parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        name = f"trl-steer {arguments[0]}"
        try:
            return _load(arguments[0])(arguments[1:], name)
        except KeyboardInterrupt:  # of a command that keeps nothing, or before it could say what it keeps
            print(f"\n{name}: stopped.", file=sys.stderr)
            return 130
    # What is left is --help, --version or a mistake; argparse answers each and exits.
    parser.parse_args(arguments)
    parser.print_help()
    return 0


def _load(command: str) -> Callable[[Sequence[str], str], int]:
    module, _, function = COMMANDS[command][0].partition(":")
    return getattr(importlib.import_module(module), function)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-steer",
        description="Post-block activation steering for the Hugging Face training stack.",
        epilog="trl-steer COMMAND --help shows the arguments of a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (_, help_line) in COMMANDS.items():
        commands.add_parser(name, help=help_line, add_help=False)
    return parser


class _Version(argparse.Action):
    """argparse's own wants the version in advance, and finding it takes longer than the rest of `--help`."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"trl-steer {importlib.import_module('trl_steer').__version__}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
