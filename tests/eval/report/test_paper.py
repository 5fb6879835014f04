"""The paper's numbers, and which of its differences do not follow from its accuracies."""

import pytest

from trl_steer.eval.report import paper

ROWS = [
    (model, method, row)
    for table in (paper.TABLE_1, paper.TABLE_2)
    for model, rows in table.items()
    for method, row in rows.items()
]


def test_tables_have_all_methods_of_all_models():
    assert list(paper.TABLE_1) == list(paper.TABLE_2) == list(paper.MODELS)
    assert all(list(rows) == ["SFT", "LoRA", "ReFT", "Ours"] for rows in paper.TABLE_1.values())
    assert all(list(rows) == ["LoFiT", "JoLA", "Ours (1-vec)", "Ours r=1"] for rows in paper.TABLE_2.values())
    assert all(list(row.scores) == list(paper.TASKS) for *_, row in ROWS)


@pytest.mark.parametrize(("model", "method", "row"), ROWS, ids=[f"{model} {method}" for model, method, _ in ROWS])
def test_printed_averages_are_those_of_the_printed_differences(model, method, row):
    # So no digit of a row was lost on the way here: the six differences and their average fit together in every row.
    assert abs(sum(score.delta for score in row.scores.values()) / 6 - row.average) < 0.0501


def test_differences_that_do_not_follow_from_the_accuracies_are_found():
    found = {
        (number, model, method, task): (score.delta, score.recomputed)
        for number, model, method, task, score in paper.wrong_differences()
    }
    assert found == {
        (1, "Llama-3.2-1B", "LoRA", "aqua"): (-2.9, -2.6),
        (1, "Llama-3.2-1B", "ReFT", "arc_challenge"): (-2.7, -3.3),
        (1, "Llama-3.1-8B", "ReFT", "winogrande"): (-4.5, -4.3),
        (1, "Llama-3.1-8B", "Ours", "gsm8k"): (-0.4, -0.6),
        (1, "Llama-3.1-8B", "Ours", "aqua"): (0.1, -0.1),
        (2, "Llama-3.2-1B", "LoFiT", "arc_challenge"): (-20.0, -14.0),
        (2, "Llama-3.2-1B", "Ours (1-vec)", "arc_challenge"): (-1.7, -2.3),
        (2, "Llama-3.2-1B", "Ours (1-vec)", "aqua"): (-6.3, -5.3),
        (2, "Llama-3.2-1B", "Ours r=1", "arc_challenge"): (-0.9, -1.5),
        (2, "Llama-3.1-8B", "LoFiT", "winogrande"): (-39.1, -37.7),
        (2, "Llama-3.1-8B", "JoLA", "winogrande"): (-37.5, -36.1),
        (2, "Llama-3.1-8B", "Ours (1-vec)", "listops"): (-2.8, -0.8),
        (2, "Llama-3.1-8B", "Ours r=1", "boolq"): (-0.6, -0.3),
    }
    # Rounding explains the only other one.
    others = [
        (model, method, task)
        for model, method, row in ROWS
        for task, score in row.scores.items()
        if score.delta != score.recomputed and not score.wrong
    ]
    assert others == [("Gemma-3-1B", "JoLA", "aqua")]


def test_averages_that_do_not_follow_from_the_accuracies_are_found():
    found = {(model, method): round(row.recomputed(), 1) for model, method, row in ROWS if row.wrong}
    assert found == {
        ("Llama-3.2-1B", "LoFiT"): -6.3,
        ("Llama-3.1-8B", "LoFiT"): -8.9,
        ("Llama-3.1-8B", "JoLA"): -8.7,
        ("Llama-3.1-8B", "Ours (1-vec)"): -1.4,
    }


def test_average_over_some_benchmarks():
    # -0.8 and -2.0
    assert paper.TABLE_1["Llama-3.2-1B"]["Ours"].recomputed(["listops", "boolq"]) == pytest.approx(-1.4)


def test_table_4_repeats_table_1_but_for_one_number():
    found = [
        (model, method, task)
        for model, task in paper.TABLE_4
        for method in paper.TABLE_4_METHODS
        if paper.contradicted(model, method, task)
    ]
    assert found == [("Gemma-3-1B", "LoRA r=8", "winogrande")]


def test_a_method_is_looked_up_in_all_tables():
    assert paper.published("Qwen3-4B", "Ours", "aqua") == (65.0, 0.2, 0.2)
    assert paper.published("Qwen3-4B", "JoLA", "gsm8k") == (38.9, 1.9, 1.9)
    assert paper.published("Qwen3-4B", "Joint-Orth", "gsm8k") == (38.8, 1.8, 1.8)
    assert paper.published("Qwen3-4B", "Joint-Orth", "aqua") is None
    assert paper.published("Llama-3.1-8B", "Joint", "boolq") is None
