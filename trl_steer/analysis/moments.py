"""Second moments of hidden states, streamed: all that a linear regression needs to know about its data."""

from __future__ import annotations

import torch


class Moments:
    """
    Weighted sums over tokens of products of regressors `x` (p,) and targets `y` (q,), in float64.

    Tokens are added in batches, and nothing of the size of the number of tokens is kept.

    Args:
        p (`int`): Number of regressors.
        q (`int`): Number of targets.
        device (`torch.device`, *optional*): Where the sums are kept.

    Attributes:
        count (`int`): Number of tokens.
        weight (`torch.Tensor`): Scalar, the sum of the tokens' weights `w`.
        xx (`torch.Tensor`): (p, p), the sum of `w x x^T`.
        xy (`torch.Tensor`): (p, q), the sum of `w x y^T`.
        y (`torch.Tensor`): (q,), the sum of `w y`.
        yy (`torch.Tensor`): Scalar, the sum of `w |y|^2`.
    """

    def __init__(self, p: int, q: int, device: torch.device | str | None = None):
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count, self.weight = 0, zeros()
        self.xx, self.xy, self.y, self.yy = zeros(p, p), zeros(p, q), zeros(q), zeros()

    def add(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Adds tokens.

        Args:
            x (`torch.Tensor`): (tokens, p), any floating point dtype.
            y (`torch.Tensor`): (tokens, q), any floating point dtype.
            weights (`torch.Tensor`, *optional*): (tokens,). Default: 1.
        """
        x, y = x.to(self.xx.device, torch.float64), y.to(self.xx.device, torch.float64)
        weights = torch.ones_like(y[:, 0]) if weights is None else weights.to(y)
        weighted = weights[:, None] * x
        self.count += len(x)
        self.weight += weights.sum()
        self.xx.addmm_(weighted.T, x)
        self.xy.addmm_(weighted.T, y)
        self.y += weights @ y
        self.yy += weights @ y.square().sum(1)

    @property
    def mean(self) -> torch.Tensor:
        """(q,), the weighted mean of the targets."""
        return self.y / self.weight


def inverse_square_norms(states: torch.Tensor) -> torch.Tensor:
    """`1 / |h|^2` of hidden states (tokens, d), with which a squared distance is relative to the state. Blocks see
    their input through a norm, and in many models the first token's state is hundreds of times larger than others."""
    return states.double().square().sum(1).clamp_min(torch.finfo(torch.float64).tiny).reciprocal()
