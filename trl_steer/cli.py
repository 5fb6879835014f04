"""The `trl-steer` command, which calls the function of each subcommand."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

# Name -> (module:function, which is called with `(argv, prog)`, and the line in `trl-steer --help`).
COMMANDS = {
    "demo": (
        "trl_steer.eval.demo.cli:main",
        "train and evaluate a steering adapter on a small model, in minutes on a CPU",
    ),
    "sft": ("trl_steer.integrations.trl.sft:main", "train with TRL: steering, LoRA, both together, or all parameters"),
    "joint": (
        "trl_steer.integrations.trl.sft:joint",
        "sft --method joint_orth: LoRA and steering together",
    ),
    "split": ("trl_steer.adapter_commands:split", "split a joint adapter into a LoRA and a steering adapter"),
    "join": ("trl_steer.adapter_commands:join", "join a LoRA and a steering adapter into a joint adapter"),
    "export": ("trl_steer.integrations.export.cli:main", "write an adapter in the format of another program"),
    "serve": ("trl_steer.integrations.vllm.serve:main", "start a vLLM server for a model and its adapters"),
    "alpaca-eval": ("trl_steer.eval.alpaca_eval.cli:main", "AlpacaEval 2.0: generate, judge, report, submit"),
    "analyze": ("trl_steer.eval.analysis.cli:main", "measure what the paper measures, on models, adapters and texts"),
    "compare": ("trl_steer.eval.reproduce.compare:main", "compare two runs on the same examples with a paired test"),
    "reproduce": ("trl_steer.eval.reproduce.cli:main", "make the runs of a study, such as the paper's tables"),
    "find-lr": ("trl_steer.eval.reproduce.find_lr:main", "find a learning rate for a model, a task and a method"),
    "report": ("trl_steer.eval.report.cli:main", "tables, tests, pictures and a CSV file of a study"),
    "lm-eval": ("trl_steer.integrations.lm_eval.launcher:main", "lm-evaluation-harness with our adapters and tasks"),
    "tasks": (
        "trl_steer.integrations.lm_eval.launcher:print_tasks_folder",
        "print the folder of our tasks, for lm_eval --include_path",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (default: `sys.argv[1:]`) and returns the exit status."""
    parser = _parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        name = f"trl-steer {arguments[0]}"
        try:
            return _load(arguments[0])(arguments[1:], name)
        except KeyboardInterrupt:
            print(f"\n{name}: stopped.", file=sys.stderr)
            return 130
    parser.parse_args(arguments)  # --help, --version or an error, for each of which argparse exits
    parser.print_help()
    return 0


def _load(command: str) -> Callable[[Sequence[str], str], int]:
    module, _, function = COMMANDS[command][0].partition(":")
    return getattr(importlib.import_module(module), function)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-steer",
        description="Activation steering as PEFT methods, to train with TRL and to evaluate with lm-eval.",
        epilog="trl-steer COMMAND --help shows the arguments of a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (_, help_line) in COMMANDS.items():
        commands.add_parser(name, help=help_line, add_help=False)
    return parser


class _Version(argparse.Action):
    """argparse's own action needs the version in advance, and reading it would slow down `--help`."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"trl-steer {importlib.import_module('trl_steer').__version__}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
