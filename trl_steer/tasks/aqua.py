"""AQuA-RAT (Ling et al. 2017): algebra word problems with five options and a written rationale.

Train, validation (254 rows) and test (254 rows) are the published splits, as in the authors' code.

>>> row = {
...     "question": "Express 50 mps in kmph?",
...     "options": ["A)172", "B)160", "C)150", "D)180", "E)120"],
...     "rationale": "25 * 18/5 = 180 kmph",
...     "correct": "D",
... }
>>> print(prompt(row) + completion(row))
Answer the following multiple-choice math question.
Question: Express 50 mps in kmph?
(A) 172
(B) 160
(C) 150
(D) 180
(E) 120
25 * 18/5 = 180 kmph
Answer: D.
"""

from trl_steer.tasks.base import Benchmark, Row
from trl_steer.tasks.splits import official
from trl_steer.tasks.text import LETTER, MARK, first, last


def prompt(row: Row) -> str:
    # The published options have the form `A)text`; this is that of ARC.
    options = "\n".join(f"({label}) {text}" for label, text in _options(row))
    return f"Answer the following multiple-choice math question.\nQuestion: {row['question']}\n{options}\n"


def completion(row: Row) -> str:
    return f"{row['rationale'].strip()}\nAnswer: {answer(row)}."


def answer(row: Row) -> str:
    return row["correct"]


def strict(text: str) -> str | None:
    """The last `Answer: X`, a letter `A` to `E`."""
    return last(r"Answer: ([A-E])\b", text)


def flexible(text: str) -> str | None:
    """The letter after the last mark, else the last separate letter."""
    return last(rf"{MARK}(?i:option\W+)?({LETTER})", text) or last(f"({LETTER})", text)


def steerling(text: str) -> str | None:
    """As in the authors' code: the letter after the first mark or "answer", else the last letter of the text."""
    found = first(r"(?i)answer\s*[:\-]?\s*\(?([A-E])", text) or last(r"(?i)\b([A-E])\b", text)
    return found and found.upper()


def _options(row: Row) -> list[tuple[str, str]]:
    pairs = (option.partition(")") for option in row["options"])
    return [(label.strip(), text.strip()) for label, _, text in pairs]


TASK = Benchmark(
    name="aqua",
    source={"dataset_path": "deepmind/aqua_rat", "config": "raw"},
    prompt=prompt,
    completion=completion,
    answer=answer,
    strict=strict,
    flexible=flexible,
    steerling=steerling,
    splits={"default": official, "steerling": official},
    key=("question",),
    choices=lambda row: [f"Answer: {label}" for label, _ in _options(row)],
    choice_names=lambda row: [label for label, _ in _options(row)],
)
