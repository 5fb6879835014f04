"""Confidence intervals and statistical tests.

scipy is imported inside the functions, because it is only installed with the extras for evaluation.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Literal

Interval = tuple[float, float]


def binomial_standard_error(hits: int, total: int) -> float:
    """Standard error of the proportion `p = hits / total`, `sqrt(p (1 - p) / total)`.

    Raises:
        ValueError: `total` is not positive, or `hits` is not between 0 and `total`.
    """
    _check_counts(hits, total)
    share = hits / total
    return (share * (1 - share) / total) ** 0.5


def wilson_interval(hits: int, total: int, level: float = 0.95) -> Interval:
    """Wilson score interval for the proportion `hits / total`, without continuity correction.

    Raises:
        ValueError: `total` is not positive, or `hits` is not between 0 and `total`.
    """
    from scipy.stats import binomtest

    _check_counts(hits, total)
    interval = binomtest(hits, total).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def exact_mcnemar(
    ours: Sequence[bool], theirs: Sequence[bool], *, alternative: Literal["greater", "two-sided"] = "greater"
) -> float:
    """p-value of the exact McNemar test on two sets of answers to the same examples.

    Only examples that exactly one of them answers correctly count. Under the null hypothesis, it is either one with
    probability 1/2.

    Args:
        ours (`Sequence[bool]`), theirs (`Sequence[bool]`): Whether each example was answered correctly.
        alternative (`str`, defaults to `"greater"`): `"greater"`, that `ours` is better, or `"two-sided"`.

    Raises:
        ValueError: The lengths are different.
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
    """Mean of `ours - theirs` over the same examples, and its percentile bootstrap interval.

    Args:
        ours (`Sequence[float]`), theirs (`Sequence[float]`): The score of each example, for example 0 or 1.
        level (`float`, defaults to 0.95): Confidence level.
        samples (`int`, defaults to 10000): Number of resamples.
        seed (`int`, defaults to 0): Random seed.

    Raises:
        ValueError: The lengths are different, or there are fewer than two examples.
    """
    import numpy as np
    from scipy.stats import bootstrap

    _check_paired(ours, theirs)
    if len(ours) < 2:
        raise ValueError(f"A bootstrap needs at least two examples, got {len(ours)}.")
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    mean = float(differences.mean())
    if not differences.any():
        return mean, (0.0, 0.0)
    found = bootstrap(
        (differences,),
        np.mean,
        n_resamples=samples,
        batch=max(1, 4_000_000 // len(differences)),  # memory for 4 million values, with the same result
        confidence_level=level,
        method="percentile",
        rng=seed,
    )
    low, high = found.confidence_interval
    return mean, (float(low), float(high))


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval for the mean of `values`. Infinite for a single value.

    Raises:
        ValueError: There are no values.
    """
    from scipy import stats

    if not values:
        raise ValueError("An interval needs at least one value, got none.")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return float("-inf"), float("inf")
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
    return mean - half, mean + half


def exact_sign_flip(differences: Sequence[int]) -> float:
    """Two-sided p-value of the exact sign-flip test (Fisher's randomization test) on paired differences.

    Under the null hypothesis, the two sides of a pair can be exchanged: each difference has its sign with probability
    1/2. The p-value is the probability that the absolute value of the sum is at least the observed one. If all
    differences are -1, 0 or 1, this is the exact McNemar test; with several seeds, a difference is the number of seeds
    in which only one side answers the example correctly, minus that of the other side.

    Args:
        differences (`Sequence[int]`): The difference of each pair.
    """
    import numpy as np

    sizes = Counter(abs(value) for value in differences if value)
    # The probability of each sum from -total to total. Only every second one is possible, or fewer.
    probabilities = np.ones(1)
    for size, count in sorted(sizes.items()):
        of_size = np.zeros(2 * size * count + 1)
        of_size[:: 2 * size] = _fair_coins(count)
        probabilities = np.convolve(probabilities, of_size)
    total = sum(size * count for size, count in sizes.items())
    observed = abs(sum(differences))
    if not observed:
        return 1.0
    return min(1.0, 2 * float(probabilities[total + observed :].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family of tests after Holm's correction (1979), in the same order.

    The probability of at least one false rejection is at most the level, however the tests depend on each other. The
    smallest of `n` p-values is multiplied by `n`, the next one by `n - 1`, and so on. None becomes smaller than the
    one before it, or larger than 1.

    Raises:
        ValueError: A p-value is not between 0 and 1.
    """
    if not all(0 <= value <= 1 for value in p_values):
        raise ValueError(f"Expected p-values between 0 and 1, got {list(p_values)}.")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _fair_coins(count: int) -> list[float]:
    """The probabilities of 0 to `count` heads, rounded only once, so that simple fractions are exact."""
    found, ways = [], 1
    for heads in range(count + 1):
        found.append(ways / 2**count)
        ways = ways * (count - heads) // (heads + 1)
    return found


def _check_counts(hits: int, total: int) -> None:
    if total < 1 or not 0 <= hits <= total:
        raise ValueError(f"Expected 0 <= hits <= total and a positive total, got {hits} of {total}.")


def _check_paired(ours: Sequence, theirs: Sequence) -> None:
    if len(ours) != len(theirs):
        raise ValueError(
            f"A paired comparison needs answers to the same examples, got {len(ours)} and {len(theirs)} answers."
        )
