"""Second moments of hidden states, streamed: all that a linear regression needs to know about its data."""

from __future__ import annotations

import torch


class Moments:
    """
    Sums over tokens of products of regressors `x` (p,) and targets `y` (q,), in float64.

    Tokens are added in batches, and nothing of the size of the number of tokens is kept.

    Args:
        p (`int`): Number of regressors.
        q (`int`): Number of targets.
        device (`torch.device`, *optional*): Where the sums are kept.

    Attributes:
        count (`int`): Number of tokens.
        xx (`torch.Tensor`): (p, p), the sum of `x x^T`.
        xy (`torch.Tensor`): (p, q), the sum of `x y^T`.
        y (`torch.Tensor`): (q,), the sum of `y`.
        yy (`torch.Tensor`): Scalar, the sum of `|y|^2`.
    """

    def __init__(self, p: int, q: int, device: torch.device | str | None = None):
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self.xx, self.xy, self.y, self.yy = zeros(p, p), zeros(p, q), zeros(q), zeros()

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds tokens.

        Args:
            x (`torch.Tensor`): (tokens, p), any floating point dtype.
            y (`torch.Tensor`): (tokens, q), any floating point dtype.
        """
        x, y = x.to(self.xx.device, torch.float64), y.to(self.xx.device, torch.float64)
        self.count += len(x)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.y += y.sum(0)
        self.yy += y.square().sum()

    @property
    def mean(self) -> torch.Tensor:
        """(q,), the mean target."""
        return self.y / self.count
