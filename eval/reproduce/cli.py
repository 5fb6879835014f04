"""`trl-steer reproduce`: makes the runs of a study."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl_steer.extras import require
from trl_steer.files import FolderInUseError

from ..analysis.arguments import positive
from ..console import Console, output_to
from ..runs import RunError
from .driver import name_of, reproduce
from .plan import describe, status
from .results import results
from .study import STUDIES, STUDY, Study, StudyError, load

OURS = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))


def main(argv: Sequence[str] | None = None, prog: str = "trl-steer reproduce") -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["status"]:
            return _status(arguments[1:], f"{prog} status")
        return _reproduce(arguments, prog)
    except (StudyError, RunError, FolderInUseError, ImportError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _reproduce(argv: Sequence[str], prog: str) -> int:
    args = _parser(prog).parse_args(argv)
    study = _selected(load(args.study), args)
    folder = args.output or Path("studies", study.name)
    if args.tiny:
        from .tiny import shrink

        with output_to(Path(os.devnull)):
            study = shrink(study, folder)
    if args.dry_run:
        with output_to(Path(os.devnull)):  # warnings of libraries
            lines = describe(study, folder, args.workers or 1)
        print("\n".join(lines))
        return 0
    require("eval", "lm_eval")
    try:
        with closing(Console()) as console:
            found = reproduce(study, folder, _engine(args, folder.resolve()), console, args.take)
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped. The same command continues from there.", file=sys.stderr)
        return 130
    failed = [result for result in found if result.failure is not None and not result.failure.diverged]
    return 1 if failed else 0


def _status(argv: Sequence[str], prog: str) -> int:
    parser = argparse.ArgumentParser(prog=prog, description="Prints the progress of a study.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the study")
    folder = parser.parse_args(argv).folder
    study = load(folder / STUDY)
    found = list(results(folder))
    print(f"{study.name}: {study.title}", *status(found, study.size()), sep="\n")
    for result in found:
        if result.failure is not None:
            print(f"{name_of(result.cell)}: {result.failure.reason}")
    return 0


def _engine(args: argparse.Namespace, folder: Path) -> Any:
    if args.engine == "ray":
        from .cluster import RayEngine

        return RayEngine(folder, args.workers, args.gpus)
    from .local import LocalEngine

    return LocalEngine(folder, args.workers)


def _selected(study: Study, args: argparse.Namespace) -> Study:
    """The part of a study that is asked for.

    Raises:
        StudyError: The study has no such model, task or row.
    """
    chosen: dict[str, Any] = {}
    for name, label in (("models", "label"), ("tasks", "name"), ("rows", "name")):
        parts, asked = getattr(study, name), getattr(args, name)
        known = [getattr(part, label) for part in parts]
        for one in asked or []:
            if one not in known:
                raise StudyError(f"{study.name} has no {name[:-1]} {one!r}. Choose from {', '.join(known)}.")
        chosen[name] = [
            part for part, name_of_it in zip(parts, known, strict=True) if not asked or name_of_it in asked
        ]
    if args.seeds:
        chosen["seeds"] = args.seeds
        chosen["tasks"] = [replace(task, seeds=()) for task in chosen["tasks"]]
    if args.default_rates:
        chosen["rows"] = [replace(row, rates=()) for row in chosen["rows"]]
    return replace(study, **chosen)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} STUDY [options]\n       {prog} status DIR",
        description="Makes the runs of a study: learning rates on validation with one seed, then the best rate of "
        "each row on test with all seeds. Run the command again to continue: finished runs are not repeated.",
    )
    parser.add_argument("study", metavar="STUDY", help=f"path of a study file, or one of {OURS}")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the study (default: studies/NAME of the study)"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: processes on this machine; ray: a Ray cluster, the running one if there is one (default: local)",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="number of runs at a time (default: one for each GPU, or one; with ray, as many as there is room for)",
    )
    parser.add_argument(
        "--gpus",
        type=_share,
        metavar="SHARE",
        help="share of a GPU for each run, with --engine ray (default: 1 if the cluster has GPUs)",
    )
    for name, what in (("models", "labels of models"), ("tasks", "tasks"), ("rows", "names of rows")):
        parser.add_argument(f"--{name}", nargs="+", metavar=name[:-1].upper(), help=f"only these {what}")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="these seeds instead of the study's")
    parser.add_argument(
        "--default-rates", action="store_true", help="use the learning rate of the preset for each row (default: off)"
    )
    parser.add_argument(
        "--take",
        type=Path,
        metavar="DIR",
        help="copy the finished runs in DIR, such as demo-run, that have the settings of a run of the study",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="all rows on a model of two blocks with random weights and a few generated examples, with two rates and "
        "two seeds. Shows in minutes that everything runs (default: off)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only print the size of the study, the trainable parameters and the time that is left (default: off)",
    )
    return parser


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < math.inf:
        raise argparse.ArgumentTypeError(f"expected 0 or a positive number, got {text!r}")
    return share
