"""Winogrande (Sakaguchi et al. 2021), debiased: which of two options fills the blank of a sentence?

Test is the published validation split in full (1267 rows; the published test split has no labels). Validation is 20%
of the training rows. The authors' code divides the published validation split in two halves instead.
"""

import re

from trl_steer.tasks.base import Row, Task
from trl_steer.tasks.splits import halves_of, validation_from_train
from trl_steer.tasks.text import AFTER, FILLER, IS_CORRECT, MARK, SENTENCE, by_rank, plain

_NUMBERS = dict.fromkeys(("1", "one", "first", "1st"), "Option1") | dict.fromkeys(
    ("2", "two", "second", "2nd"), "Option2"
)
_NUMBER = r"(?i:number|no\.)\s*"
_OPTION = (
    rf"(?<![A-Za-z])(?<!\b[Nn]ot\s)(?i:option)[\s#(\[:_\"'\-]*(?:{_NUMBER})?"
    r"((?i:1|2|one\b|two\b))(?!\d|[.,]\d)"
)
_ALONE = rf"(?:{_NUMBER}|#)?((?i:1|2|one|two))\b(?![.,/\-]?\d|[^\S\n]+(?!{AFTER})[a-z])"
_ORDINAL = r"(?i:(?:the\s+)?(first|second|1st|2nd)\s+(?:option|choice)\b)"
# By rank: behind the mark, right there or the first option after it; right behind a sentence; what a text opens with,
# if it is said to be the answer or the text names no other.
_RANKS = (
    re.compile(f"{MARK}(?:{FILLER}(?:{_ALONE}|{_ORDINAL})|.*?{_OPTION})", re.DOTALL),
    re.compile(f"{SENTENCE}{FILLER}(?:{_ALONE}|{_ORDINAL}|{_OPTION})"),
    re.compile(
        rf"\A[\W_]*(?:(?i:answer)\s+)?{_OPTION}"
        rf"(?=[\W_]*\Z|\s+because\b|\s+{IS_CORRECT}|\s*[:.,)(\n](?!.*(?i:option)))",
        re.DOTALL,
    ),
)


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
    """`Option1` or `Option2`: the first that follows `Answer:`; without it, the first that a sentence announces.

    Without any announcement, a text that is nothing but an option.
    """
    found = next(by_rank(_RANKS, plain(text)), None)
    return _NUMBERS[found[0].lower()] if found else None


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
