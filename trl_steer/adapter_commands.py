"""`trl-steer split` and `trl-steer join`: convert between a joint adapter and a LoRA and a steering adapter.

PEFT is imported after the arguments have been checked, so that `--help` and errors are shown without delay.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


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
        _check_exists(args.folder)
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
        _check_exists(args.lora)
        _check_exists(args.steering)
        from trl_steer.tuners.joint_steering.folders import join_adapters

        join_adapters(args.lora, args.steering, args.folder)
        return f"Wrote the joint adapter to {args.folder}."

    return _run(prog, action)


def _check_exists(adapter: str) -> None:
    """Checks that an adapter exists, as far as possible without importing anything or accessing the network.

    Raises:
        FileNotFoundError: It does not.
        NotADirectoryError: It is a file.
    """
    path = Path(adapter).expanduser()
    if path.is_dir():
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (path / name).exists():
                raise FileNotFoundError(f"{adapter} is not the folder of an adapter: there is no {name}.")
    elif path.exists():
        raise NotADirectoryError(f"{adapter} is a file, expected the folder of an adapter.")
    elif adapter.count("/") != 1 or adapter.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no folder {adapter}. A Hub id has the form OWNER/NAME.")


def _run(prog: str, action: Callable[[], str]) -> int:
    try:
        print(action())
    except (ValueError, TypeError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
