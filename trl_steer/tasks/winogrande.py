"""Winogrande (Sakaguchi et al. 2021), debiased: which of two options fills the blank of a sentence?

Test is the published validation split in full (1267 rows; the published test split has no labels). Validation is 20%
of the training rows. The authors' code divides the published validation split in two halves instead.
"""

import re

from trl_steer.tasks.base import Row, Task
from trl_steer.tasks.splits import halves_of, validation_from_train
from trl_steer.tasks.text import ANNOUNCED, plain

_NUMBERS = {"1": "Option1", "one": "Option1", "2": "Option2", "two": "Option2"}
_OPTION = r"(?i:option)\s*[#(]?\s*((?i:1|2|one|two))\b"
_MARK = re.compile(r"(?i:\banswer\b)\s*(?:(?i:is)\b|[:=\-])")
_AFTER_MARK = re.compile(_OPTION)
_NUMBER_ALONE = re.compile(ANNOUNCED + r"\(?([12])\b(?![.,]?\d|\s+[a-z])")
_NOTHING_ELSE = re.compile(r"\W*" + _OPTION + r"\W*")


def prompt(row: Row) -> str:
    return (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\nOption1: {row['option1']}\nOption2: {row['option2']}\n"
    )


def completion(row: Row) -> str:
    return f"Answer: {answer(row)}."


def answer(row: Row) -> str:
    return f"Option{row['answer']}"


def extract(text: str) -> str | None:
    """`Option1` or `Option2`: the first that follows `Answer:`; without that word, a text that is only an option."""
    text = plain(text)
    mark = _MARK.search(text)
    if mark is None:
        match = _NOTHING_ELSE.fullmatch(text)
    else:
        match = _AFTER_MARK.search(text, mark.end()) or _NUMBER_ALONE.match(text, mark.start())
    return _NUMBERS[match.group(1).lower()] if match else None


TASK = Task(
    name="winogrande",
    source={"dataset_path": "allenai/winogrande", "config": "winogrande_debiased"},
    prompt=prompt,
    completion=completion,
    answer=answer,
    extract=extract,
    splits={
        "default": validation_from_train(test="validation"),
        "steerling": halves_of("validation", 0.5, first="validation", second="test"),
    },
    key=("sentence", "option1", "option2"),
    choices=lambda row: ["Answer: Option1", "Answer: Option2"],
    choice_names=lambda row: ["Option1", "Option2"],
)
