"""`trl-steer analyze NAME`: runs a measure, and writes its numbers, a summary and a picture."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_steer.extras import require

from ..console import Console
from .report import write

# Name -> (module in this package, line in `trl-steer analyze --help`).
MEASURES = {
    "mlp-share": ("mlp_share", "how large the MLP's output is compared with the attention's and the block's"),
    "oracle": ("oracle", "what simple updates explain of a fine-tuned model's hidden states: site, rank, blocks"),
    "distill": ("distill", "a steering adapter from a fine-tuned model, without training"),
    "lora": ("lora", "the LoRA adapter that explains a steering adapter best, for engines that know only LoRA"),
    "extract": ("extract", "steering vectors from pairs of texts"),
    "subspace-alignment": ("subspace_alignment", "whether weight updates and steering would learn the same subspace"),
    "shift-similarity": (
        "shift_similarity",
        "whether LoRA and steering of joint adapters shift in the same direction",
    ),
    "adapter-norms": ("adapter_norms", "the norms of adapters' updates in each block"),
    "inspect": ("inspection", "what is in an adapter folder, and whether it is healthy"),
    "drift": ("drift", "how far an adapter moves the model from its base, for each scaling"),
    "first-order": ("first_order", "how well first-order theory predicts the change of an MLP's output"),
    "theorem-3.1": ("theorem_3_1", "how well steering of the block's output can replace that of the MLP's"),
    "proposition-4.2": ("proposition_4_2", "whether two updates of a simplified model learn the same subspace"),
}

# Their messages say what was wrong with the input.
_INPUT_ERRORS = (ValueError, OSError, ImportError)


def main(argv: Sequence[str] | None = None, prog: str = "trl-steer analyze") -> int:
    """Runs a measure. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(prog)
    if not arguments or arguments[0] not in MEASURES:
        parser.parse_args(arguments)  # --help or an error, for each of which argparse exits
        parser.print_help()
        return 0
    name = arguments[0]
    measure = _module(name)
    args = _measure_parser(f"{prog} {name}", name, measure).parse_args(arguments[1:])
    # As in `trl-steer demo`, before PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = Console()
    console.start(getattr(measure, "STEPS", 1))
    try:
        require("analysis", "matplotlib")
        report = measure.run(args, console)
        files = write(report, args.output, MEASURES[name][0], [*prog.split(), *arguments])
    except KeyboardInterrupt:
        console.close()
        print(f"\n{prog} {name}: stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        console.close()
        if args.debug:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = "" if isinstance(error, _INPUT_ERRORS) else " (--debug shows the traceback)"
        print(f"{prog} {name}: error: {reason}{hint}", file=sys.stderr)
        return 1
    console.close()
    print(f"{report.summary}\nWrote {', '.join(map(str, files))}.")
    return 0


def _module(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{MEASURES[name][0]}")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measures what the paper measures, on your own models, adapters and texts. Writes the numbers "
        "(JSON), a summary (Markdown) and a picture (PNG).",
        epilog=f"{prog} NAME --help shows the arguments of a measure.",
    )
    names = parser.add_subparsers(dest="name", metavar="NAME", title="measures")
    for name, (_, help_line) in MEASURES.items():
        names.add_parser(name, help=help_line, add_help=False)
    return parser


def _measure_parser(prog: str, name: str, measure: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=measure.__doc__)
    measure.add_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("analysis"),
        metavar="DIR",
        help=f"folder for {MEASURES[name][0]}.json, .md and .png (default: analysis)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")
    return parser
