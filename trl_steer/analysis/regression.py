r"""Reduced-rank ridge regression from streamed moments, and what it explains of other tokens.

The rank-r map `M` (q, p) with the smallest `sum |y - M x|^2 + penalty |M|_F^2` is the projection of the ridge solution
on the leading eigenvectors `V_r` (q, r) of `S_xy^T (S_xx + penalty I)^-1 S_xy`: `M = V_r (B V_r)^T`, where
`B = (S_xx + penalty I)^-1 S_xy` (p, q). The eigenvectors are nested, so that one decomposition has the solution of
every rank. There is no intercept, since an adapter has none. All sums over tokens have the weights of the moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .moments import Moments

# Penalties to choose from, as factors on the mean square of a regressor. They span the range between hardly any
# penalty and one that is larger than all but a few directions of a residual stream with outlier tokens.
RIDGES = (1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-2, 1.0)
# A smaller rank is chosen if it explains no more than this share less.
RANK_TOLERANCE = 1e-6


class Factors(NamedTuple):
    """
    The solutions of all ranks: that of rank r is `up[:, :r] @ down[:r]`.

    Attributes:
        down (`torch.Tensor`): (k, p).
        up (`torch.Tensor`): (q, k), with orthonormal columns.
    """

    down: torch.Tensor
    up: torch.Tensor

    def of_rank(self, r: int) -> Factors:
        """The solution of rank `r`, with the singular values in equal parts in both factors: `down` (r, p) has
        orthogonal rows, `up` (q, r) has orthogonal columns of the same norms."""
        left, values, right = torch.linalg.svd(self.down[:r], full_matrices=False)
        root = values.sqrt()
        return Factors(root[:, None] * right, self.up[:, :r] @ left * root)


class Choice(NamedTuple):
    """
    A regression with its penalty and its rank.

    Attributes:
        factors ([`Factors`]): The solution of the chosen rank.
        rank (`int`): The rank.
        ridge (`float`): The penalty, as a factor on the mean square of a regressor.
    """

    factors: Factors
    rank: int
    ridge: float


def fit(moments: Moments, ridge: float, max_rank: int | None = None) -> Factors:
    """
    The solutions of all ranks up to `max_rank`.

    Args:
        moments ([`Moments`]): Of the tokens to fit.
        ridge (`float`): The penalty for each token, as a factor on the mean square of a regressor: the penalty is
            `ridge * trace(S_xx) / p`.
        max_rank (`int`, *optional*): The largest rank. Default: that of the full solution, `min(p, q)`.

    Raises:
        ValueError: `S_xx` plus the penalty is not positive definite, or there are no tokens.
    """
    p, q = moments.xy.shape
    if not moments.count:
        raise ValueError("There are no tokens to fit. Pass some text.")
    penalty = ridge * moments.xx.diagonal().mean()
    cholesky, failed = torch.linalg.cholesky_ex(moments.xx + penalty * torch.eye(p).to(moments.xx))
    if failed:
        raise ValueError(
            f"{moments.count} tokens do not determine a map of {p} entries with ridge={ridge:g}. Use more text or a "
            "larger ridge."
        )
    whitened = torch.linalg.solve_triangular(cholesky, moments.xy, upper=False)
    _, vectors = torch.linalg.eigh(whitened.T @ whitened)
    up = vectors.flip(1)[:, : min(p, q) if max_rank is None else min(p, q, max_rank)]
    down = torch.linalg.solve_triangular(cholesky.T, whitened @ up, upper=True).T
    return Factors(down, up)


def errors_by_rank(factors: Factors, moments: Moments) -> torch.Tensor:
    """`sum |y - M x|^2` over other tokens for each rank from 0, where nothing is explained: (k + 1,). `up` must have
    orthonormal columns, as that of [`fit`]."""
    cross = torch.einsum("kp,pq,qk->k", factors.down, moments.xy, factors.up)
    square = torch.einsum("kp,pr,kr->k", factors.down, moments.xx, factors.down)
    errors = moments.yy - torch.cat([cross.new_zeros(1), (2 * cross - square).cumsum(0)])
    return errors.clamp_min(0)  # rounding


def map_error(factors: Factors, moments: Moments) -> torch.Tensor:
    """`sum |y - up @ down @ x|^2` over other tokens, a scalar."""
    down, up = factors
    cross = ((down @ moments.xy) * up.T).sum()
    square = ((down @ moments.xx @ down.T) * (up.T @ up)).sum()
    return (moments.yy - 2 * cross + square).clamp_min(0)


def constant_error(mean: torch.Tensor, moments: Moments) -> torch.Tensor:
    """`sum |y - mean|^2` over other tokens, a scalar."""
    return (moments.yy - 2 * mean @ moments.y + moments.weight * mean.square().sum()).clamp_min(0)


def explained_share(error: torch.Tensor, moments: Moments) -> torch.Tensor:
    """The share of `sum |y|^2` that is explained: `1 - error / sum |y|^2`, at most 1, below 0 for a map that is worse
    than none, and 0 if all targets are zero."""
    return torch.where(moments.yy > 0, 1 - error / moments.yy, torch.zeros_like(error))


def choose(
    moments: Moments,
    validation: Moments,
    max_rank: int,
    choose_rank: bool = False,
    ridges: Sequence[float] = RIDGES,
    tolerance: float = RANK_TOLERANCE,
) -> Choice:
    """
    The regression with the smallest error on other tokens.

    Args:
        moments ([`Moments`]): Of the tokens to fit.
        validation ([`Moments`]): Of other tokens, by whose error the penalty and the rank are chosen.
        max_rank (`int`): The rank, or the largest one if `choose_rank`.
        choose_rank (`bool`, defaults to `False`): Whether to choose the smallest rank whose explained share is within
            `tolerance` of the largest one.
        ridges (`Sequence[float]`): The penalties to choose from, see [`fit`].
        tolerance (`float`): See `choose_rank`.

    Raises:
        ValueError: There are no tokens, or they determine no map with any of the penalties.
    """
    best: tuple[float, Choice] | None = None
    failure = None
    for ridge in sorted(ridges, reverse=True):
        try:
            factors = fit(moments, ridge, max_rank)
        except ValueError as error:
            failure = error
            continue
        errors = errors_by_rank(factors, validation)[1:]
        rank = len(errors)
        if choose_rank:
            rank = int((errors <= errors.min() + tolerance * validation.yy).nonzero()[0]) + 1
        left = float(errors[rank - 1])
        if best is None or left < best[0]:
            best = left, Choice(factors, rank, ridge)
    if best is None:
        raise failure or ValueError("There is no ridge to choose from. Pass at least one.")
    choice = best[1]
    return choice._replace(factors=choice.factors.of_rank(choice.rank))


def held_out_errors(
    moments: Moments, validation: Moments, held_out: Moments, ridges: Sequence[float] = RIDGES
) -> torch.Tensor:
    """
    `sum |y - M x|^2` over held-out tokens for each rank from 0, with the penalty that is best for this rank on the
    validation tokens: (min(p, q) + 1,).

    Raises:
        ValueError: There are no tokens, or they determine no map with any of the penalties.
    """
    found, failure = [], None
    for ridge in ridges:
        try:
            factors = fit(moments, ridge)
        except ValueError as error:
            failure = error
        else:
            found.append([errors_by_rank(factors, other) for other in (validation, held_out)])
    if not found:
        raise failure or ValueError("There is no ridge to choose from. Pass at least one.")
    on_validation, on_held_out = (torch.stack(errors) for errors in zip(*found, strict=True))
    return on_held_out.gather(0, on_validation.argmin(0, keepdim=True))[0]
