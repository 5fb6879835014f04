"""How much of a block's output comes from its MLP (arXiv 2603.00425, section 3.3 and Figure 3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .states import blocks_of, record

NAMES = ("post_mlp", "post_attn", "post_block")


def mlp_share(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[dict[str, float]]:
    """
    The share of the MLP in each block, in two definitions, averaged over tokens.

    With `m` and `a` what the MLP and the attention add to the residual stream (behind the norms of Gemma and OLMo-2),
    and `h` the block's output, each (d,) for one token:

    - `of_sublayers`, the mean of `||m|| / (||m|| + ||a||)`, which the paper's figure shows;
    - `of_output`, the mean of `||m|| / ||h||`, of which the paper's text speaks. It can exceed 1.

    Args:
        model (`nn.Module`): A causal language model, with or without adapters.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): See [`text_batches`].

    Returns:
        `list[dict[str, float]]`: For each block `block`, `of_sublayers`, `of_output`, and the mean norms `mlp`,
        `attention` and `output`.

    Raises:
        ValueError: There are no tokens, or a block has no attention or MLP.
    """
    blocks = [block.index for block in blocks_of(model)]
    sums, tokens = {block: torch.zeros(5, dtype=torch.float64) for block in blocks}, 0
    for batch in batches:
        states = record(model, batch, NAMES)
        tokens += sum(states.lengths)
        for block in blocks:
            mlp, attention, output = (states[block, name].norm(dim=1) for name in NAMES)
            values = torch.stack([_ratio(mlp, mlp + attention), _ratio(mlp, output), mlp, attention, output])
            sums[block] += values.sum(1).cpu()
    if not tokens:
        raise ValueError("There are no prompts to measure on.")
    names = ("of_sublayers", "of_output", "mlp", "attention", "output")
    return [{"block": block, **dict(zip(names, (sums[block] / tokens).tolist(), strict=True))} for block in blocks]


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The ratio, 0 where both are 0."""
    return part / torch.where(whole > 0, whole, 1.0)
