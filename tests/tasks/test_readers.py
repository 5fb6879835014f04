"""Reading answers: what each of the three readers promises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_steer.tasks import BENCHMARKS, SIX

NAMES = [task.name for task in SIX]
READERS = ["strict", "flexible", "steerling"]


# (text, what `strict` reads, what `flexible` reads)
PROMISES = {
    "boolq": [
        ("Answer: True.", "True", "True"),
        ("The answer is false.", None, "False"),
        ("**Answer:** True", None, "True"),
        ("\\boxed{\\text{False}}", None, "False"),
        ("It is true, and not false.", None, "True"),
        ("true/false", None, None),
        ("Falsehoods are untrue.", None, None),
        ("Answer: yes.", None, None),
    ],
    "winogrande": [
        ("Answer: Option2.", "Option2", "Option2"),
        ("The answer is Option 1, not Option 2.", None, "Option1"),
        ("**Answer: Option2**", "Option2", "Option2"),
        ("Not Option1. I choose option 2", None, "Option2"),
        ("Answer: Option12", None, None),
        ("Answer: Ada.", None, None),
    ],
    "arc_challenge": [
        ("Answer: (A) iron.", "A", "A"),
        ("Answer: (3) glass.", "3", "3"),
        ("The correct answer is **B**.", None, "B"),
        ("Answer: C", None, "C"),
        ("\\boxed{D}", None, "D"),
        ("It must be (B) wood.", None, "B"),
        ("A plant needs 2 things.", None, None),
    ],
    "gsm8k": [
        ("So 2 * 600 = 1200.\nAnswer: 1,200", "1200", "1200"),
        ("Answer: 3\nNo, wait.\nAnswer: 4.50 dollars", "4.5", "4.5"),
        ("The answer is $-7.", None, "-7"),
        ("**Answer:** 12 apples, of 15", None, "12"),
        ("We get \\boxed{0.5} of 3", None, "0.5"),
        ("She has 5 + 3 = 8 left.", None, "8"),
        ("Answer: none", None, None),
    ],
    "aqua": [
        ("x = 3, so C.\nAnswer: D.", "D", "D"),
        ("The correct option: the answer is (E).", None, "E"),
        ("Hence \\boxed{\\text{B}}", None, "B"),
        ("Not A, so it is option C", None, "C"),
        ("A train leaves.", None, None),
    ],
    "listops": [
        ("<answer>7</answer>", "7", "7"),
        ("<answer>...</answer> <answer>7</answer><answer>8</answer>", "7", "7"),
        ("<answer> The result is **7**. </answer>", None, "7"),
        ("So <Answer>7", None, "7"),
        ("<answer>7 or 8</answer>", None, None),
        ("Answer: 7", None, None),
    ],
}


@pytest.mark.parametrize("benchmark", NAMES)
def test_strict_reads_only_the_trained_mark_and_flexible_other_usual_ones(benchmark):
    task = BENCHMARKS[benchmark]
    read = [(text, task.strict(text), task.flexible(text)) for text, *_ in PROMISES[benchmark]]
    assert read == PROMISES[benchmark]


# (text, what the authors' code reads)
STEERLING = {
    "boolq": [("answer : FALSE", "False"), ("untrue, so true", "True"), ("yes", None)],
    "winogrande": [("Answer - option 2, Option1", "Option2"), ("Option1", None)],
    "arc_challenge": [("ANSWER (C", "C"), ("It is b.", "B"), ("A or B", None), ("Answered by D", "E")],
    "gsm8k": [
        ("Answer: 120 of 7", "120"),
        ("Answer: 1,200", "1200"),
        ("Answer: 1200", "120"),
        ("It is 1234", "4"),
        ("Answer: none, 5 at most\nAnswer: none", "5"),
        ("none", None),
    ],
    "aqua": [("Answer: (c)", "C"), ("Answer: B\nAnswer: C", "B"), ("not a but d", "D"), ("x", None)],
    "listops": [("<ANSWER> 07\n</answer>", "7"), ("<answer>x</answer><answer>7</answer>", None), ("<answer>7", None)],
}


@pytest.mark.parametrize("benchmark", NAMES)
def test_steerling_reads_as_the_authors_code_does(benchmark):
    read = [(text, BENCHMARKS[benchmark].steerling(text)) for text, _ in STEERLING[benchmark]]
    assert read == STEERLING[benchmark]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("benchmark", NAMES)
@given(text=st.text())
def test_any_text_is_read_as_an_answer_or_as_none(benchmark, reader, text):
    answer = getattr(BENCHMARKS[benchmark], reader)(text)
    assert answer is None or (answer == answer.strip() != "")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("benchmark", NAMES)
@pytest.mark.parametrize("text", ["9", "Answer: ", "<answer>", "(", "\\boxed{", "Option1, Answer: ", "A "])
def test_endless_repetition_is_read_without_an_error(benchmark, reader, text):
    getattr(BENCHMARKS[benchmark], reader)(text * 2000)
