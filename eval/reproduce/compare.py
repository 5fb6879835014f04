"""`trl-steer compare RUN RUN`: compares two runs on the same examples with a paired test."""

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
        description="Compares two runs on the tasks on which both were evaluated: the difference of their accuracies "
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
        RunError: The runs have no task in common, or their examples are different.
    """
    tasks = [task for task in first.tasks() if task in second.tasks()]
    if not tasks:
        had = [f"{run.folder} on {', '.join(run.tasks()) or 'none'}" for run in (first, second)]
        raise RunError(f"The runs have no task in common: {', '.join(had)}. Evaluate both on the same task.")
    return [_paragraph(task, first, second) for task in tasks]


def _paragraph(task: str, first: Run, second: Run) -> str:
    examples = [[(row["id"], row["target"]) for row in run.scores(task)["examples"]] for run in (first, second)]
    if examples[0] != examples[1]:
        shared = len({*examples[0]} & {*examples[1]})
        raise RunError(
            f"{task}: a paired test needs the same examples in the same order, but the runs were evaluated on "
            f"{len(examples[0])} and {len(examples[1])} examples, {shared} in common. Evaluate both on the same data."
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
            f"  correct only in the first {alone[0]}, only in the second {alone[1]}: p = {p_value:.2g} (exact McNemar "
            "test, two-sided)",
        ]
    )
