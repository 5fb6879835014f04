"""`trl-steer report DIR`: tables, tests, pictures and a CSV file of a study."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trl_steer.extras import require
from trl_steer.files import new_folder, remove

from ..reproduce.study import StudyError
from ..runs import RunError


def main(argv: Sequence[str] | None = None, prog: str = "trl-steer report") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Reports the results of a study, finished or not: tables in Markdown and LaTeX, paired tests, "
        "pictures, and a CSV file of all runs.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of `trl-steer reproduce`")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the files of the report (default: DIR/report)"
    )
    parser.add_argument(
        "--paper",
        action="store_true",
        help="add the paper's numbers, with differences recomputed (default: off)",
    )
    parser.add_argument(
        "--reference",
        nargs="+",
        default=[],
        metavar="ROW",
        help="rows that all others are compared with (default: those of full fine-tuning and LoRA)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report (default: off)")
    args = parser.parse_args(argv)
    try:
        print(f"Wrote {report(args.folder, args.output, args.paper, args.overwrite, args.reference)}.")
    except (StudyError, RunError, ImportError, OSError, ValueError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def report(
    folder: Path,
    output: Path | None = None,
    paper: bool = False,
    overwrite: bool = False,
    references: Sequence[str] = (),
) -> Path:
    """Writes the report of a study into a folder, all of it or nothing.

    Args:
        folder (`Path`): The output folder of the study.
        output (`Path`, *optional*): The folder for the report. Default: `report` in that of the study.
        paper (`bool`, defaults to `False`): Whether to add the paper's numbers.
        overwrite (`bool`, defaults to `False`): Whether to replace an existing report.
        references (`Sequence[str]`, *optional*): The rows that all others are compared with. Default: those of full
            fine-tuning and LoRA, or the first one without them.

    Returns:
        `Path`: The text of the report.

    Raises:
        StudyError: The study is invalid.
        RunError: `folder` is not that of a study, a run is damaged, or runs to be compared were evaluated on different
            examples.
        ValueError: The study does not have one of `references`.
        FileExistsError: `output` has other files, or a report that is not to be replaced, or is the working directory.
    """
    require("reproduce", "matplotlib", "scipy")
    from . import document, records

    output = folder / "report" if output is None else output
    if Path.cwd().is_relative_to(output.resolve()):
        raise FileExistsError(f"The report would replace {output}, in which the command runs. Choose another folder.")
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    if output.is_file() or not all(map(document.is_ours, names)):
        raise FileExistsError(f"{output} exists and is not only a report. Choose another folder.")
    if names and not overwrite:
        raise FileExistsError(f"{output} has a report. Use --overwrite to replace it, or choose another folder.")
    files = document.files(records.read(folder), paper, references)
    with new_folder(output) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
        remove(output.resolve())
    return output / document.REPORT
