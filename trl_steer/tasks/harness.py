"""What the lm-eval tasks in `eval/tasks/steer` call: their documents, their filters, a metric."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trl_steer.tasks import sources
from trl_steer.tasks.registry import BENCHMARKS

if TYPE_CHECKING:
    from datasets import DatasetDict

# lm-eval's own filters give this where a pattern finds nothing.
NO_ANSWER = "[invalid]"
FEWSHOT_ROWS = 64


def documents(benchmark: str, splits: str = "default", **metadata: Any) -> "DatasetDict":
    """The rows of a benchmark as documents with `prompt`, `completion`, `answer`, and `choices`, `label` where it has
    options: `test`, `validation`, and `fewshot`, the first rows of train (none where the source has no train split).

    Args:
        benchmark (`str`): One of [`BENCHMARKS`].
        splits (`str`): Which of its splits, see [`load_task`].
        metadata: Everything else in the lm-eval task's metadata; see [`sources.from_metadata`] for what is used.
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
    """An lm-eval filter, once `reader` is bound: what [`Benchmark`]'s reader of that name finds in the first response
    to each document, `[invalid]` where it finds no answer."""
    return [
        getattr(BENCHMARKS[doc["benchmark"]], reader)(texts[0]) or NO_ANSWER
        for texts, doc in zip(responses, docs, strict=True)
    ]


def no_answer(references: Sequence[str], predictions: Sequence[str], **_kwargs: Any) -> float:
    """An lm-eval metric: the share of answers, as [`read_answers`] gives them, that could not be read."""
    return sum(answer == NO_ANSWER for answer in predictions) / len(predictions)
