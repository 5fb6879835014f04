"""ARC-Challenge (Clark et al. 2018): grade-school science questions with three to five options.

Train, validation (299 rows) and test (1172 rows) are the published splits. The authors' code splits the published
validation split into halves instead. Options have letters or, in a few rows, digits as labels.

>>> row = {
...     "question": "Sodium, Na, is in the same group as",
...     "choices": {"text": ["Ne.", "Mg.", "Ca.", "K."], "label": ["A", "B", "C", "D"]},
...     "answerKey": "D",
... }
>>> print(prompt(row) + completion(row))
Answer the following multiple-choice question.
Question: Sodium, Na, is in the same group as
(A) Ne.
(B) Mg.
(C) Ca.
(D) K.
Answer: (D) K..
"""

import re

from trl_steer.tasks.base import Benchmark, Row
from trl_steer.tasks.splits import official, split_in_two
from trl_steer.tasks.text import LETTER, MARK, first, last

SPLITS = {
    "default": official,
    "steerling": split_in_two("validation", 0.5, first="validation", second="test"),
}


def prompt(row: Row) -> str:
    options = "\n".join(f"({label}) {text}" for label, text in _options(row))
    return f"Answer the following multiple-choice question.\nQuestion: {row['question']}\n{options}\n"


def completion(row: Row) -> str:
    return f"Answer: ({answer(row)}) {dict(_options(row))[answer(row)]}."


def answer(row: Row) -> str:
    return str(row["answerKey"])


def strict(text: str) -> str | None:
    """The last `Answer: (X)`, a letter `A` to `E` or a digit `1` to `5`."""
    return last(r"Answer: \(([A-E1-5])\)", text)


def flexible(text: str) -> str | None:
    """The label after the last mark, else the last label of the text: a separate letter, or a digit in parentheses."""
    return last(rf"{MARK}(?i:option\W+)?({LETTER}|[1-5](?!\w))", text) or last(rf"({LETTER}|(?<=\()[1-5](?=\)))", text)


def steerling(text: str) -> str | None:
    """As in the authors' code: the label after the first mark or "answer", else the only label of the text."""
    found = first(r"(?i)answer\s*[:\-]?\s*\(?([A-E1-5])", text)
    alone = re.findall(r"(?i)\b([A-E1-5])\b", text)
    if found is None and len(alone) == 1:
        found = alone[0]
    return found and found.upper()


def _options(row: Row) -> list[tuple[str, str]]:
    return list(zip(map(str, row["choices"]["label"]), row["choices"]["text"], strict=True))


TASK = Benchmark(
    name="arc_challenge",
    source={"dataset_path": "allenai/ai2_arc", "config": "ARC-Challenge"},
    prompt=prompt,
    completion=completion,
    answer=answer,
    strict=strict,
    flexible=flexible,
    steerling=steerling,
    splits=SPLITS,
    key=("question", "choices"),
    # Without the closing parenthesis, the options only differ in the last token, so that lm-eval scores all of them in
    # one forward pass.
    choices=lambda row: [f"Answer: ({label}" for label, _ in _options(row)],
    choice_names=lambda row: [label for label, _ in _options(row)],
)
