"""`trl-steer export`: writes an adapter in the format of another program.

What a format needs is imported after the arguments have been checked, so that `--help` and errors are shown without
delay.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_steer.checkpoint_names import check_folder
from trl_steer.extras import require


class Format(NamedTuple):
    """
    A format of `--format`.

    Attributes:
        help (`str`): Its line in `--help`.
        run (`Callable`): Called with the arguments and the progress. Returns what was written, in one line.
        options (`tuple[str, ...]`): The options that it takes, beyond `--output` and `--overwrite`.
        is_file (`bool`): Whether it writes a file, and not a folder.
    """

    help: str
    run: Callable[[argparse.Namespace, Any], str]
    options: tuple[str, ...] = ()
    is_file: bool = False


def main(argv: Sequence[str] | None = None, prog: str = "trl-steer export") -> int:
    """Exports an adapter. Returns the exit status."""
    parser = _parser(prog)
    args = parser.parse_args(argv)
    _check_options(parser, args)
    try:
        if args.format.startswith("gguf"):
            require("gguf", "gguf")
        _check_paths(args)
        return _export(args)
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped. Nothing was written.", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        expected = isinstance(error, (ValueError, OSError, ImportError))
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{prog}: error: {reason}{'' if expected else ' (--debug shows the traceback)'}", file=sys.stderr)
        return 1


def _export(args: argparse.Namespace) -> int:
    import transformers

    from trl_steer.integrations.export.progress import Progress

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    with Progress() as progress:
        said = FORMATS[args.format].run(args, progress)
    print(said)
    return 0


def _gguf(args: argparse.Namespace, progress: Any) -> str:
    from trl_steer.integrations.llama_cpp import export

    if args.check:
        return export.check_gguf(args.folder, args.check, args.base, args.calibration, progress)
    return export.export_gguf(args.folder, args.output, args.base, args.calibration, progress)


def _control_vector(args: argparse.Namespace, progress: Any) -> str:
    from trl_steer.integrations.llama_cpp import export

    return export.export_control_vector(args.folder, args.output)


def _lora(args: argparse.Namespace, progress: Any) -> str:
    from trl_steer.integrations.export.lora import export_lora

    return export_lora(args.folder, args.output, args.overwrite)


def _transformers(args: argparse.Namespace, progress: Any) -> str:
    from trl_steer.integrations.transformers.export import export_checkpoint

    return export_checkpoint(args.folder, args.output, args.base, args.overwrite, progress)


FORMATS = {
    "gguf": Format(
        "a GGUF model of llama.cpp with the adapter inside",
        _gguf,
        ("base", "calibration", "check"),
        is_file=True,
    ),
    "gguf-control-vector": Format("a control vector of llama.cpp", _control_vector, is_file=True),
    "lora": Format("a LoRA adapter on a layer `post_block_steering` of each block", _lora),
    "transformers": Format("a checkpoint that transformers loads without this package", _transformers, ("base",)),
}


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Write an adapter in the format of another program.")
    parser.add_argument("folder", help="folder or Hub id of the adapter")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="; ".join(f"{name}: {form.help}" for name, form in FORMATS.items()),
    )
    parser.add_argument("--output", type=Path, metavar="OUT", help="file or folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output (default: off)")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="gguf: GGUF file of the base model. transformers: Hub id or folder of the base model (default: that in "
        "the adapter's configuration)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="gguf, low rank: text on which the norms of hidden states are measured (default: a text of 5 kB in "
        "several languages)",
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help="gguf, low rank: write nothing, and check that this exported file has room for the norms of hidden "
        "states on the text of --calibration",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")
    return parser


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    taken = FORMATS[args.format].options
    for option in ("base", "calibration", "check"):
        if getattr(args, option) is not None and option not in taken:
            parser.error(f"--{option} cannot be used with --format {args.format}")
    if (args.output is None) == (args.check is None):
        parser.error(f"pass {'--output or --check' if 'check' in taken else '--output'}")
    if args.format == "gguf" and args.base is None:
        parser.error("--format gguf needs --base, the GGUF file of the base model")


def _check_paths(args: argparse.Namespace) -> None:
    """Checks that the inputs exist, and that the output may be written.

    Raises:
        OSError: They do not, or it may not.
    """
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        check_folder(args.folder, file)
    form = FORMATS[args.format]
    files = [args.calibration, args.check, args.base if form.is_file else None]
    for path in files:
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path}.")
    output = args.output
    if output is None or not output.exists():
        return
    if form.is_file != output.is_file():
        raise FileExistsError(f"{output} is {'a folder' if form.is_file else 'a file'}. Choose another --output.")
    if form.is_file or any(output.iterdir()):
        if not args.overwrite:
            raise FileExistsError(f"{output} exists. Choose another --output, or replace it with --overwrite.")
        configs = ("config.json", "adapter_config.json")
        if not form.is_file and not any((output / name).is_file() for name in configs):
            raise FileExistsError(f"{output} is not a folder that was exported. Choose another --output.")
        for name, path in (("adapter", args.folder), ("base model", args.base)):
            if path is not None and Path(path).exists() and output.samefile(path):
                raise FileExistsError(f"{output} is the {name}. Choose another --output.")


if __name__ == "__main__":
    sys.exit(main())
