"""BoolQ (Clark et al. 2019): is the answer to a question about a passage true or false?

Test is the published validation split in full (3270 rows; the published test split has no labels). Validation is 20%
of the training rows. The authors' code divides the published validation split instead, 80% to choose and 20% to test.
"""

import re

from trl_steer.tasks.base import Row, Task
from trl_steer.tasks.splits import halves_of, validation_from_train
from trl_steer.tasks.text import ANNOUNCED, plain

_ANNOUNCED = re.compile(ANNOUNCED + r"\(?((?i:true|false))\b(?!\s*/)")
# The pair "true/false" repeats the instruction and answers nothing.
_FIRST = re.compile(r"(?<![\w/])((?i:true|false))\b(?!\s*/)")
ANSWERS = ["True", "False"]


def prompt(row: Row) -> str:
    return (
        "Answer the question with a true/false based on the given passage.\n"
        f"Passage: {row['passage']}\nQuestion: {row['question']}\n"
    )


def completion(row: Row) -> str:
    return f"Answer: {answer(row)}."


def answer(row: Row) -> str:
    return str(row["answer"])


def extract(text: str) -> str | None:
    """`True` or `False`: the one that the text announces as its answer, else the first that it contains."""
    text = plain(text)
    match = _ANNOUNCED.search(text) or _FIRST.search(text)
    return match.group(1).capitalize() if match else None


TASK = Task(
    name="boolq",
    source={"dataset_path": "google/boolq", "config": None},
    prompt=prompt,
    completion=completion,
    answer=answer,
    extract=extract,
    splits={
        "default": validation_from_train(test="validation"),
        "steerling": halves_of("validation", 0.2, first="validation", second="test"),
    },
    key=("passage", "question"),
    choices=lambda row: [f"Answer: {name}" for name in ANSWERS],
    choice_names=lambda row: ANSWERS,
)
