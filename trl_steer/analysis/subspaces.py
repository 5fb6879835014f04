"""Whether weight updates and steering would learn the same subspace (arXiv 2603.00425, section 4.1 and Figure 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from .states import record_pair, spread

Target = Literal["output", "shift"]


def subspace_alignment(
    base: Any,
    tuned: Any,
    batches: Iterable[Mapping[str, torch.Tensor]],
    blocks: Sequence[int] | None = None,
    k: int = 50,
    target: Target = "output",
) -> list[dict[str, Any]]:
    """
    Inner products of the leading left singular vectors of `Y F^T` and `Y H^T`.

    `F` and `H` (d, tokens) are the outputs of the MLP and of the block in the base model, and `Y` (d, tokens) is what
    is to be learned. By Proposition 4.2 of the paper, early in training the output of a weight update of the MLP lies
    in the leading left singular vectors of `Y F^T`, and that of steering in those of `Y H^T`. The two (d, d) products
    of each block are summed up in float64.

    Args:
        base (`nn.Module`, *optional*): The base model, or `None`, see [`record_pair`].
        tuned (`nn.Module`): The fine-tuned model.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): See [`text_batches`].
        blocks (`Sequence[int]`, *optional*): Indices of the blocks. Default: the first, the middle and the last one.
        k (`int`, defaults to 50): Number of singular vectors.
        target (`str`, defaults to `"output"`):
            What `Y` is: `"output"`, the output of the block in the fine-tuned model, as in the paper, or `"shift"`,
            its difference from that of the base model.

    Returns:
        `list[dict]`: For each block `block`; `inner_products` (k, k), the absolute inner product of each vector of
        `Y F^T` (rows) with each of `Y H^T` (columns); `diagonal`, the mean of its diagonal; `overlap`, the mean square
        of the cosines of the principal angles between the two subspaces, from 0 to 1; and `chance`, its mean for
        random subspaces, `k / d`. `k` is smaller where a product has a smaller rank.

    Raises:
        ValueError: There are no tokens, a block does not exist, `k` or `target` is invalid, or the models are equal,
            so that the shift is zero.
    """
    if target not in get_args(Target) or k < 1:
        raise ValueError(f"Expected k >= 1 and target one of {get_args(Target)}, got {k} and {target!r}.")
    chosen = spread(tuned) if blocks is None else list(blocks)
    products: dict[int, list[Any]] = {block: [0.0, 0.0] for block in chosen}
    for batch in batches:
        before, after = record_pair(base, tuned, batch, ["post_mlp", "post_block"], chosen)
        for block in chosen:
            H = before[block, "post_block"]
            Y = after[block, "post_block"] - (H if target == "shift" else 0)
            for index, X in enumerate((before[block, "post_mlp"], H)):
                products[block][index] = products[block][index] + Y.mT @ X
    return [{"block": block, **_alignment(block, products[block], k)} for block in chosen]


def _alignment(block: int, products: list[Any], k: int) -> dict[str, Any]:
    if not isinstance(products[0], torch.Tensor):
        raise ValueError("There are no prompts to measure on.")
    leading = []
    for product in products:
        left, values, _ = torch.linalg.svd(product)
        rank = int((values > values[0] * len(values) * torch.finfo(values.dtype).eps).sum())
        if not rank:
            raise ValueError(f"The product is zero in block {block}: the two models have the same states there.")
        leading.append(left[:, : min(k, rank)])
    k = min(part.shape[1] for part in leading)
    inner = (leading[0][:, :k].mT @ leading[1][:, :k].to(leading[0].device)).abs()
    return {
        "k": k,
        "inner_products": inner.tolist(),
        "diagonal": inner.diagonal().mean().item(),
        "overlap": inner.square().sum().item() / k,
        "chance": k / len(products[0]),
    }
