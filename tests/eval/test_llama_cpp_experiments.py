"""The comparison of exported adapters with llama.cpp: how it judges, and that its tables are what was measured."""

import json

import numpy as np
import pytest
from checkout import CHECKOUT

from trl_steer.eval.experiments import llama_cpp_rounding, llama_cpp_table
from trl_steer.eval.experiments.llama_cpp_export import BOUND, compare, greedy_agreement

RESULTS = CHECKOUT / "eval" / "results"


def test_equal_logits_do_not_differ_and_a_constant_does_not_matter():
    logits = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    assert compare(logits, logits + 3, [0, 1, 2, 3]) == pytest.approx(
        {"tokens": 0, "vocabulary": 0, "kl": 0}, abs=1e-6
    )


def test_differences_are_the_largest_ones_and_kl_is_the_mean():
    ours = np.log(np.array([[0.5, 0.25, 0.25]] * 2, dtype=np.float32))
    theirs = np.log(np.array([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]], dtype=np.float32))
    found = compare(ours, theirs, [2, 1])
    assert found["tokens"] == pytest.approx(0, abs=1e-6)  # of the second token, after the first
    assert found["vocabulary"] == pytest.approx(np.log(2))
    assert found["kl"] == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)


@pytest.mark.parametrize(("gap", "outcome"), [(BOUND, "near tie"), (3 * BOUND, "different")])
def test_a_different_greedy_answer_counts_as_equal_only_where_candidates_are_tied(gap, outcome):
    def logits(ids):
        assert ids == [7, 1]  # the prompt and what is equal
        return np.array([[0.0, 1.0, 1.0 + gap]])

    assert greedy_agreement([1, 2, 0], [1, 1, 1], logits, [7]) == outcome
    assert greedy_agreement([1, 2], [1, 2], logits, [7]) == "equal"


@pytest.mark.parametrize(
    ("name", "to_markdown"),
    [("llama_cpp", llama_cpp_table.to_markdown), ("llama_cpp_rounding", llama_cpp_rounding.to_markdown)],
)
def test_recorded_tables_are_what_was_measured(name, to_markdown):
    document = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == to_markdown(document)


def test_recorded_log_probabilities_are_within_the_bound():
    document = json.loads((RESULTS / "llama_cpp.json").read_text(encoding="utf-8"))
    for result in document["adapters"].values():
        assert result["float32"]["vocabulary"] <= BOUND
        assert result["greedy"]["different"] == 0
        assert result["quantized"]["kl"] <= 1.1 * document["base"]["quantized"]["kl"]
