"""The simplified model of Proposition 4.2."""

import importlib

import pytest

from trl_steer.analysis import proposition_4_2


def test_two_updates_learn_the_same_directions_first_unless_constrained_or_their_inputs_differ(monkeypatch):
    # The package has a function of the same name as the module.
    monkeypatch.setattr(importlib.import_module("trl_steer.analysis.proposition_4_2"), "STEPS", 10)
    rows = {(row["teacher"], row["training"]): row for row in proposition_4_2(range(2))}
    assert {row["step"] for row in rows.values()} == {10}
    assert rows["coinciding", "naive"]["largest_cosine"][0] > 0.98
    assert rows["coinciding", "constrained"]["largest_cosine"][0] == pytest.approx(0, abs=1e-5)
    assert rows["coinciding", "naive"]["shift_cosine"][0] > 0.5 > rows["control", "naive"]["shift_cosine"][0]
