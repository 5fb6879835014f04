"""Functions for the lm-eval tasks in `eval/tasks/steer`: documents, filters, and a metric."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trl_steer.tasks import sources
from trl_steer.tasks.registry import BENCHMARKS

if TYPE_CHECKING:
    from datasets import DatasetDict

# As in lm-eval's own filters.
NO_ANSWER = "[invalid]"
FEWSHOT_ROWS = 64


def documents(benchmark: str, splits: str = "default", **metadata: Any) -> "DatasetDict":
    """The documents of a benchmark, with `prompt`, `completion`, `answer` and, for multiple choice, `choices` and
    `label`.

    Args:
        benchmark (`str`): One of [`BENCHMARKS`].
        splits (`str`): Its splits, see [`load_task`].
        metadata: The other metadata of the lm-eval task, see [`sources.from_metadata`].

    Returns:
        `DatasetDict`: `test`, `validation`, and `fewshot`, the first rows of train (empty without a train split).
    """
    import datasets

    task = BENCHMARKS[benchmark]
    parts: dict[str, Any] = task.rows(splits, **sources.from_metadata(task.name, task.source, metadata))
    train = parts.pop("train", [])
    parts["fewshot"] = train.select(range(min(FEWSHOT_ROWS, len(train)))) if train else train
    return datasets.DatasetDict(
        {
            part: datasets.Dataset.from_list([{"benchmark": benchmark, **task.document(row)} for row in rows])
            for part, rows in parts.items()
        }
    )


def read_answers(reader: str, responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[str]:
    """An lm-eval filter when `reader` (`"strict"`, `"flexible"` or `"steerling"`) is bound: the answers extracted from
    the first response to each document, `[invalid]` where there is none."""
    return [
        getattr(BENCHMARKS[doc["benchmark"]], reader)(texts[0]) or NO_ANSWER
        for texts, doc in zip(responses, docs, strict=True)
    ]


def no_answer(references: Sequence[str], predictions: Sequence[str], **_kwargs: Any) -> float:
    """An lm-eval metric: the proportion of responses from which [`read_answers`] could not extract an answer."""
    return sum(answer == NO_ANSWER for answer in predictions) / len(predictions)
