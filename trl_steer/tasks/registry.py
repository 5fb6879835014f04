"""The tasks by name, and their rows in the form that TRL trains on."""

from typing import TYPE_CHECKING, Any

from trl_steer.tasks import alpaca, aqua, arc_challenge, boolq, gsm8k, listops_task, winogrande
from trl_steer.tasks.base import Benchmark, Task

if TYPE_CHECKING:
    from datasets import DatasetDict

SIX = (boolq.TASK, winogrande.TASK, arc_challenge.TASK, gsm8k.TASK, aqua.TASK, listops_task.TASK)
BENCHMARKS: dict[str, Benchmark] = {task.name: task for task in (*SIX, listops_task.SYNTHETIC)}
TASKS: dict[str, Task] = {**BENCHMARKS, alpaca.TASK.name: alpaca.TASK}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task named {name!r}. Choose one of: {', '.join(TASKS)}.")
    return TASKS[name]


def load_task(name: str, splits: str = "default", *, conversational: bool = False, **source: Any) -> "DatasetDict":
    """A task's training, validation and test rows as TRL's prompt-completion data set.

    Args:
        name (`str`): One of [`TASKS`].
        splits (`str`, *optional*, defaults to `"default"`): `"default"`, the splits that the lm-eval tasks score, or
            `"steerling"`, those of the code that the paper's authors released.
        conversational (`bool`, *optional*, defaults to `False`): Whether prompt and completion are lists of one chat
            message each, for a chat model that is also evaluated with `--apply_chat_template`, and not strings.
        source: Where the rows come from: `dataset_path` and `config`, each optional. `listops_synthetic`, which is
            generated, takes `seed`, `train`, `validation`, `test`, `min_tokens` and `max_tokens` instead.

    Returns:
        `DatasetDict`: `train`, `validation` and `test` with the columns `prompt` and `completion`. A split that needs
        rows which the source lacks is absent.

    Raises:
        ValueError: for a task, splits or entries of `source` that do not exist.

    Example:
        >>> load_task("boolq", config="boolq_offline")["train"][0]["completion"]
        'Answer: True.'
    """
    import datasets

    task = get_task(name)
    # Built anew and not by `map`, whose cache would not notice that a later version of a prompt is another one.
    return datasets.DatasetDict(
        {
            part: datasets.Dataset.from_list([task.example(row, conversational) for row in rows])
            for part, rows in task.rows(splits, **source).items()
        }
    )
