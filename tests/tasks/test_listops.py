"""The ListOps task: values, generated expressions, and reading answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_steer.tasks import listops


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("[MIN 2 9 [MAX 4 7 ] 0 ]", 0),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[SM 6 6 [SM 0 1 5 6 8 9 6 ] 2 7 1 8 4 ]", 9),
        ("[MED 5 1 4 ]", 4),
        ("[MED 0 9 5 [MIN 4 0 [SM 4 5 7 8 4 2 1 5 ] ] 4 ]", 4),
        ("[MED 3 4 ]", 3),
        ("[MED 9 8 1 0 ]", 4),
        ("[SM 9 1 ]", 0),
        ("[MIN 7 ]", 7),
        ("3", 3),
    ],
)
def test_listops_values_follow_the_published_rules(expression, value):
    assert listops.evaluate(expression) == value


nested_lists = st.recursive(
    st.integers(0, 9),
    lambda inner: st.tuples(st.sampled_from(["MIN", "MAX", "MED", "SM"]), st.lists(inner, min_size=1)),
)


def written(tree):
    return str(tree) if isinstance(tree, int) else f"[{tree[0]} {' '.join(map(written, tree[1]))} ]"


def value_of(tree):
    if isinstance(tree, int):
        return tree
    values = sorted(map(value_of, tree[1]))
    middle = values[len(values) // 2] + values[(len(values) - 1) // 2]
    return {"MIN": values[0], "MAX": values[-1], "MED": middle // 2, "SM": sum(values) % 10}[tree[0]]


@given(nested_lists)
def test_value_agrees_with_a_recursion_over_the_tree(tree):
    assert listops.evaluate(written(tree)) == value_of(tree)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("[MIN 2 9", "without a closing ']'"),
        ("[MIN 2 9 ] ]", "unexpected ']'"),
        ("[MIN ]", "unexpected ']'"),
        ("[MEAN 1 2 ]", r"unexpected '\[MEAN'.*\[MED"),
        ("[MIN 2 12 ]", "unexpected '12'"),
        ("[MIN 2 ² ]", "unexpected '²'"),
        ("1 2", "not exactly one value"),
        ("", "not exactly one value"),
    ],
)
def test_malformed_expression_is_an_error_that_names_the_place(expression, said):
    with pytest.raises(ValueError, match=said):
        listops.evaluate(expression)


def test_same_seed_gives_the_same_expressions_and_another_seed_others():
    first = listops.generate(50, seed=3, max_tokens=12)
    assert first == listops.generate(50, seed=3, max_tokens=12)
    assert first != listops.generate(50, seed=4, max_tokens=12)


@pytest.mark.parametrize("options", [{"max_tokens": 12}, {"min_tokens": 17, "max_tokens": 63}, {"max_tokens": 4}])
def test_expressions_are_distinct_valid_and_within_bounds(options):
    expressions = listops.generate(200, seed=0, **options)
    assert len(set(expressions)) == 200
    for expression in expressions:
        tokens = expression.split(" ")
        assert options.get("min_tokens", 4) <= len(tokens) <= options["max_tokens"]
        assert 0 <= listops.evaluate(expression) <= 9


def test_all_operators_and_digits_occur():
    tokens = " ".join(listops.generate(200, seed=0, max_tokens=12)).split()
    assert {*listops.OPERATORS, "]", *"0123456789"} == set(tokens)


def test_splits_do_not_overlap_and_an_earlier_one_ignores_the_size_of_a_later_one():
    splits = listops.generate_splits({"held_out": 100, "train": 300}, seed=1, max_tokens=12)
    assert {name: len(set(expressions)) for name, expressions in splits.items()} == {"held_out": 100, "train": 300}
    assert not set(splits["held_out"]) & set(splits["train"])
    smaller = listops.generate_splits({"held_out": 100, "train": 10}, seed=1, max_tokens=12)
    assert smaller == {"held_out": splits["held_out"], "train": splits["train"][:10]}


def test_impossible_length_bounds_are_an_error():
    with pytest.raises(ValueError, match="max_tokens of at least 4"):
        listops.generate(1, seed=0, min_tokens=1, max_tokens=3)
    with pytest.raises(ValueError, match="between 9 and 8"):
        listops.generate(1, seed=0, min_tokens=9, max_tokens=8)


def test_asking_for_more_expressions_than_exist_is_an_error():
    with pytest.raises(ValueError, match="Found only 400 of 401 distinct expressions"):
        listops.generate(401, seed=0, max_tokens=4)


def test_example_is_prompt_and_completion_with_the_answer_in_tags():
    example = listops.example("[MIN 2 9 [MAX 4 7 ] 0 ]")
    assert example == {
        "prompt": "Evaluate the value of the following nested list expression.\n"
        "Return only the final numeric result inside <answer>...</answer>.\n\n"
        "Expression:\n[MIN 2 9 [MAX 4 7 ] 0 ]\n",
        "completion": "<answer>0</answer>",
    }
    assert listops.strict(example["completion"]) == "0"


def test_shortcuts_do_not_evaluate_the_nesting():
    expression = "[MIN 2 9 [MAX 1 7 ] 5 ]"
    assert listops.evaluate(expression) == 2
    assert listops.largest_digit(expression) == 9
    assert listops.root_operator_over_all_digits(expression) == 1
