"""Alpaca: its two prompts to the byte, and any file with its columns as training data."""

import csv
import json

import pytest

from trl_steer.integrations.trl.task_arguments import TaskError, TaskScriptArguments
from trl_steer.tasks import get_task, load_task

ROWS = [
    {"instruction": "Name a metal.", "input": "", "output": "Iron."},
    {"instruction": "Add them.", "input": "2 and 3", "output": "5"},
]
EXAMPLES = [
    {
        "prompt": "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName a metal.\n\n### Response:\n",
        "completion": "Iron.",
    },
    {
        "prompt": "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd them.\n\n"
        "### Input:\n2 and 3\n\n### Response:\n",
        "completion": "5",
    },
]


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_any_file_with_the_columns_is_training_data(tmp_path, name):
    splits = load_task("alpaca", dataset_path=str(write(tmp_path / name, ROWS)))
    assert list(splits) == ["train"]
    assert splits["train"].to_list() == EXAMPLES


def test_a_file_without_input_has_the_prompt_without_one(tmp_path):
    rows = [{name: row[name] for name in ("instruction", "output")} for row in ROWS]
    splits = load_task("alpaca", dataset_path=str(write(tmp_path / "rows.jsonl", rows)))
    assert not any("### Input" in row["prompt"] for row in splits["train"])


def test_a_chat_model_is_given_what_a_user_would_write():
    examples = [get_task("alpaca").example(row, conversational=True) for row in ROWS]
    assert [example["prompt"][0]["content"] for example in examples] == ["Name a metal.", "Add them.\n\n2 and 3"]
    assert examples[1]["completion"] == [{"role": "assistant", "content": "5"}]


def test_the_training_script_takes_the_task_by_name(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert TaskScriptArguments(task="alpaca", dataset_name=str(path)).load()["train"].to_list() == EXAMPLES
    write(path, [{"question": "?"}])
    with pytest.raises(TaskError, match="lacks instruction, output; expected the columns"):
        TaskScriptArguments(task="alpaca", dataset_name=str(path)).load()
