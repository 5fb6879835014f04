"""The synthetic ListOps task: ten thousand expressions against an evaluator written another way."""

import re
import statistics

import pytest

from trl_steer.tasks import get_task, listops

COUNT = 10_000
SOURCE = get_task("listops_synthetic").source
FIRST = "[MAX 5 8 5 3 3 6 [SM 2 0 [MED 7 [SM 6 2 ] [MED 6 5 8 5 7 0 3 ] ] 4 1 1 1 4 ] 0 0 ]"


@pytest.fixture(scope="module")
def expressions() -> list[str]:
    return listops.generate(
        COUNT, seed=SOURCE["seed"], min_tokens=SOURCE["min_tokens"], max_tokens=SOURCE["max_tokens"]
    )


def value_by_rewriting(expression: str) -> int:
    """Replaces an innermost list by its value until one digit is left; no stack, no tree."""
    rules = {
        "MIN": lambda digits: sorted(digits)[0],
        "MAX": lambda digits: sorted(digits)[-1],
        "MED": lambda digits: int(statistics.median(digits)),
        "SM": lambda digits: int(str(sum(digits))[-1]),
    }
    innermost = re.compile(r"\[(MIN|MAX|MED|SM)((?: \d)+) \]")
    replaced = 1
    while replaced:
        expression, replaced = innermost.subn(
            lambda match: str(rules[match[1]]([int(digit) for digit in match[2].split()])), expression
        )
    return int(expression)


def test_ten_thousand_values_agree_with_an_evaluator_written_another_way(expressions):
    assert len(set(expressions)) == COUNT
    wrong = [text for text in expressions if listops.evaluate(text) != value_by_rewriting(text)]
    assert not wrong


def test_ten_thousand_expressions_keep_the_bounds(expressions):
    for expression in expressions:
        tokens = expression.split(" ")
        assert 17 <= len(tokens) <= 63
        assert not set(tokens) - {*listops.OPERATORS, "]", *"0123456789"}
        depth, arguments = 0, [0]
        for token in tokens:
            if token == "]":
                assert 2 <= arguments.pop() <= listops.MAX_ARGUMENTS
                depth -= 1
                continue
            arguments[-1] += 1
            if token in listops.OPERATORS:
                depth += 1
                arguments.append(0)
                assert depth < listops.MAX_DEPTH
        assert (depth, arguments) == (0, [1])


def test_generated_listops_are_pinned(expressions):
    assert expressions[0] == FIRST
    assert listops.generate(3, seed=42, min_tokens=17, max_tokens=63) == expressions[:3]
