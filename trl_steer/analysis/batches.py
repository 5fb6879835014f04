"""Batches of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def text_batches(
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: int = 8,
    max_length: int = 512,
    add_special_tokens: bool = True,
) -> list[dict[str, torch.Tensor]]:
    """
    Tokenizes texts into batches, padded on the right.

    Args:
        tokenizer: A tokenizer of transformers. It needs no padding token.
        texts (`Sequence[str]`): The texts. Empty ones are left out.
        batch_size (`int`, defaults to 8): Texts in a batch.
        max_length (`int`, defaults to 512): Tokens after which a text is cut off.
        add_special_tokens (`bool`, defaults to `True`): `False` if a chat template has already added them.

    Returns:
        `list[dict[str, torch.Tensor]]`: `input_ids` and `attention_mask` (rows, length), int64, of each batch.

    Raises:
        ValueError: There are no texts, or all of them are empty.
    """
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=add_special_tokens, truncation=True, max_length=max_length)
        rows.append(ids["input_ids"])
    return token_batches(rows, batch_size, tokenizer.pad_token_id or 0)


def token_batches(
    rows: Sequence[Sequence[int]], batch_size: int = 8, pad_token_id: int = 0
) -> list[dict[str, torch.Tensor]]:
    """The batches of [`text_batches`] from token ids.

    Raises:
        ValueError: There are no tokens.
    """
    rows = [row for row in rows if len(row)]
    if not rows:
        raise ValueError("There are no prompts: expected texts with at least one token, got none.")
    batches = []
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        ids = torch.full((len(part), max(map(len, part))), pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(part):
            ids[index, : len(row)] = torch.as_tensor(row)
            mask[index, : len(row)] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches
