"""`trl-steer split` and `trl-steer join`: convert between a joint adapter and a LoRA and a steering adapter.

PEFT is imported after the arguments have been checked, so that `--help` and errors are shown without delay.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

from trl_steer.checkpoint_names import check_folder


def split(argv: Sequence[str] | None = None, prog: str = "trl-steer split") -> int:
    """Splits a joint adapter into a LoRA and a steering adapter. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Split a joint adapter into a LoRA and a steering adapter."
    )
    parser.add_argument("folder", help="folder or Hub id of the joint adapter")
    parser.add_argument("--lora", type=Path, required=True, metavar="OUT", help="folder to write the LoRA adapter to")
    parser.add_argument(
        "--steering", type=Path, required=True, metavar="OUT", help="folder to write the steering adapter to"
    )
    args = parser.parse_args(argv)

    def action() -> str:
        _check_adapters(args.folder)
        from trl_steer.tuners.joint_steering.folders import split_adapter

        split_adapter(args.folder, args.lora, args.steering)
        return f"Wrote the LoRA adapter to {args.lora} and the steering adapter to {args.steering}."

    return _run(prog, action)


def join(argv: Sequence[str] | None = None, prog: str = "trl-steer join") -> int:
    """Joins a LoRA and a steering adapter into a joint adapter. Returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description="Join a LoRA and a steering adapter into a joint adapter.")
    parser.add_argument("--lora", required=True, metavar="FOLDER", help="folder or Hub id of the LoRA adapter")
    parser.add_argument("--steering", required=True, metavar="FOLDER", help="folder or Hub id of the steering adapter")
    parser.add_argument("folder", type=Path, help="folder to write the joint adapter to")
    args = parser.parse_args(argv)

    def action() -> str:
        _check_adapters(args.lora, args.steering)
        from trl_steer.tuners.joint_steering.folders import join_adapters

        join_adapters(args.lora, args.steering, args.folder)
        return f"Wrote the joint adapter to {args.folder}."

    return _run(prog, action)


def _check_adapters(*adapters: str) -> None:
    for adapter, file in product(adapters, ("adapter_config.json", "adapter_model.safetensors")):
        check_folder(adapter, file)


def _run(prog: str, action: Callable[[], str]) -> int:
    try:
        print(action())
    except (ValueError, TypeError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
