"""BoolQ (Clark et al. 2019): is the answer to a question about a passage true or false?

Test is the published validation split in full (3270 rows; the published test split has no labels). Validation is 20%
of the training rows. The authors' code divides the published validation split instead, 80% to choose and 20% to test.
"""

import re

from trl_steer.tasks.base import Row, Task
from trl_steer.tasks.splits import halves_of, validation_from_train
from trl_steer.tasks.text import announced, by_rank, plain

# Not in the pair "true/false", which repeats the instruction and answers nothing.
_WORD = r"(?<![\w/])(?<!/\s)((?i:true|false))\b(?!\s*/\s*(?i:true|false))"
# In the line of the announcement: "Answer: the statement is false".
_ANNOUNCED = announced(_WORD, between=r"\s*[^\n]*?")
_ANYWHERE = re.compile(_WORD)
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
    """`True` or `False`: the first that the text announces as its answer, else the first that it contains."""
    found = next(by_rank([*_ANNOUNCED, _ANYWHERE], plain(text)), None)
    return found[0].capitalize() if found else None


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
