"""Options of `accelerate launch` in the arguments of a training command, as in TRL's own commands.

With options such as `--num_processes 2`, or `accelerate_config: fsdp2` in the config file, the command runs itself
under accelerate's launcher.
"""

import importlib.resources
import os
import subprocess
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from trl import TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument


def parse(parser: TrlParser, argv: Sequence[str]) -> tuple[tuple, list[str]]:
    """The arguments parsed by `parser`, and the options of `accelerate launch`.

    Raises:
        ValueError: An argument is unknown, or there is no such `accelerate_config`.
    """
    *parsed, remaining = parser.parse_args_and_config(list(argv), return_remaining_strings=True)
    options = resolve_accelerate_config_argument(remaining)
    # The launcher's parser needs the name of a script.
    _, unknown = launch_command_parser().parse_known_args([*options, "script.py"]) if options else (None, [])
    if unknown:
        raise ValueError(f"Unknown arguments {' '.join(unknown)}; see --help for all arguments.")
    return tuple(parsed), options


def launch(module: str, options: Sequence[str], argv: Sequence[str]) -> int | None:
    """Runs `module` with `argv` under the launcher and returns its exit status. Returns `None` if there are no options
    for the launcher, or if this process has been started by a launcher."""
    if not options or "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ:
        return None
    if "--config_file" not in options and not torch.accelerator.is_available():
        # Without this configuration, the launcher always starts a single process on a CPU.
        on_cpu = importlib.resources.files("trl_steer.integrations").joinpath("accelerate", "ddp_cpu.yaml")
        processes = [] if "--num_processes" in options else ["--num_processes", "1"]
        options = ["--config_file", str(on_cpu), *processes, *options]
    arguments: Any = launch_command_parser().parse_args([*options, "--module", module, *argv])
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0
