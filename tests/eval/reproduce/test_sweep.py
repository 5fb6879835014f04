"""Sweeps over learning rates: the recommendation on curves with a known optimum and a known cliff."""

import math

import optuna
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trl_steer.eval.reproduce.find_lr import sentence
from trl_steer.eval.reproduce.sweep import STORAGE, next_rate, recommend, sweep

START = 2e-3


class Toy:
    """Scores rise up to an optimum and fall from it, and training diverges beyond the cliff."""

    def __init__(self, optimum, cliff, width=1.0):
        self.optimum, self.cliff, self.width, self.tried = optimum, cliff, width, []

    def score(self, rate):
        return math.exp(-((math.log(rate / self.optimum) / self.width) ** 2))

    def __call__(self, trial, rate):
        self.tried.append(rate)
        for step in range(1, 9):
            if rate > self.cliff and step > 4:
                raise optuna.TrialPruned
            trial.report(-(2 - self.score(rate) * step / 8), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return self.score(rate)


@pytest.mark.parametrize(
    ("optimum", "cliff"),
    [(2e-3, 2.2e-3), (2e-3, 2e-2), (3e-3, 3e-3), (5e-4, 6e-4), (3e-5, 1e-3), (5e-2, 6e-2), (1.5e-3, 1.9e-3)],
)
def test_the_recommended_rate_is_near_the_optimum_and_not_beyond_the_cliff(optimum, cliff, tmp_path):
    toy = Toy(optimum, cliff)
    scores = sweep(toy, tmp_path, "toy", START, lambda rate: None)
    found = recommend(scores)
    assert optimum / 2 <= found.rate <= min(2 * optimum, cliff)
    assert found.low <= found.rate <= found.high <= cliff
    assert sorted(toy.tried) == list(scores)
    assert len(toy.tried) == len({*toy.tried})


@settings(max_examples=200, deadline=None)
@given(
    optimum=st.floats(math.log(START / 80), math.log(START * 80)).map(math.exp),
    margin=st.floats(1.0, 100.0),
    width=st.floats(0.5, 4.0),
)
@example(optimum=START, margin=1.0, width=0.5)
def test_without_pruning_the_same_holds_for_any_optimum_and_cliff(optimum, margin, width):
    toy = Toy(optimum, optimum * margin, width)
    done = {}
    while (rate := next_rate(done, START)) is not None:
        assert rate not in done
        done[rate] = toy.score(rate) if rate <= toy.cliff else None
    found = recommend(done)
    assert optimum / 2 <= found.rate <= min(2 * optimum, toy.cliff)
    assert found.high <= toy.cliff


def test_hopeless_rates_are_stopped_early(tmp_path):
    scores = sweep(Toy(START, 1.0, width=0.7), tmp_path, "toy", START, lambda rate: None)
    assert scores[2e-4] is None
    assert scores[2e-2] is None
    assert None not in (scores[1.12e-3], scores[2e-3], scores[3.56e-3])


def test_a_sweep_that_was_stopped_goes_on_where_it_was(tmp_path):
    toy = Toy(START, 1.0)
    whole = sweep(toy, tmp_path, "undisturbed", START, lambda rate: None)

    def stop(trial, rate):
        if len(first.tried) == 4:
            raise KeyboardInterrupt
        return first(trial, rate)

    first, second = Toy(START, 1.0), Toy(START, 1.0)
    with pytest.raises(KeyboardInterrupt):
        sweep(stop, tmp_path, "toy", START, lambda rate: None)
    assert sweep(second, tmp_path, "toy", START, lambda rate: None) == whole
    assert first.tried + second.tried == toy.tried
    assert sweep(None, tmp_path, "toy", START, lambda rate: None) == whole


def test_a_damaged_database_is_said_to_be_one(tmp_path):
    (tmp_path / STORAGE).write_text("junk")
    with pytest.raises(OSError, match=r"sweep\.db is not the database of a sweep: .*Choose another folder"):
        sweep(Toy(START, 1.0), tmp_path, "toy", START, lambda rate: None)


def test_the_plateau_is_what_scores_as_well_up_to_the_noise():
    scores = {1e-4: 0.48, 2e-4: 0.40, 5e-4: 0.47, 1e-3: 0.50, 2e-3: 0.48, 5e-3: None, 1e-2: 0.49}
    assert recommend(scores, 0.035) == (1e-3, 0.50, 5e-4, 2e-3)
    assert recommend(scores) == (1e-3, 0.50, 1e-3, 1e-3)
    assert recommend({1e-3: 0.5, 2e-3: 0.5, 4e-3: 0.1}) == (1e-3, 0.5, 1e-3, 2e-3)


@pytest.mark.parametrize("scores", [{1e-3: 0.0, 2e-3: 0.0}, {1e-3: None, 2e-3: None}])
def test_scores_that_tell_nothing_give_no_recommendation(scores):
    with pytest.raises(ValueError, match=r"^None of the learning rates from 0\.001 to 0\.002 scores better"):
        recommend(scores)


def test_the_recommendation_in_words():
    scores = {5e-4: 0.47, 1e-3: 0.50, 2e-3: 0.48}
    assert sentence(recommend(scores), scores) == (
        "Recommended learning rate: 0.001 (accuracy 0.500). Its neighbours are worse."
    )
    assert sentence(recommend(scores, 0.025), scores) == (
        "Recommended learning rate: 0.001 (accuracy 0.500). From 0.001 to 0.002, a factor of 2.0, it is as good. "
        "Higher rates were not tried."
    )
