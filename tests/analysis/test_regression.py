"""Regression from streamed moments gives what a regression on all tokens gives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_steer.analysis.moments import Moments
from trl_steer.analysis.regression import (
    choose,
    constant_error,
    errors_by_rank,
    explained_share,
    fit,
    held_out_errors,
    map_error,
)


def data(tokens: int, p: int, q: int, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The same affine map plus noise for every seed."""
    random = np.random.default_rng([p, q])
    matrix, random = random.normal(size=(p, q)), np.random.default_rng(seed)
    x = random.normal(size=(tokens, p)) * random.uniform(0.1, 3, size=p)
    return x, x @ matrix + noise * random.normal(size=(tokens, q)) + 1


def moments_of(x: np.ndarray, y: np.ndarray, sizes=(1000,)) -> Moments:
    found, start = Moments(x.shape[1], y.shape[1]), 0
    for size in (*sizes, len(x)):
        found.add(torch.tensor(x[start : start + size]), torch.tensor(y[start : start + size]))
        start += size
    return found


def direct(x: np.ndarray, y: np.ndarray, rank: int, penalty: float) -> np.ndarray:
    """The map (q, p) by singular value decomposition of the fitted values, of data with rows for the penalty."""
    x = np.vstack([x, np.sqrt(penalty) * np.eye(x.shape[1])])
    y = np.vstack([y, np.zeros((x.shape[1], y.shape[1]))])
    full = np.linalg.lstsq(x, y, rcond=None)[0]
    right = np.linalg.svd(x @ full, full_matrices=False)[2][:rank]
    return (full @ right.T @ right).T


@given(st.integers(1, 6), st.integers(1, 7), st.integers(20, 60), st.sampled_from([1e-8, 1e-3, 0.5]), st.data())
@settings(max_examples=25, deadline=None)
def test_every_rank_is_the_direct_solution(p, q, tokens, ridge, drawn):
    x, y = data(tokens, p, q)
    sizes = drawn.draw(st.lists(st.integers(1, 20), max_size=4))
    moments, other = moments_of(x, y, sizes), data(15, p, q, seed=1)
    factors = fit(moments, ridge)
    errors = errors_by_rank(factors, moments_of(*other))
    penalty = ridge * np.square(x).sum() / p
    for rank in range(1, min(p, q) + 1):
        wanted = direct(x, y, rank, penalty)
        found = (factors.up[:, :rank] @ factors.down[:rank]).numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-8 * max(1, np.abs(wanted).max()))
        error = np.square(other[1] - other[0] @ wanted.T).sum()
        np.testing.assert_allclose(errors[rank].item(), error, rtol=1e-8)
        balanced = factors.of_rank(rank)
        np.testing.assert_allclose(
            (balanced.up @ balanced.down).numpy(), found, atol=1e-8 * max(1, np.abs(found).max())
        )
        np.testing.assert_allclose(map_error(balanced, moments_of(*other)).item(), error, rtol=1e-8)


def test_weights_count_tokens_several_times():
    x, y = data(30, 4, 3)
    weights = np.arange(30) % 4
    weighted, repeated = Moments(4, 3), moments_of(np.repeat(x, weights, 0), np.repeat(y, weights, 0))
    weighted.add(torch.tensor(x), torch.tensor(y), torch.tensor(weights))
    for name in ("xx", "xy", "y", "yy", "mean"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name))
    assert weighted.weight == repeated.count == repeated.weight
    errors = [constant_error(torch.ones(3).double(), moments).item() for moments in (weighted, repeated)]
    assert errors[0] == pytest.approx(errors[1])


def test_factors_are_balanced():
    x, y = data(50, 5, 4)
    down, up = fit(moments_of(x, y), 1e-6).of_rank(3)
    torch.testing.assert_close(down @ down.T, up.T @ up)
    torch.testing.assert_close(torch.diag((up.T @ up).diagonal()), up.T @ up, atol=1e-9, rtol=0)


def test_a_constant_is_the_mean():
    x, y = data(30, 3, 4)
    other = data(20, 3, 4, seed=1)[1]
    mean = moments_of(x, y).mean
    np.testing.assert_allclose(mean.numpy(), y.mean(0))
    error = constant_error(mean, moments_of(np.zeros((20, 3)), other))
    np.testing.assert_allclose(error.item(), np.square(other - y.mean(0)).sum())


def test_the_share_is_that_of_the_squared_norm():
    x, y = data(30, 3, 4)
    moments = moments_of(x, y)
    assert explained_share(moments.yy, moments).item() == 0
    assert explained_share(torch.zeros((), dtype=torch.float64), moments).item() == 1
    nothing = moments_of(x, np.zeros_like(y))
    assert explained_share(nothing.yy, nothing).item() == 0


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_rank_of_a_map_is_found(rank):
    random = np.random.default_rng(rank)
    matrix = random.normal(size=(6, rank)) @ random.normal(size=(rank, 6))
    parts = [moments_of(x, x @ matrix.T) for x in (random.normal(size=(n, 6)) for n in (60, 20))]
    found = choose(*parts, max_rank=6, choose_rank=True)
    assert found.rank == rank
    np.testing.assert_allclose((found.factors.up @ found.factors.down).numpy(), matrix, atol=1e-6)


def test_a_tolerance_gives_a_smaller_rank():
    parts = (moments_of(*data(tokens, 6, 6, seed=tokens, noise=0.1)) for tokens in (200, 60))
    parts = tuple(parts)
    ranks = [choose(*parts, max_rank=6, choose_rank=True, tolerance=t).rank for t in (0.0, 0.05, 0.5)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] < ranks[0]


def test_the_penalty_is_that_with_the_smallest_error_on_other_tokens():
    x, y = data(12, 8, 6, noise=5)
    parts = moments_of(x, y), moments_of(*data(400, 8, 6, seed=3, noise=5))
    ridges = (1e-8, 1e-2, 1.0, 100.0)
    errors = {ridge: errors_by_rank(fit(parts[0], ridge, 4), parts[1])[-1].item() for ridge in ridges}
    assert choose(*parts, max_rank=4, ridges=ridges).ridge == min(errors, key=errors.get)
    by_rank = held_out_errors(parts[0], parts[1], parts[1], ridges=ridges)
    assert by_rank[4].item() == pytest.approx(min(errors.values()), rel=1e-12)
    assert by_rank[0] == parts[1].yy


def test_too_few_tokens_are_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="no tokens"):
        fit(Moments(3, 3), 1e-3)
    x, y = data(2, 6, 6)
    with pytest.raises(ValueError, match=r"2 tokens do not determine .* Use more text"):
        choose(moments_of(x, y), moments_of(x, y), 2, ridges=(0.0,))
