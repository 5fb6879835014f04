"""AQuA-RAT (Ling et al. 2017): algebra word problems with five options and a written rationale.

Train, validation (254 rows) and test (254 rows) are the published splits, for us and for the authors' code.
"""

import re

from trl_steer.tasks.base import Row, Task
from trl_steer.tasks.splits import official
from trl_steer.tasks.text import CALLED, CAPITAL, SMALL, announced, by_rank, plain

_ANNOUNCED = announced(rf"{CALLED}(?:({CAPITAL})|({SMALL}))")
# A capital, not within a word, and not degrees Celsius. A small letter is often a variable; it counts in brackets, as
# "option b", as a line of its own, and before the only line.
_STANDALONE = re.compile(
    rf"(?<!\w)[(\[]\s*([A-Ea-e])\s*[)\]]|(?<![\w'\u00b0])(?<!\u00b0\s)({CAPITAL})"
    rf"|(?i:\b(?:option|choice)\b(?:\s+is\b)?)[\s:]*({SMALL})"
    r"|^[ \t\"'(\[]*([a-e])[ \t\"').:,!\]]*$|\A\s*([a-e])[).]\s[^\n]*\Z",
    re.MULTILINE,
)


def prompt(row: Row) -> str:
    return f"Answer the following multiple-choice math question.\nQuestion: {row['question']}\n{options(row)}\n"


def options(row: Row) -> str:
    """The published options `A)text` in the form that ARC has, `(A) text`."""
    return "\n".join(f"({label}) {text}" for label, text in _options(row))


def completion(row: Row) -> str:
    return f"{row['rationale'].strip()}\nAnswer: {answer(row)}."


def answer(row: Row) -> str:
    return row["correct"]


def extract(text: str) -> str | None:
    """A letter, `A` to `E`: the last that is announced as the answer, else the last that stands alone."""
    found = next(by_rank([*_ANNOUNCED, _STANDALONE], plain(text)), None)
    return found[-1].upper() if found else None


def _options(row: Row) -> list[tuple[str, str]]:
    pairs = (option.partition(")") for option in row["options"])
    return [(label.strip(), text.strip()) for label, _, text in pairs]


TASK = Task(
    name="aqua",
    source={"dataset_path": "deepmind/aqua_rat", "config": "raw"},
    prompt=prompt,
    completion=completion,
    answer=answer,
    extract=extract,
    splits={"default": official, "steerling": official},
    key=("question",),
    choices=lambda row: [f"Answer: {label}" for label, _ in _options(row)],
    choice_names=lambda row: [label for label, _ in _options(row)],
)
