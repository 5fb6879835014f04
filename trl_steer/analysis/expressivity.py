"""How well steering of a block's output can replace steering of its MLP (arXiv 2603.00425, Theorem 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ..tuners.steering.layer import SteeringLayer
from .states import Block, blocks_of, record


def theorem_3_1(
    model: Any, batches: Iterable[Mapping[str, torch.Tensor]], blocks: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """
    The error of the best linear steering of the block's output in place of one of the MLP's output, and its bound.

    With `F` and `H` (d, tokens) the outputs of the MLP and of the block in the base model, `R` (d, d) a linear map of
    the MLP's output, and `P` the projection onto the row space of `H`, the best map `S` of the block's output has
    the relative error

        ||R F - S H|| / ||R F|| = ||R F (I - P)|| / ||R F||,

    with Frobenius norms. With `s_i` the singular values of `R F`, and `t_i` the principal angles between the row
    spaces of `F` and `H`, both in descending order, its square is at most

        sum_i s_i^2 sin^2(t_i) / sum_i s_i^2.

    Computed from the (d, d) products `F F^T`, `F H^T` and `H H^T`, which are summed up in float64.

    Args:
        model (`nn.Module`):
            A causal language model. `R` is the linear part of its active low-rank steering at `post_mlp` if it has
            any, else the identity.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): See [`text_batches`]. More tokens than `d`.
        blocks (`Sequence[int]`, *optional*): Indices of the blocks. Default: all.

    Returns:
        `list[dict]`: For each block `block`; `error`, the relative error; `bound`, the square root of the bound; and
        `angles`, the principal angles in degrees, in ascending order.

    Raises:
        ValueError: There are not more tokens than `d`, so that the error would be zero; or steering at `post_mlp` is
            not linear.
    """
    chosen = blocks_of(model, blocks)
    products: dict[int, list[Any]] = {block.index: [0.0] * 3 for block in chosen}
    tokens = 0
    for batch in batches:
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            states = record(model, batch, ["post_mlp", "post_block"], [block.index for block in chosen])
        tokens += sum(states.lengths)
        for index, sums in products.items():
            F, H = states[index, "post_mlp"], states[index, "post_block"]
            for which, (left, right) in enumerate(((F, F), (F, H), (H, H))):
                sums[which] = sums[which] + left.mT @ right
    width = chosen[0].anatomy.hidden_size
    if tokens <= width:
        raise ValueError(
            f"There are {tokens} tokens of prompts, expected more than the hidden size {width}: the states of fewer "
            "tokens are linearly independent, so that the error is zero."
        )
    return [{"block": block.index, **_errors(block, *products[block.index])} for block in chosen]


def _errors(block: Block, FF: torch.Tensor, FH: torch.Tensor, HH: torch.Tensor) -> dict[str, Any]:
    R = _linear_map(block, FF)
    whiten_F, whiten_H = _whitening(FF), _whitening(HH)
    cosines = torch.linalg.svdvals(whiten_F.mT @ FH @ whiten_H).clamp(max=1)
    missing = FF.new_zeros(whiten_F.shape[1] - len(cosines))
    sine_squares = 1 - torch.cat([cosines, missing]).square()  # ascending
    spectrum = torch.linalg.eigvalsh(R @ FF @ R.mT).flip(0).clamp(min=0)[: len(sine_squares)]
    total = (R @ FF @ R.mT).trace()
    captured = (R @ FH @ whiten_H).square().sum()
    return {
        "error": ((total - captured).clamp(min=0) / total).sqrt().item(),
        "bound": ((spectrum * sine_squares.flip(0)).sum() / total).sqrt().item(),
        "angles": sine_squares.clamp(min=0).sqrt().asin().rad2deg().tolist(),
    }


def _whitening(gram: torch.Tensor) -> torch.Tensor:
    """`W` with `W^T gram W = I`, on the range of the Gram matrix up to rounding."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].rsqrt()


def _linear_map(block: Block, like: torch.Tensor) -> torch.Tensor:
    R, found = torch.zeros_like(like), False
    for layer in block.module.children():
        for name in layer.active_adapters if isinstance(layer, SteeringLayer) else ():
            adapter: Any = layer.adapters._modules.get(name)
            if adapter is not None and adapter.site == "post_mlp" and not adapter.is_offset:
                update = adapter.merge(block.site("post_mlp"), layer.effective_scaling(name, adapter))
                R += update.left.to(R) @ update.right.to(R)
                found = True
    return R if found else torch.eye(len(like), dtype=like.dtype, device=like.device)
