"""Choosing heads by the first phase of LoFiT."""

from __future__ import annotations

import torch
from torch import nn

from ..steering.config import is_integer
from ..steering.matching import block_index
from .layer import LofitLayer, LofitScaleAdapter

# Of all heads, by default.
SHARE = 0.1


@torch.no_grad()
def top_heads(model: nn.Module, adapter_name: str = "default", k: int | None = None) -> list[tuple[int, int]]:
    """
    The attention heads that the first phase of LoFiT, `LofitConfig(phase="scale")`, has changed most, for `heads` of
    the second phase's configuration.

    Args:
        model (`nn.Module`): A model with a trained adapter of the first phase.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        k (`int`, *optional*): How many heads. Default: a tenth of those with parameters, and at least one.

    Returns:
        `list[tuple[int, int]]`: Indices of block and head, from the largest `||a||_2` to the smallest.

    Raises:
        ValueError: There is no such adapter in its first phase, or it has fewer heads than `k`.
    """
    norms: dict[tuple[int, int], float] = {}
    for name, layer in model.named_modules():
        adapter = layer.adapters._modules.get(adapter_name) if isinstance(layer, LofitLayer) else None
        if not isinstance(adapter, LofitScaleAdapter):
            continue
        block = block_index(name.removesuffix(f".{layer.layer_name}"))
        heads = range(adapter.num_heads) if adapter.index is None else adapter.index.tolist()
        for head, norm in zip(heads, adapter.scale.double().norm(dim=1).tolist(), strict=True):
            norms[block, head] = norm
    if not norms:
        raise ValueError(
            f"There is no LoFiT adapter {adapter_name!r} with phase='scale' in the model to rank its heads by."
        )
    k = max(1, int(SHARE * len(norms))) if k is None else k
    if not is_integer(k) or not 1 <= k <= len(norms):
        raise ValueError(
            f"k must be an integer from 1 to {len(norms)}, the number of heads that were trained, got {k!r}."
        )
    return sorted(norms, key=lambda place: (-norms[place], place))[:k]
