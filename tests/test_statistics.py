"""Intervals and tests against the textbook's formulas, written out here."""

import gc
import itertools
import math
import statistics

import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from trl_steer.statistics import (
    binomial_standard_error,
    exact_mcnemar,
    exact_sign_flip,
    holm,
    paired_bootstrap,
    t_interval,
    wilson_interval,
)


def answers(wins=0, losses=0, both=0, neither=0):
    """The two sides' answers with this many pairs of each kind."""
    pairs = [(True, False)] * wins + [(False, True)] * losses + [(True, True)] * both + [(False, False)] * neither
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (1, 3), (50, 200), (10, 10)])
@pytest.mark.parametrize("level", [0.95, 0.9])
def test_wilsons_interval_is_where_the_score_test_changes_its_mind(hits, total, level):
    share, z = hits / total, statistics.NormalDist().inv_cdf((1 + level) / 2)
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    assert wilson_interval(hits, total, level) == pytest.approx((center - half, center + half), abs=1e-12)


def test_standard_error_of_a_share():
    assert binomial_standard_error(50, 200) == math.sqrt(0.25 * 0.75 / 200)
    assert binomial_standard_error(0, 5) == 0.0


@pytest.mark.parametrize("function", [wilson_interval, binomial_standard_error])
@pytest.mark.parametrize(("hits", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_a_share_of_nothing_is_an_error(function, hits, total):
    with pytest.raises(ValueError, match=f"got {hits} of {total}"):
        function(hits, total)


def test_mcnemars_test_counts_the_pairs_that_differ():
    # 10 of 12 or more, if each is a fair coin: (66 + 12 + 1) / 2**12
    ours, theirs = answers(wins=10, losses=2, both=5, neither=3)
    assert exact_mcnemar(ours, theirs) == pytest.approx(79 / 4096)
    assert exact_mcnemar(ours, theirs, alternative="two-sided") == pytest.approx(2 * 79 / 4096)
    assert exact_mcnemar(theirs, ours, alternative="two-sided") == pytest.approx(2 * 79 / 4096)
    # 2 or more: all but none and one
    assert exact_mcnemar(theirs, ours) == pytest.approx(1 - 13 / 4096)


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_mcnemars_test_finds_nothing_where_nothing_differs(alternative):
    assert exact_mcnemar(*answers(both=3, neither=2), alternative=alternative) == 1.0


def test_no_p_value_is_above_one():
    assert exact_mcnemar(*answers(wins=2, losses=2), alternative="two-sided") == 1.0


def test_the_bootstrap_of_a_share_follows_the_binomial_distribution():
    wins, total = 30, 100

    def quantile(level):
        below = 0.0
        for count in range(total + 1):
            below += math.comb(total, count) * 0.3**count * 0.7 ** (total - count)
            if below >= level:
                return count / total
        raise AssertionError

    mean, (low, high) = paired_bootstrap(*answers(wins=wins, both=total - wins))
    assert mean == pytest.approx(0.3)
    assert low == pytest.approx(quantile(0.025), abs=0.011)
    assert high == pytest.approx(quantile(0.975), abs=0.011)
    _, narrower = paired_bootstrap(*answers(wins=wins, both=total - wins), level=0.5)
    assert low < narrower[0] < mean < narrower[1] < high


def test_the_bootstrap_repeats_itself_and_finds_nothing_where_nothing_differs():
    ours, theirs = answers(wins=9, losses=3, both=20)
    assert paired_bootstrap(ours, theirs) == paired_bootstrap(ours, theirs)
    assert paired_bootstrap(ours, ours) == (0.0, (0.0, 0.0))


def test_the_bootstrap_of_many_examples_is_scipys_though_it_is_computed_in_parts():
    ours, theirs = answers(wins=400, losses=300, both=300)
    expected = scipy.stats.bootstrap(
        (np.subtract(ours, theirs, dtype=float),), np.mean, n_resamples=10_000, method="percentile", rng=0
    )
    assert paired_bootstrap(ours, theirs)[1] == tuple(expected.confidence_interval)


def test_a_bootstrap_of_one_example_is_an_error():
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        paired_bootstrap([True], [False])


@pytest.mark.parametrize("function", [exact_mcnemar, paired_bootstrap])
def test_sides_of_different_length_are_an_error(function):
    with pytest.raises(ValueError, match="got 3 and 2 answers"):
        function([True, True, False], [True, False])


def test_students_interval_of_two_and_three_values():
    # The quantiles of one and two degrees of freedom have closed forms.
    quantiles = {2: math.tan(math.pi * 0.475), 3: 0.95 * math.sqrt(2 / (1 - 0.95**2))}
    for values in ([0.5, 0.75], [0.5, 0.625, 0.75]):
        mean, count = statistics.fmean(values), len(values)
        half = quantiles[count] * statistics.stdev(values) / math.sqrt(count)
        assert t_interval(values) == pytest.approx((mean - half, mean + half))


def test_students_interval_of_one_value_is_infinite_and_of_none_an_error():
    assert t_interval([0.5]) == (-math.inf, math.inf)
    assert t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="at least one value"):
        t_interval([])


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
@settings(deadline=None)
def test_sign_flips_are_those_of_all_combinations_of_signs(differences):
    flipped = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    at_least = sum(value >= abs(sum(differences)) for value in flipped) / len(flipped)
    assert exact_sign_flip(differences) == pytest.approx(at_least, abs=1e-12)


def test_sign_flips_agree_with_scipy():
    differences = [3, -1, 2, 2, 0, 5, -2, 1, 4, 3, -1, 2]
    expected = scipy.stats.permutation_test(
        (np.array(differences),), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert exact_sign_flip(differences) == pytest.approx(expected.pvalue, abs=1e-12)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
@settings(deadline=None)
def test_sign_flips_of_single_answers_are_mcnemars_test(wins, losses, both):
    ours, theirs = answers(wins=wins, losses=losses, both=both)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    expected = exact_mcnemar(ours, theirs, alternative="two-sided")
    assert exact_sign_flip(differences) == pytest.approx(expected, abs=1e-12)


def test_sign_flips_of_a_large_test_set_are_fast_and_keep_small_p_values():
    assert exact_sign_flip([5] * 400) == pytest.approx(2 * 0.5**400, rel=1e-9)
    assert exact_sign_flip([1, -1] * 2000 + [3, -3] * 500) == 1.0
    assert exact_sign_flip([]) == 1.0


@pytest.fixture
def frozen():
    """statsmodels collects garbage in each call, which takes long with many modules loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_holms_correction_agrees_with_statsmodels(frozen, p_values):
    assert holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]), abs=1e-12)


def test_holms_correction_by_hand():
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, which stays at the 0.06 before it, and 0.5 * 1.
    assert holm([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_holms_correction_of_something_else_than_p_values_is_an_error(value):
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, value])
