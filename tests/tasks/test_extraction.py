"""Reading answers from model outputs as they come: `messy/<task>.jsonl`, labelled by hand, a reason for each."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_steer.tasks import SIX, get_task

MESSY = Path(__file__).parent / "messy"
BENCHMARKS = [task.name for task in SIX]


def labelled(benchmark: str) -> list[dict]:
    return [json.loads(line) for line in (MESSY / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()]


CASES = [(benchmark, case) for benchmark in BENCHMARKS for case in labelled(benchmark)]


@pytest.mark.parametrize(
    ("benchmark", "case"), CASES, ids=[f"{benchmark}-{case['text'][:24]!r}" for benchmark, case in CASES]
)
def test_messy_output_is_read_as_labelled(benchmark, case):
    assert get_task(benchmark).extract(case["text"]) == case["expected"], case["reason"]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@given(text=st.text())
def test_any_text_is_read_as_an_answer_or_as_none(benchmark, text):
    answer = get_task(benchmark).extract(text)
    assert answer is None or (answer == answer.strip() != "")


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("text", ["9" * 5000, "Answer: " + "9" * 5000 + ".5", "<answer>" + "9" * 5000, "((((" * 5000])
def test_endless_repetition_is_no_answer(benchmark, text):
    assert get_task(benchmark).extract(text) is None
