"""The benchmark of batched evaluation, on a tiny model."""

import pytest

from trl_steer.eval.benchmarks import evaluation


def test_batched_and_single_answers_are_equal_and_give_one_ratio():
    (result,) = evaluation.run("cpu", repeats=2, quick=True)
    assert result.benchmark == evaluation.NAME
    assert (result.numerator, result.denominator) == (evaluation.SINGLE, evaluation.BATCHED)
    assert result.ratio > 0
    assert "4 prompts, 4 texts equal" in result.case


def test_batching_that_changes_answers_raises(monkeypatch):
    def wrong(lm, requests, **_):
        return ["<answer>1</answer>"] * len(requests)

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.generate_until", wrong)
    with pytest.raises(RuntimeError, match="Batches change the answers"):
        list(evaluation.run("cpu", repeats=2, quick=True))
