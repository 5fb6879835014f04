"""Which tokens an adapter edits: all, the last prompt token, or the first and the last prompt tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trl_steer.choices import LAST_PROMPT, first_and_last

if TYPE_CHECKING:
    from .adapter import SteeringAdapter
    from .prompts import Prompt


def chosen_tokens(prompt: torch.Tensor, positions: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last tokens to edit.

    With `"fn+ln"`, these are the first and the last `min(n, P // 2)` of the `P` prompt tokens, which never overlap
    (pyreft's rule). With `"last_prompt"`, there are no first ones.

    Args:
        prompt (`torch.Tensor`): (batch, tokens), boolean. True for prompt tokens, with padding on either side.
        positions (`str`): `"last_prompt"` or `"fn+ln"`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Two masks like `prompt`.
    """
    length, rank = prompt.sum(-1, keepdim=True), prompt.cumsum(-1) - 1
    if positions == LAST_PROMPT:
        return torch.zeros_like(prompt), prompt & (rank == length - 1)
    count = (length // 2).clamp(max=first_and_last(positions))
    return prompt & (rank < count), prompt & (rank >= length - count)


def prompt_tokens(adapter: SteeringAdapter, hidden: torch.Tensor, prompt: Prompt) -> list[torch.Tensor]:
    """The tokens of this forward pass that an adapter edits, as indices into (batch * length): in one tensor, or in
    two for the first and the last tokens if the adapter has different weights for them.

    Raises:
        ValueError: `hidden` does not have one entry for each token of the forward pass.
    """
    if hidden.shape[:-1].numel() != prompt.batch * prompt.length:
        raise ValueError(
            f"positions={adapter.positions!r} cannot be used here: the hidden state of shape {tuple(hidden.shape)} "
            f"does not match the input of the model, {prompt.batch} rows of {prompt.length} tokens."
        )
    return prompt.indices(adapter.positions, adapter.parts, hidden.device)


@torch.compiler.disable  # the number of tokens depends on the data
def edit_tokens(
    adapter: SteeringAdapter, hidden: torch.Tensor, residual: torch.Tensor | None, scaling: float, prompt: Prompt
) -> torch.Tensor:
    """Like `adapter(hidden, residual, scaling)`, but only at the adapter's positions.

    Args:
        adapter ([`SteeringAdapter`]): The adapter.
        hidden (`torch.Tensor`): (batch, length, d) or (batch * length, d).
        residual (`torch.Tensor`, *optional*): Shape of `hidden`. The update is added to it. Default: `hidden`.
        scaling (`float`): Factor on the update.
        prompt ([`Prompt`]): The prompt of each row.

    Raises:
        ValueError: `hidden` does not have one entry for each token of the forward pass.
    """
    base = hidden if residual is None else residual
    if prompt.is_over:
        return base
    flat, out = hidden.reshape(-1, hidden.shape[-1]), base.reshape(-1, hidden.shape[-1])
    groups = prompt_tokens(adapter, hidden, prompt)
    for part, index in enumerate(groups):
        of_part = {"part": part} if len(groups) > 1 else {}
        added_to = None if residual is None else out[index]
        out = out.index_copy(0, index, adapter(flat[index], added_to, scaling=scaling, **of_part))
    return out.reshape(base.shape)
