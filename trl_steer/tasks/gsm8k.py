r"""GSM8K (Cobbe et al. 2021): grade-school word problems, solved step by step.

Test is the full published test split (1319 rows). Validation is 20% of the training rows. The authors' code splits the
published test split instead, 20% for validation and 80% for test.

>>> row = {
...     "question": "What is fifteen more than a quarter of 48?",
...     "answer": "A quarter of 48 is 48/4=<<48/4=12>>12.\nThe number is 12+15=<<12+15=27>>27.\n#### 27",
... }
>>> print(prompt(row) + completion(row))
What is fifteen more than a quarter of 48?
A quarter of 48 is 48/4=<<48/4=12>>12.
The number is 12+15=<<12+15=27>>27.
Answer: 27
"""

import re
from decimal import Decimal

from trl_steer.tasks.base import Benchmark, Row
from trl_steer.tasks.splits import split_in_two, validation_from_train
from trl_steer.tasks.text import MARK, first, last

SPLITS = {
    "default": validation_from_train(test="test"),
    "steerling": split_in_two("test", 0.2, first="test", second="validation"),
}

# 5, 1,234.50, .5, $7; a minus sign belongs to the number unless it is a subtraction.
_NUMBER = r"((?:(?<![\w)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+))"


def prompt(row: Row) -> str:
    return f"{row['question']}\n"


def completion(row: Row) -> str:
    reasoning, number = _solution(row)
    return f"{reasoning}\nAnswer: {number}"


def answer(row: Row) -> str:
    return _canonical(_solution(row)[1])


def strict(text: str) -> str | None:
    """The number after the last `Answer: `, without thousands separators and trailing zeros."""
    number = last(rf"Answer: {_NUMBER}", text)
    return number and _canonical(number)


def flexible(text: str) -> str | None:
    """The number after the last mark, else the last number of the text."""
    number = last(MARK + _NUMBER, text) or last(_NUMBER, text)
    return number and _canonical(number)


def steerling(text: str) -> str | None:
    """As in the authors' code: the first number in the line of the last mark, else the last number of the text.

    It only matches numbers of more than three digits with separators: of `1200`, it takes `120`.
    """
    three_digits = r"([-+]?\d{1,3}(?:,\d{3})*(?:\.\d+)?)"
    line = last(r"(?i)answer\s*:\s*(.+)", text.strip()) or ""
    number = first(three_digits, line) or last(three_digits, text)
    return number and _canonical(number)


def _canonical(number: str) -> str:
    return f"{Decimal(re.sub('[$,]', '', number)).normalize():f}"


def _solution(row: Row) -> tuple[str, str]:
    reasoning, mark, number = row["answer"].partition("####")
    if not mark:
        raise ValueError(f"Expected a GSM8K solution that ends in '#### <number>', got {row['answer']!r}.")
    return reasoning.strip(), number.strip()


TASK = Benchmark(
    name="gsm8k",
    source={"dataset_path": "openai/gsm8k", "config": "main"},
    prompt=prompt,
    completion=completion,
    answer=answer,
    strict=strict,
    flexible=flexible,
    steerling=steerling,
    splits=SPLITS,
    key=("question",),
)
