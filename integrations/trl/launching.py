"""Options of `accelerate launch` among the arguments of a training command, as TRL's own commands take them.

`--num_processes 2`, or `accelerate_config: fsdp2` in the config file, and the command starts itself again under
accelerate's launcher.
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
    """The objects that `parser` makes of the arguments and the config file, and the launch options among them.

    Raises:
        ValueError: if something is neither an argument of the command nor a launch option, or there is no such
            `accelerate_config`.
    """
    *parsed, remaining = parser.parse_args_and_config(list(argv), return_remaining_strings=True)
    options = resolve_accelerate_config_argument(remaining)
    # A script's name ends the launcher's own options.
    _, unknown = launch_command_parser().parse_known_args([*options, "script.py"]) if options else (None, [])
    if unknown:
        raise ValueError(f"unknown arguments {' '.join(unknown)}; --help shows those that there are.")
    return tuple(parsed), options


def launched(module: str, options: Sequence[str], argv: Sequence[str]) -> int | None:
    """Runs `module` with `argv` under the launcher and returns its exit status, where there are options for that.

    None where there are none, or where a launcher, which then knows them, has started this process.
    """
    if not options or "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ:
        return None
    if "--config_file" not in options and not torch.accelerator.is_available():
        # The launcher starts one process on a CPU, however many are asked for, unless this configuration says how.
        on_cpu = importlib.resources.files("trl_steer.integrations").joinpath("accelerate", "ddp_cpu.yaml")
        processes = [] if "--num_processes" in options else ["--num_processes", "1"]
        options = ["--config_file", str(on_cpu), *processes, *options]
    arguments: Any = launch_command_parser().parse_args([*options, "--module", module, *argv])
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0
