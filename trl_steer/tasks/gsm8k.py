"""GSM8K (Cobbe et al. 2021): grade-school word problems, solved step by step.

Test is the published test split in full (1319 rows). Validation is 20% of the training rows. The authors' code divides
the published test split instead, 20% to choose and 80% to test.
"""

import re
from fractions import Fraction

from trl_steer.tasks.base import Row, Task
from trl_steer.tasks.splits import halves_of, validation_from_train
from trl_steer.tasks.text import MARK, SENTENCE, by_rank, plain

_CURRENCY = "[$\u20ac\u00a3\u00a5\u20b9]"
# Between the digits of one number: 1,234 and 1'234, with narrow spaces too, and 1,00,000.
_GROUPED = re.compile(r"(?<=\d)[,'\u2019\u00a0\u2009\u202f](?=\d{3}(?!\d))|(?<=\d),(?=\d{2},\d)")
_GROUPED_BY_SPACES = re.compile(rf"\W*{_CURRENCY}?\d{{1,3}}(?: \d{{3}})+(?:\D.*)?", re.DOTALL)
_LATEX_FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{\s*(-?)\s*([\d,]+)\s*\}|()(\d))\s*(?:\{\s*([\d,]+)\s*\}|(\d))")
_TIMES_TEN = re.compile(r"\s*(?:\\times|\\cdot|[\u00d7x*])\s*10\s*\^\s*\{?\s*(-?\d{1,2})\s*\}?")
# The rest of the line, up to the next announcement in it.
_REST = r"\s*((?:(?!\banswers?\b\s*(?:is\b|[:=]))[^\n])*)"
_ANNOUNCED = tuple(re.compile(start + _REST, re.IGNORECASE) for start in (MARK, SENTENCE))
_SIGN_IN_FRONT = re.compile(r"\A\W*?(?:-|\b(?i:minus|negative)\b)\s+(?=\S?\d)")
# A minus counts as a sign where it touches the number and follows neither a number nor a bracket. What stands behind
# a caret or an underscore is an exponent or an index.
_NUMBER = re.compile(
    rf"(?<![\^_])(?<![\^_][-{{])(?P<sign>(?<![\w)\]%])-)?{_CURRENCY}?(?P<minus>(?<={_CURRENCY})-)?"
    r"(?:(?:(?P<whole>\d+)\s+)?(?P<top>\d+)\s*[/\u2044]\s*(?P<bottom>\d+)(?![\d/])"
    r"|(?P<number>\d+(?:\.\d+)?|\.\d+)(?:[eE](?P<power>[+-]?\d{1,2})(?!\w))?(?:\s*(?i:(?P<scale>thousand|million|billion))\b)?)"
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


def prompt(row: Row) -> str:
    return f"{row['question']}\n"


def completion(row: Row) -> str:
    reasoning, number = _solution(row)
    return f"{reasoning}\nAnswer: {number}"


def answer(row: Row) -> str:
    return canonical(Fraction(_solution(row)[1].replace(",", "")))


def extract(text: str) -> str | None:
    """A number in canonical form: that of the last announcement that has one in its line, else the last of the text.

    A line with a calculation (`3 * 5 = 15`) gives its result. Canonical: no thousands separators, no trailing
    zeros, `-` before a negative number; `1/2` is `0.5`.
    """
    # Spaces that group digits become ordinary ones in the plain form, so they go first.
    text = _GROUPED.sub("", _LATEX_FRACTION.sub(r" \1\2\4/\5\6", _GROUPED.sub("", text)))
    text = _TIMES_TEN.sub(r"e\1", _GROUPED.sub("", plain(text)))
    for lines in by_rank(_ANNOUNCED, text):
        for line in reversed(lines):
            line = _SIGN_IN_FRONT.sub("-", line)
            if _GROUPED_BY_SPACES.fullmatch(line):
                line = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", line)
            sides = [numbers for side in line.split("=") if (numbers := _numbers(side))]
            if sides:
                # Of an equation, the side that is one number: "3 * 5 = 15 apples", but also "15 (= 3 * 5)".
                return canonical(([side for side in sides if len(side) == 1] or sides)[-1][0])
    numbers = _numbers(text)
    return canonical(numbers[-1]) if numbers else None


def canonical(number: Fraction) -> str:
    """How an answer is spelled: `1234`, `-5`, `0.5`."""
    return str(number.numerator) if number.denominator == 1 else f"{float(number):.10g}"


def _solution(row: Row) -> tuple[str, str]:
    reasoning, mark, number = row["answer"].partition("####")
    if not mark:
        raise ValueError(f"expected a GSM8K solution that ends in '#### <number>', got {row['answer']!r}")
    return reasoning.strip(), number.strip()


def _numbers(text: str) -> list[Fraction]:
    numbers = []
    for match in _NUMBER.finditer(text):
        if len(match[0]) >= 100:
            continue  # a model that repeats one digit; Python refuses to convert very long ones
        if match["number"]:
            value = Fraction(match["number"]) * Fraction(10) ** int(match["power"] or 0)
            value *= _SCALES.get((match["scale"] or "").lower(), 1)
        elif int(match["bottom"]):
            value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
        else:
            continue
        numbers.append(-value if match["sign"] or match["minus"] else value)
    return numbers


TASK = Task(
    name="gsm8k",
    source={"dataset_path": "openai/gsm8k", "config": "main"},
    prompt=prompt,
    completion=completion,
    answer=answer,
    extract=extract,
    splits={
        "default": validation_from_train(test="test"),
        "steerling": halves_of("test", 0.2, first="test", second="validation"),
    },
    key=("question",),
)
