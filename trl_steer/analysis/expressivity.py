"""How well steering of a block's output can replace steering of its MLP (arXiv 2603.00425, Theorem 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from .adapters import steering_at
from .states import Block, blocks_of, record


def theorem_3_1(
    model: Any, batches: Iterable[Mapping[str, torch.Tensor]], blocks: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """
    The error of the best linear steering of the block's output in place of one of the MLP's output, and its bounds.

    With `F` and `H` (d, tokens) the outputs of the MLP and of the block in the base model, `R` (d, d) a linear map of
    the MLP's output, and `P` the projection onto the row space of `H`, the best map `S` of the block's output has
    the relative error

        ||R F - S H|| / ||R F|| = ||R F (I - P)|| / ||R F||,

    with Frobenius norms. Let `s_i` be the singular values of `R F`, in descending order, and `t_i` the principal
    angles between the row spaces of `F` and `H`. By von Neumann's trace inequality, the sum of the theorem,

        sum_i s_i^2 sin^2(t_i) / sum_i s_i^2,

    is at most the square of the error with the angles in ascending order, as they are usually numbered, and at least
    that in descending order. The two are equal if the angles are.

    Computed from the (d, d) products `F F^T`, `F H^T` and `H H^T`, which are summed up in float64.

    Args:
        model (`nn.Module`):
            A causal language model. `R` is the linear part of its active low-rank steering at `post_mlp` if it has
            any, else the identity.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): See [`text_batches`]. More tokens than `d`.
        blocks (`Sequence[int]`, *optional*): Indices of the blocks. Default: all.

    Returns:
        `list[dict]`: For each block `block`; `error`, the relative error; `lower` and `upper`, the square roots of the
        two sums; and `angles`, the principal angles in degrees, in ascending order.

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
        "lower": _bound(spectrum, sine_squares, total),
        "upper": _bound(spectrum, sine_squares.flip(0), total),
        "angles": sine_squares.clamp(min=0).sqrt().asin().rad2deg().tolist(),
    }


def _bound(spectrum: torch.Tensor, sine_squares: torch.Tensor, total: torch.Tensor) -> float:
    return ((spectrum * sine_squares[: len(spectrum)]).sum().clamp(min=0) / total).sqrt().item()


def _whitening(gram: torch.Tensor) -> torch.Tensor:
    """`W` with `W^T gram W = I`, on the range of the Gram matrix up to rounding."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].rsqrt()


def _linear_map(block: Block, like: torch.Tensor) -> torch.Tensor:
    """`R`, (d, d)."""
    R = torch.zeros_like(like)
    linear = [(layer, name) for layer, name in steering_at(block, "post_mlp") if not layer.adapters[name].is_offset]
    for layer, name in linear:
        adapter = layer.adapters[name]
        update = adapter.merge(block.site("post_mlp"), layer.effective_scaling(name, adapter))
        R += update.left.to(R) @ update.right.to(R)
    return R if linear else torch.eye(len(like), dtype=like.dtype, device=like.device)
