"""`trl-steer compare RUN RUN`: is one run better than another on the same examples?"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trl_steer.extras import require
from trl_steer.statistics import exact_mcnemar, paired_bootstrap

from ..runs import Run, RunError, open_run


def main(argv: Sequence[str] | None = None, prog: str = "trl-steer compare") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compares two runs on the examples that both were scored on: the difference of their accuracies "
        "with a paired bootstrap interval, and the exact McNemar test.",
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="folder of a run")
    args = parser.parse_args(argv)
    try:
        require("eval", "scipy")
        print("\n\n".join(compare(*map(open_run, args.runs))))
    except (RunError, ImportError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def compare(first: Run, second: Run) -> list[str]:
    """A paragraph for each task.

    Raises:
        RunError: if there is no task that both were scored on, or their examples differ.
    """
    tasks = [task for task in first.tasks() if task in second.tasks()]
    if not tasks:
        had = [f"{run.folder} on {', '.join(run.tasks()) or 'none'}" for run in (first, second)]
        raise RunError(f"There is no task that both runs were scored on: {', '.join(had)}.")
    return [_paragraph(task, first, second) for task in tasks]


def _paragraph(task: str, first: Run, second: Run) -> str:
    examples = [[(row["id"], row["target"]) for row in run.scores(task)["examples"]] for run in (first, second)]
    if examples[0] != examples[1]:
        shared = len({*examples[0]} & {*examples[1]})
        raise RunError(
            f"{task}: a paired test needs the same examples in the same order, but the runs were scored on "
            f"{len(examples[0])} and {len(examples[1])}, {shared} of them the same. Score both with the same data."
        )
    ours, theirs = first.correct(task), second.correct(task)
    difference, (low, high) = paired_bootstrap(ours, theirs)
    pairs = list(zip(ours, theirs, strict=True))
    alone = [pairs.count((True, False)), pairs.count((False, True))]
    p_value = exact_mcnemar(ours, theirs, alternative="two-sided")
    return "\n".join(
        [
            f"{task}, {len(pairs)} examples",
            *(f"  {sum(side) / len(side):.3f}  {run.folder}" for run, side in ((first, ours), (second, theirs))),
            f"  first minus second: {difference:+.3f}, 95% interval {low:+.3f} to {high:+.3f} (paired bootstrap)",
            f"  right in the first alone {alone[0]}, in the second alone {alone[1]}: p = {p_value:.2g} (exact McNemar "
            "test, two-sided)",
        ]
    )
