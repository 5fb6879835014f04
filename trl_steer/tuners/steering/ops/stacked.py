"""Updates by different adapters as batched products. Entry `i` of each tensor belongs to the `i`-th adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .dtypes import autocast_enabled, cast, compute_dtype


def stack_factors(
    down: Sequence[torch.Tensor], up: Sequence[torch.Tensor], scalings: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacks the factors of adapters, which may have different ranks and dtypes. Smaller ranks are padded with zeros.

    Args:
        down (`Sequence[torch.Tensor]`): (r_i, d) each.
        up (`Sequence[torch.Tensor]`): (d, r_i) each.
        scalings (`Sequence[float]`): Factor on each update, which is multiplied into `up`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: (adapters, r, d) and (adapters, d, r), where `r` is the largest rank.
    """
    ranks = [matrix.shape[0] for matrix in down]
    rank = max(ranks)
    if min(ranks) < rank:
        down = [F.pad(matrix, (0, 0, 0, rank - r)) for matrix, r in zip(down, ranks, strict=True)]
        up = [F.pad(matrix, (0, rank - r)) for matrix, r in zip(up, ranks, strict=True)]
    return torch.stack([*down]), scaled(torch.stack([*up]), scalings)


def scaled(stack: torch.Tensor, scalings: Sequence[float]) -> torch.Tensor:
    """Multiplies each entry of `stack` (adapters, ...) by its scaling."""
    if all(scaling == 1.0 for scaling in scalings):
        return stack
    factors = torch.tensor(scalings, dtype=stack.dtype, device=stack.device)
    return stack * factors.view(-1, *[1] * (stack.dim() - 1))


def stacked_low_rank_update(
    h: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """`h + activation(h @ down.mT) @ up.mT`, as [`low_rank_update`] for each adapter, in the same dtypes.

    Args:
        h (`torch.Tensor`): (adapters, n, d), floating point.
        down (`torch.Tensor`): (adapters, r, d).
        up (`torch.Tensor`): (adapters, d, r), multiplied by the scalings.
        activation (`Callable`, *optional*): Elementwise function on the bottleneck. `None` is the identity.

    Returns:
        `torch.Tensor`: (adapters, n, d), dtype of `h`.
    """
    dtype = compute_dtype(h, down)
    down, up = cast(down, dtype), cast(up, dtype)
    if not autocast_enabled(h):
        return _update(h, down, up, activation)
    with torch.autocast(h.device.type, enabled=False):
        return _update(h, down, up, activation)


def _update(h, down, up, activation):
    a = torch.bmm(cast(h, down.dtype), down.mT)
    if activation is not None:
        a = activation(a)
    if h.dtype == a.dtype:
        return torch.baddbmm(h, a, up.mT)
    return h + cast(torch.bmm(a, up.mT), h.dtype)
