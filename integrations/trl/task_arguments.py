"""`--task`: one of our benchmarks as the data set of a TRL script."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import trl
from trl import ScriptArguments

from trl_steer.tasks import TASKS, get_task, load_task


class TaskError(ValueError):
    """`--task` cannot be trained on as it was asked for."""


@dataclass
class TaskScriptArguments(ScriptArguments):
    """TRL's script arguments, and which benchmark to train on.

    With `task`, `dataset_name` and `dataset_config` name another copy of its data set, and the evaluation split is
    `validation` where none is given.
    """

    dataset_test_split: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Dataset split to use for evaluation: 'test' by default, 'validation' with --task."},
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": f"Train on a task: {', '.join(TASKS)}. What evaluates is the lm-eval task steer_TASK, and "
            "`trl-steer alpaca-eval` for alpaca. "
            "--dataset_name and --dataset_config then name another copy of its data set."
        },
    )
    task_splits: str = field(
        default="default",
        metadata={
            "help": "'default', what the lm-eval tasks hold out, or 'steerling', the splits of the paper's code."
        },
    )
    task_conversational: bool = field(
        default=False,
        metadata={"help": "Train on chat messages; evaluate with lm-eval's --apply_chat_template then."},
    )
    task_rows: int | None = field(default=None, metadata={"help": "Only the first so many rows of each split."})

    def __post_init__(self):
        if self.dataset_test_split is None:
            self.dataset_test_split = "validation" if self.task else "test"
        if self.task_rows is not None and self.task_rows < 1:
            raise ValueError(f"--task_rows must be at least 1, got {self.task_rows}.")
        if self.task is not None and self.task_splits not in get_task(self.task).splits:
            raise ValueError(f"--task_splits {self.task_splits}: choose {' or '.join(get_task(self.task).splits)}.")

    def load(self, evaluate: bool = False) -> Any:
        """The splits of `task`, as a `DatasetDict`.

        Args:
            evaluate (`bool`, *optional*, defaults to `False`): Whether the split to evaluate on has to be there too.

        Raises:
            TaskError: if they cannot be had, or have no rows to train on.
        """
        needed = [self.dataset_train_split, *([self.dataset_test_split] if evaluate else [])]
        given = {"dataset_path": self.dataset_name, "config": self.dataset_config}
        source = {key: value for key, value in given.items() if value is not None}
        try:
            splits = load_task(str(self.task), self.task_splits, conversational=self.task_conversational, **source)
        except (ConnectionError, FileNotFoundError, ValueError) as error:
            raise TaskError(" ".join([f"--task {self.task}: {error}", *getattr(error, "__notes__", [])])) from error
        for name in needed:
            if name not in splits:
                raise TaskError(
                    f"--task {self.task}: this copy of the data set gives {', '.join(splits)} and no {name}. Name "
                    "another with --dataset_name or --dataset_config, or another split."
                )
        if self.task_rows is None:
            return splits
        return type(splits)(
            {name: rows.select(range(min(self.task_rows, len(rows)))) for name, rows in splits.items()}
        )


def with_task(types: Sequence[Any]) -> list[Any]:
    """The argument types of a TRL script, with `--task`."""
    return [TaskScriptArguments if kind is ScriptArguments else kind for kind in types]


@contextmanager
def task_as_dataset(trl_arguments: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Gives the arguments for a TRL script that reads its data set from `--task`, where there is one.

    The scripts look `get_dataset` up in `trl` when they run, and call it where a mixture of data sets is asked for.

    Raises:
        TaskError: if `--task` and a mixture are both asked for, or the task's rows cannot be had.
    """
    script = trl_arguments[0]
    if getattr(script, "task", None) is None:
        yield trl_arguments
        return
    mixture = trl_arguments[-1]
    if mixture.datasets:
        raise TaskError(f"both --task {script.task} and `datasets` were given, but a run has one data set.")
    rows = script.load(evaluate=trl_arguments[1].eval_strategy != "no")
    theirs = trl.get_dataset
    trl.get_dataset = lambda _mixture: rows  # type: ignore[misc, assignment]
    try:
        named = dataclasses.replace(script, dataset_name=None)
        yield (named, *trl_arguments[1:-1], dataclasses.replace(mixture, datasets=[script.task]))
    finally:
        trl.get_dataset = theirs  # type: ignore[misc]
