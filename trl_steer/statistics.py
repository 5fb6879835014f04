"""What the numbers of an evaluation are worth: intervals and tests, each in one place.

scipy is imported in the functions: it comes with the extras that evaluate, and the library does without.
"""

import statistics
from collections.abc import Sequence
from typing import Literal

Interval = tuple[float, float]


def binomial_standard_error(hits: int, total: int) -> float:
    """Standard error of the share `hits / total`.

    Raises:
        ValueError: if `total` is not positive, or `hits` not between 0 and `total`.
    """
    _check_counts(hits, total)
    share = hits / total
    return (share * (1 - share) / total) ** 0.5


def wilson_interval(hits: int, total: int, level: float = 0.95) -> Interval:
    """Wilson's interval for the share `hits / total`, without continuity correction.

    Raises:
        ValueError: if `total` is not positive, or `hits` not between 0 and `total`.
    """
    from scipy.stats import binomtest

    _check_counts(hits, total)
    interval = binomtest(hits, total).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def exact_mcnemar(
    ours: Sequence[bool], theirs: Sequence[bool], *, alternative: Literal["greater", "two-sided"] = "greater"
) -> float:
    """p-value of the exact McNemar test on answers to the same examples, right or wrong.

    Only pairs that differ count. If both sides were as good, each such pair would be a fair coin.

    Args:
        ours (`Sequence[bool]`), theirs (`Sequence[bool]`): Whether each example was answered correctly.
        alternative (`str`, defaults to `"greater"`): `"greater"`: how likely is it that `ours` is so much better, or
            more. `"two-sided"`: that either is.

    Raises:
        ValueError: if the two sides differ in length.
    """
    from scipy.stats import binomtest

    _check_paired(ours, theirs)
    wins = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    losses = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    if not wins + losses:
        return 1.0
    if alternative == "greater":
        return float(binomtest(wins, wins + losses, alternative="greater").pvalue)
    rarer = binomtest(max(wins, losses), wins + losses, alternative="greater").pvalue
    return min(1.0, 2 * float(rarer))


def paired_bootstrap(
    ours: Sequence[float], theirs: Sequence[float], *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, Interval]:
    """Mean of `ours - theirs` over the same examples, and its percentile interval over resampled examples.

    Args:
        ours (`Sequence[float]`), theirs (`Sequence[float]`): A score for each example; right or wrong is one.
        samples (`int`, defaults to 10000): Number of resamples.
        seed (`int`, defaults to 0): Of the random numbers that choose them.

    Raises:
        ValueError: if the two sides differ in length, or there are fewer than two examples.
    """
    import numpy as np
    from scipy.stats import bootstrap

    _check_paired(ours, theirs)
    if len(ours) < 2:
        raise ValueError(f"A bootstrap resamples two examples or more, got {len(ours)}.")
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    mean = float(differences.mean())
    if not differences.any():
        return mean, (0.0, 0.0)
    found = bootstrap(
        (differences,), np.mean, n_resamples=samples, confidence_level=level, method="percentile", rng=seed
    )
    low, high = found.confidence_interval
    return mean, (float(low), float(high))


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval for the mean of `values`, one for each seed. A single value says nothing: it is infinite.

    Raises:
        ValueError: if there is no value.
    """
    from scipy import stats

    if not values:
        raise ValueError("An interval needs at least one value, got none.")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return float("-inf"), float("inf")
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
    return mean - half, mean + half


def _check_counts(hits: int, total: int) -> None:
    if total < 1 or not 0 <= hits <= total:
        raise ValueError(f"A share needs 0 <= hits <= total and a positive total, got {hits} of {total}.")


def _check_paired(ours: Sequence, theirs: Sequence) -> None:
    if len(ours) != len(theirs):
        raise ValueError(
            f"A paired comparison needs both sides on the same examples, got {len(ours)} and {len(theirs)} answers."
        )
