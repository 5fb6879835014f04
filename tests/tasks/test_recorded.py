"""`flexible` on what a real model wrote, labelled by hand; `recorded/record.py` says how."""

import json
from collections import Counter
from pathlib import Path

import pytest

from trl_steer.tasks import BENCHMARKS, SIX

NAMES = [task.name for task in SIX]
# Why `flexible` disagrees with a careful reader, and how often.
KNOWN = {
    "boolq": {"says yes or no, not true or false": 25},
    "winogrande": {"lists both options behind the mark": 1},
    "arc_challenge": {"announces every option in turn": 2},
    "gsm8k": {
        "breaks off before an answer; the last number stands for one": 27,
        "a calculation behind the mark; its first number stands for the result": 1,
    },
    "aqua": {},
    "listops": {"stands outside the tags": 15},
}


def recorded(benchmark: str) -> list[dict]:
    path = Path(__file__).parent / "recorded" / f"{benchmark}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


CASES = [(name, case) for name in NAMES for case in recorded(name)]


@pytest.mark.parametrize(
    ("benchmark", "case"), CASES, ids=[f"{name}-{case['model']}-{case['row']}" for name, case in CASES]
)
def test_flexible_reads_what_a_careful_reader_does_or_what_is_written_down_as_its_error(benchmark, case):
    expected = case.get("read", case["label"])
    assert BENCHMARKS[benchmark].flexible(case["text"]) == expected, case["text"]
    assert ("read" in case) == ("why" in case)


@pytest.mark.parametrize("benchmark", NAMES)
def test_twenty_one_texts_of_each_model_are_recorded_and_disagreements_are_counted(benchmark):
    cases = recorded(benchmark)
    assert Counter(case["model"] for case in cases) == {"base": 21, "chat": 21, "steered": 21}
    assert len({(case["model"], case["row"]) for case in cases}) == 63
    assert Counter(case["why"] for case in cases if "why" in case) == KNOWN[benchmark]
