r"""Alpaca (Taori et al. 2023): instructions and responses, for instruction tuning.

The dataset is `yahma/alpaca-cleaned`, or a file with the columns `instruction`, `output` and optionally `input`. It
only has a train split. Responses are evaluated with AlpacaEval (`trl-steer alpaca-eval`).

The prompt is Alpaca's, with or without an input, and ends in `### Response:\n`.

>>> row = {"instruction": "Add them.", "input": "2 and 3", "output": "5"}
>>> print(prompt(row) + completion(row))  # doctest: +NORMALIZE_WHITESPACE
Below is an instruction that describes a task, paired with an input that provides further context. Write a response
that appropriately completes the request.
### Instruction:
Add them.
### Input:
2 and 3
### Response:
5
"""

import csv
import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_steer.tasks.base import Row, Task
from trl_steer.tasks.sources import read_hub, reader_of
from trl_steer.tasks.splits import official

if TYPE_CHECKING:
    from datasets import Dataset

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def prompt(row: Row) -> str:
    """The prompt with the row's input, or without one if it is empty or missing."""
    given = row.get("input")
    if given:
        return f"{_WITH_INPUT}### Instruction:\n{row['instruction']}\n\n### Input:\n{given}\n\n### Response:\n"
    return f"{_WITHOUT_INPUT}### Instruction:\n{row['instruction']}\n\n### Response:\n"


def completion(row: Row) -> str:
    return row["output"]


def message(row: Row) -> str:
    """The message to a chat model: the instruction and, after a blank line, the input."""
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]


def read(dataset_path: str, config: str | None = None) -> Mapping[str, "Dataset"]:
    """The rows of a file as the split `train`, or else those of [`sources.read_hub`].

    Raises:
        ValueError: The file cannot be read, has no rows, or lacks a column or a value.
    """
    reader = reader_of(dataset_path)
    if reader is None or not Path(dataset_path).is_file():
        return read_hub(dataset_path, config)
    import datasets

    options: dict[str, Any] = {}
    if reader == "csv":  # all cells are strings, also "NA" and "1"
        with open(dataset_path, newline="", encoding="utf-8-sig") as file:
            names = next(csv.reader(file), [])
        features = datasets.Features({name: datasets.Value("string") for name in names})
        options = {"features": features, "keep_default_na": False, "encoding": "utf-8-sig"}
    try:
        rows = datasets.load_dataset(reader, data_files=glob.escape(dataset_path), split="train", **options)
    except (StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"Can't read {dataset_path}, or it has no rows: {error.__cause__ or error!r}") from error
    lacking = sorted({"instruction", "output"} - set(rows.column_names))
    if lacking:
        raise ValueError(
            f"{dataset_path} lacks {', '.join(lacking)}. Expected the columns instruction, output and optionally "
            f"input, got {', '.join(rows.column_names)}."
        )
    return {"train": _as_text(rows, dataset_path)}


def _as_text(rows: "Dataset", source: str) -> "Dataset":
    """The columns of Alpaca as strings, where other values are written as JSON.

    Raises:
        ValueError: A row lacks an instruction or an output.
    """
    import datasets

    columns = {}
    for name in {"instruction", "input", "output"} & set(rows.column_names):
        values = rows[name][:]
        missing = next((index for index, value in enumerate(values) if value is None), None)
        if missing is not None and name != "input":
            raise ValueError(f"Row {missing} of {source} has no {name}.")
        columns[name] = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return datasets.Dataset.from_dict(columns)


class AlpacaTask(Task):
    """The Alpaca task, whose conversational examples do not use the Alpaca prompt."""

    def example(self, row: Row, conversational: bool = False) -> dict[str, Any]:
        if not conversational:
            return super().example(row)
        return {
            "prompt": [{"role": "user", "content": message(row)}],
            "completion": [{"role": "assistant", "content": completion(row)}],
        }


TASK = AlpacaTask(
    name="alpaca",
    source={"dataset_path": "yahma/alpaca-cleaned", "config": None},
    prompt=prompt,
    completion=completion,
    splits={"default": official},
    key=("instruction", "output"),
    read=read,
)
