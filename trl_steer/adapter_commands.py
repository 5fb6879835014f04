"""`trl-steer split` and `trl-steer join`: the two halves of a joint adapter.

PEFT is imported once the arguments are known to be good, so that `--help` and mistakes answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def split(argv: Sequence[str] | None = None, prog: str = "trl-steer split") -> int:
    """Writes the two halves of a joint adapter; returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description="Write the two halves of a joint adapter.")
    parser.add_argument("folder", help="folder or Hub id of the joint adapter")
    parser.add_argument("--lora", type=Path, required=True, metavar="OUT", help="folder for the LoRA half")
    parser.add_argument("--steering", type=Path, required=True, metavar="OUT", help="folder for the steering half")
    args = parser.parse_args(argv)

    def action() -> None:
        _check_there(args.folder)
        from trl_steer.tuners.joint_steering.folders import split_adapter

        split_adapter(args.folder, args.lora, args.steering)

    return _run(prog, action)


def join(argv: Sequence[str] | None = None, prog: str = "trl-steer join") -> int:
    """Joins a LoRA and a steering adapter; returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description="Join a LoRA and a steering adapter into one.")
    parser.add_argument("--lora", required=True, metavar="FOLDER", help="folder or Hub id of the LoRA adapter")
    parser.add_argument("--steering", required=True, metavar="FOLDER", help="folder or Hub id of the steering adapter")
    parser.add_argument("folder", type=Path, help="folder for the joint adapter")
    args = parser.parse_args(argv)

    def action() -> None:
        _check_there(args.lora)
        _check_there(args.steering)
        from trl_steer.tuners.joint_steering.folders import join_adapters

        join_adapters(args.lora, args.steering, args.folder)

    return _run(prog, action)


def _check_there(adapter: str) -> None:
    """Looks whether there can be such an adapter, which takes no time."""
    path = Path(adapter).expanduser()
    if path.is_dir():
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (path / name).exists():
                raise FileNotFoundError(f"Can't find weights in {adapter}: there is no {name}.")
    elif path.exists():
        raise NotADirectoryError(f"{adapter} is a file; give the folder of an adapter.")
    elif adapter.count("/") != 1 or adapter.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no folder {adapter}, and a Hub id has the form OWNER/NAME.")


def _run(prog: str, action: Callable[[], None]) -> int:
    try:
        action()
    except (ValueError, TypeError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
