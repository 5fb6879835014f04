"""Alpaca: its two prompts to the byte, and any file with its columns as training data."""

import csv
import json

import pytest

from trl_steer.integrations.trl.arguments import SteeringArguments
from trl_steer.integrations.trl.data import load_task_rows
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


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows[1].jsonl"])
def test_values_are_the_text_that_the_file_has(tmp_path, name):
    rows = [
        {"instruction": "Which code?", "input": "NA", "output": "null"},
        {"instruction": "Which number?", "input": "0", "output": "1"},
    ]
    loaded = get_task("alpaca").rows(dataset_path=str(write(tmp_path / name, rows)))["train"]
    assert loaded.to_list() == rows


def test_numbers_become_text_and_stay_an_input(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"instruction": "Double it.", "input": 0, "output": 1.5}])
    (example,) = load_task("alpaca", dataset_path=str(path))["train"]
    assert "### Input:\n0\n" in example["prompt"]
    assert example["completion"] == "1.5"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rows"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": null}\n', "Row 1 of .* has no output"),
        ("nothing of the kind", "Can't read"),
    ],
)
def test_file_that_cannot_be_trained_on_is_an_error(tmp_path, text, said):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_task("alpaca", dataset_path=str(tmp_path / "rows.jsonl"))


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
    arguments = SteeringArguments(task="alpaca")
    assert load_task_rows(arguments, str(path), None)["train"].to_list() == EXAMPLES
    write(path, [{"question": "?"}])
    with pytest.raises(ValueError, match=r"lacks instruction, output\. Expected the columns"):
        load_task_rows(arguments, str(path), None)
