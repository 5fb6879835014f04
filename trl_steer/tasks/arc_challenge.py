"""ARC-Challenge (Clark et al. 2018): grade-school science questions with three to five options.

Train, validation (299 rows) and test (1172 rows) are the published splits. The authors' code keeps a shuffled half of
the validation split. Options are labelled by letters or, in a few rows, by digits; the label is the row's own.
"""

import re

from trl_steer.tasks.base import Row, Task
from trl_steer.tasks.splits import halves_of, official
from trl_steer.tasks.text import AFTER, CALLED, CAPITAL, IS_CORRECT, MARK, SMALL, announced, by_rank, plain

# A digit that begins no quantity: not 5 %, 5 cm, 2.5, 1/2, 1:4, 2-3, 3 x 10^8.
_DIGIT = rf"[1-5](?!\w|[.,:]\d|[^\S\n]*(?:(?!{AFTER})[a-z]|[%/\u2044\u00d7*^\u00b0+]|-\s*\d))"
_ANNOUNCED = announced(rf"{CALLED}(?:({CAPITAL})|({_DIGIT})|({SMALL}))")
_BRACKETED = r"[(\[]\s*([A-Ea-e1-5])\s*[)\]]"
# "Answer: heat (C)"
_IN_LINE = re.compile(rf"{MARK}[^\n]*?{_BRACKETED}")
# The options of the prompt once more, or a numbered reasoning.
_LIST = r"\W*(?:A|1)[)\].:][^\n]*\s+\W*(?:B|2)[)\].:]"
# What the text opens with. A capital that opens a sentence ("A plant ...") is no label; one before a mark is, unless
# that is the "A:" of an answer.
_AT_START = re.compile(
    rf"\A(?!{_LIST})\W*?{CALLED}(?:{_BRACKETED}|([A-E1-5])(?=\s*$|[).:,](?!\d)|\s+{IS_CORRECT})(?!:\s*[(\[]?[A-E]\b)"
    r"|([a-e])(?=\)|\.(?!\w)|\s*\Z))",
    re.MULTILINE,
)
_NAMED = re.compile(rf"(?:(?<!\w){_BRACKETED}|(?i:option|choice)\s+(?:is\s+)?([A-E1-5])(?![\w']|[.,]\d))")


def prompt(row: Row) -> str:
    return f"Answer the following multiple-choice question.\nQuestion: {row['question']}\n{options(row)}\n"


def options(row: Row) -> str:
    return "\n".join(f"({label}) {text}" for label, text in _options(row))


def completion(row: Row) -> str:
    return f"Answer: ({answer(row)}) {dict(_options(row))[answer(row)]}."


def answer(row: Row) -> str:
    return str(row["answerKey"])


def extract(text: str) -> str | None:
    """A label, `A` to `E` or `1` to `5`: the first that is announced as the answer.

    Without such a word, the label that the text opens with, else the only one that it names (`(B)` or `option B`).
    """
    text = plain(text)
    found = next(by_rank([*_ANNOUNCED, _IN_LINE, _AT_START], text), None)
    if found:
        return found[0].upper()
    named = {"".join(groups).upper() for groups in _NAMED.findall(text)}
    return named.pop() if len(named) == 1 else None


def _options(row: Row) -> list[tuple[str, str]]:
    return list(zip(map(str, row["choices"]["label"]), row["choices"]["text"], strict=True))


TASK = Task(
    name="arc_challenge",
    source={"dataset_path": "allenai/ai2_arc", "config": "ARC-Challenge"},
    prompt=prompt,
    completion=completion,
    answer=answer,
    extract=extract,
    splits={
        "default": official,
        "steerling": halves_of("validation", 0.5, first="validation", second=None, test="test"),
    },
    key=("question", "choices"),
    # Cut before the closing bracket: the options then differ in their last token alone, and lm-eval scores all of
    # them in one pass.
    choices=lambda row: [f"Answer: ({label}" for label, _ in _options(row)],
    choice_names=lambda row: [label for label, _ in _options(row)],
)
