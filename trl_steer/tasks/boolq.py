"""BoolQ (Clark et al. 2019): is the answer to a question about a passage true or false?

Test is the full published validation split (3270 rows; the published test split has no labels). Validation is 20% of
the training rows. The authors' code splits the published validation split instead (validation 80%, test 20%).

>>> row = {
...     "passage": "The season is set for release in 2019.",
...     "question": "are they going to make a punisher season 2",
...     "answer": True,
... }
>>> print(prompt(row) + completion(row))
Answer the question with a true/false based on the given passage.
Passage: The season is set for release in 2019.
Question: are they going to make a punisher season 2
Answer: True.
"""

from trl_steer.tasks.base import Benchmark, Row
from trl_steer.tasks.splits import split_in_two, validation_from_train
from trl_steer.tasks.text import MARK, first, last

SPLITS = {
    "default": validation_from_train(test="validation"),
    "steerling": split_in_two("validation", 0.2, first="validation", second="test"),
}

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


def strict(text: str) -> str | None:
    """The last `Answer: True` or `Answer: False`."""
    return _named(last(r"Answer: ((?i:true|false))\b", text))


def flexible(text: str) -> str | None:
    """The word after the last mark, else the first true or false, excluding "true/false" as in the prompt."""
    word = r"((?i:true|false))\b(?!/)"
    return _named(last(MARK + word, text) or first(rf"(?<![\w/]){word}", text))


def steerling(text: str) -> str | None:
    """As in the authors' code: the word after the first mark, else the first one of the text."""
    return _named(first(r"(?i)answer\s*:\s*(true|false)", text) or first(r"(?i)\b(true|false)\b", text))


def _named(word: str | None) -> str | None:
    return word and word.capitalize()


TASK = Benchmark(
    name="boolq",
    source={"dataset_path": "google/boolq", "config": None},
    prompt=prompt,
    completion=completion,
    answer=answer,
    strict=strict,
    flexible=flexible,
    steerling=steerling,
    splits=SPLITS,
    key=("passage", "question"),
    choices=lambda row: [f"Answer: {name}" for name in ANSWERS],
    choice_names=lambda row: ANSWERS,
)
