"""The tasks by name, and their rows in the format of TRL."""

from typing import TYPE_CHECKING, Any

from trl_steer.tasks import alpaca, aqua, arc_challenge, boolq, gsm8k, listops_task, winogrande
from trl_steer.tasks.base import Benchmark, Task

if TYPE_CHECKING:
    from datasets import DatasetDict

SIX = (boolq.TASK, winogrande.TASK, arc_challenge.TASK, gsm8k.TASK, aqua.TASK, listops_task.TASK)
BENCHMARKS: dict[str, Benchmark] = {task.name: task for task in (*SIX, listops_task.SYNTHETIC)}
TASKS: dict[str, Task] = {**BENCHMARKS, alpaca.TASK.name: alpaca.TASK}


def get_task(name: str) -> Task:
    """The task with this name.

    Raises:
        ValueError: There is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}. Choose one of: {', '.join(TASKS)}.")
    return TASKS[name]


def load_task(name: str, splits: str = "default", *, conversational: bool = False, **source: Any) -> "DatasetDict":
    """Loads a task in TRL's prompt-completion format.

    Args:
        name (`str`): One of [`TASKS`].
        splits (`str`, *optional*, defaults to `"default"`): `"default"`, the splits of the lm-eval tasks, or
            `"steerling"`, the splits of the authors' code.
        conversational (`bool`, *optional*, defaults to `False`): Whether to use the conversational format, for a chat
            model that is evaluated with `--apply_chat_template`.
        source: `dataset_path` and `config` of another copy of the dataset. For `listops_synthetic`, which is
            generated: `seed`, `train`, `validation`, `test`, `min_tokens` and `max_tokens`.

    Returns:
        `DatasetDict`: `train`, `validation` and `test`, with the columns `prompt` and `completion`. A split whose rows
        are missing from the source is left out.

    Raises:
        ValueError: There is no such task, or it does not have these splits or entries of `source`.

    Example:
        >>> load_task("boolq", config="boolq_offline")["train"][0]["completion"]
        'Answer: True.'
    """
    import datasets

    task = get_task(name)
    # Not with `map`, whose cache does not notice changes of a prompt.
    return datasets.DatasetDict(
        {
            part: datasets.Dataset.from_list([task.example(row, conversational) for row in rows])
            for part, rows in task.rows(splits, **source).items()
        }
    )
