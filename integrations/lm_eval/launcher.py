"""lm-eval's command line with our PEFT types and tasks, and the folder of the tasks."""

import argparse
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from trl_steer.extras import require
from trl_steer.integrations.lm_eval.checks import RequestError, check


def main(argv: Sequence[str] | None = None, prog: str = "lm-eval") -> int:
    """Runs lm-eval with the arguments `argv` (default: those of the process), which may name our tasks too.

    Returns the exit status. Errors are printed as one line, or with `--debug` as a traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        require("eval", "lm_eval")
    except ModuleNotFoundError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    from lm_eval.__main__ import HarnessCLI, setup_logging

    before = sys.argv
    # lm-eval's parser reads `sys.argv` itself.
    sys.argv = [prog, *(word for word in argv if word != "--debug")]
    try:
        setup_logging()
        command_line = HarnessCLI()
        arguments = command_line.parse_args()
        _include_our_tasks(arguments)
        check(arguments)
        import trl_steer  # noqa: F401  (registers our PEFT types)

        command_line.execute(arguments)
    except KeyboardInterrupt:
        print(
            f"\n{prog}: stopped. Only answers in the cache of --use_cache are kept.",
            file=sys.stderr,
        )
        return 130
    except RequestError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{prog}: error: {reason} (--debug shows the traceback)", file=sys.stderr)
        return 1
    finally:
        sys.argv = before
    return 0


def tasks_folder() -> str:
    """The folder of our tasks, for `lm_eval --include_path`."""
    return str(resources.files("trl_steer.eval") / "tasks")


def print_tasks_folder(argv: Sequence[str] | None = None, prog: str = "trl-steer tasks") -> int:
    argparse.ArgumentParser(
        prog, description="Prints the folder of our lm-eval tasks: lm_eval run --include_path $(trl-steer tasks)"
    ).parse_args(argv)
    print(tasks_folder())
    return 0


def _include_our_tasks(arguments: argparse.Namespace) -> None:
    """Adds our folder before the user's folders. If two tasks have the same name, the user's is used.

    `TaskManager` accepts a list of folders, but lm-eval's parser does not. Since setting the option overrides the
    same entry of the `--config` file, that entry is read here.
    """
    if "include_path" not in arguments:
        return
    theirs = arguments.include_path
    if theirs is None and getattr(arguments, "config", None) and Path(arguments.config).is_file():
        from lm_eval.config.evaluate_config import EvaluatorConfig

        theirs = EvaluatorConfig.load_yaml_config(arguments.config).get("include_path")
    folders = theirs if isinstance(theirs, list) else [theirs] if theirs else []
    arguments.include_path = [tasks_folder(), *folders]


if __name__ == "__main__":
    sys.exit(main())
