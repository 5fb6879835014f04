"""Winogrande (Sakaguchi et al. 2021), debiased: which of two options fills the blank of a sentence?

Test is the full published validation split (1267 rows; the published test split has no labels). Validation is 20% of
the training rows. The authors' code splits the published validation split into halves instead.

>>> row = {
...     "sentence": "John moved the couch from the garage to the backyard to create space. The _ is small.",
...     "option1": "garage",
...     "option2": "backyard",
...     "answer": "1",
... }
>>> print(prompt(row) + completion(row))  # doctest: +NORMALIZE_WHITESPACE
Please choose the correct answer to fill in the blank to complete the given sentence: John moved the couch from the
garage to the backyard to create space. The _ is small.
Option1: garage
Option2: backyard
Answer: Option1.
"""

from trl_steer.tasks.base import Benchmark, Row
from trl_steer.tasks.splits import split_in_two, validation_from_train
from trl_steer.tasks.text import MARK, first, last

SPLITS = {
    "default": validation_from_train(test="validation"),
    "steerling": split_in_two("validation", 0.5, first="validation", second="test"),
}


def prompt(row: Row) -> str:
    return (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\nOption1: {row['option1']}\nOption2: {row['option2']}\n"
    )


def completion(row: Row) -> str:
    return f"Answer: {answer(row)}."


def answer(row: Row) -> str:
    return f"Option{row['answer']}"


def strict(text: str) -> str | None:
    """The last `Answer: Option1` or `Answer: Option2`."""
    return _named(last(r"Answer: Option([12])\b", text))


def flexible(text: str) -> str | None:
    """The number or the first option after the last mark, else the last option of the text."""
    option = r"(?i:option)\W{0,3}"
    return _named(last(rf"{MARK}(?:(?s:.*?){option})??([12])\b", text) or last(rf"{option}([12])\b", text))


def steerling(text: str) -> str | None:
    """As in the authors' code: the first option after the first mark."""
    return _named(first(r"(?is)answer\s*[:\-].*?\boption\s*([12])\b", text))


def _named(number: str | None) -> str | None:
    return number and f"Option{number}"


TASK = Benchmark(
    name="winogrande",
    source={"dataset_path": "allenai/winogrande", "config": "winogrande_debiased"},
    prompt=prompt,
    completion=completion,
    answer=answer,
    strict=strict,
    flexible=flexible,
    steerling=steerling,
    splits=SPLITS,
    key=("sentence", "option1", "option2"),
    choices=lambda row: ["Answer: Option1", "Answer: Option2"],
    choice_names=lambda row: ["Option1", "Option2"],
)
