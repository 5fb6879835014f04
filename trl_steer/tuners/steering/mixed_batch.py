"""A batch in which each row has its own adapter.

Rows are sorted by adapter and cut into tiles of equal size, so that one batched product serves all adapters of a kind,
however many there are and however many rows each of them has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from trl_steer.choices import ALL

from .positions import prompt_tokens

if TYPE_CHECKING:
    from .adapter import SteeringAdapter
    from .prompts import Prompt

BASE = "__base__"


class BatchRows:
    """
    The adapter of each row of a batch, and what the layers prepare for these rows, above all the stacked weights.

    One object serves one call of the model or of `generate`, which uses each adapter as it was when the call first
    came to it. Nothing is kept for the next call, so that no change of an adapter is missed: a write to `.data`, or
    one by FSDP2, changes neither the identity of a tensor nor its version.

    Args:
        names (`Sequence[str]`): The name of the adapter for each row, `"__base__"` for none.
        repeats (`int`, defaults to `1`): How often `generate` repeats each row, for beams or for several sequences.

    Attributes:
        unique (`list[str]`): The adapters, sorted.
        groups (`dict`): What is kept for a layer and site, see [`AdapterGroup`].
    """

    def __init__(self, names: Sequence[str], repeats: int = 1):
        self.names, self.repeats = list(names), repeats
        self.unique = sorted({*names} - {BASE})
        self.groups: dict[Any, list[AdapterGroup] | None] = {}
        indices = {name: index for index, name in enumerate(self.unique)}
        self._owners = torch.tensor([indices.get(name, -1) for name in self.names], dtype=torch.long, device="cpu")
        self._tiles: dict[Any, Tiles] = {}

    def names_for(self, count: int, is_flat: bool) -> list[str]:
        """The names for the rows of a tensor. If `is_flat`, its rows are tokens, as in the input of OPT's MLP and of
        shared experts."""
        each, rest = divmod(count, max(len(self.names), 1))
        if rest or not (is_flat or each == self.repeats):
            return self.names
        return [name for name in self.names for _ in range(each)]

    def view(self, hidden: torch.Tensor) -> torch.Tensor:
        """A hidden state (batch, sequence, d) or (batch * sequence, d) as (rows, tokens, d).

        Raises:
            ValueError: It does not have these rows.
        """
        names = self.names_for(len(hidden), hidden.dim() == 2)
        if len(names) != len(hidden):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(hidden)} respectively."
            )
        rows = max(len(self.names), 1)
        return hidden.reshape(rows, hidden.shape[:-1].numel() // rows, hidden.shape[-1])

    def tiles(
        self, members: tuple[int, ...], hidden: torch.Tensor, tokens: torch.Tensor | None = None, key: Any = None
    ) -> Tiles:
        """The rows of some adapters, or tokens in these rows.

        Args:
            members (`tuple[int, ...]`): Indices of the adapters in `unique`.
            hidden (`torch.Tensor`): (rows, tokens, d).
            tokens (`torch.Tensor`, *optional*): Indices into (rows * tokens). Default: whole rows.
            key: What `tokens` depends on.
        """
        key = (members, hidden.device, key)
        if key not in self._tiles:
            with torch.device("cpu"):
                renumbered = torch.full((len(self.unique) + 1,), -1)  # the last one is for rows without an adapter
                renumbered[list(members)] = torch.arange(len(members))
                owners = renumbered[self._owners]
                if tokens is not None:
                    tokens = tokens.cpu()
                    of_tokens = torch.full((hidden.shape[:2].numel(),), -1)
                    of_tokens[tokens] = owners[tokens // hidden.shape[1]]
                    owners = of_tokens
                self._tiles[key] = Tiles.of(owners, hidden.device)
        return self._tiles[key]


@dataclass
class Tiles:
    """
    Items of a batch, rows or tokens, sorted by adapter and cut into tiles of equal size. What is left of the last tile
    of an adapter is filled with some item, and its result is not used.

    Attributes:
        owners (`list[int]`): The adapter of each tile.
        index (`torch.Tensor`, *optional*): (tiles * size,), the items in the tiles. `None`: all, in their order.
        places (`torch.Tensor`): (n,), where each item that has an adapter is in `index`.
        items (`torch.Tensor`, *optional*): (n,), the items that have an adapter. `None`: all.
    """

    owners: list[int]
    index: torch.Tensor | None
    places: torch.Tensor
    items: torch.Tensor | None

    @classmethod
    def of(cls, owners: torch.Tensor, device: torch.device) -> Tiles:
        """The tiles for items (items,) of these adapters, -1 for none."""
        count = len(owners)
        items = (owners >= 0).nonzero().flatten()
        owners = owners[items]
        rows = owners.bincount()
        # As many as each adapter has on average: there are at most two tiles for each adapter, and at most half of
        # what they hold is filled up.
        size = -(-len(items) // max(int((rows > 0).sum()), 1))
        tiles = (rows + size - 1) // max(size, 1)
        order = owners.argsort(stable=True)
        first_tile, first_item = tiles.cumsum(0) - tiles, rows.cumsum(0) - rows
        places = torch.empty_like(order)
        places[order] = (first_tile * size - first_item)[owners[order]] + torch.arange(len(order))
        index = items[:1].repeat(int(tiles.sum()) * size)
        index[places] = items
        return cls(
            torch.arange(len(rows)).repeat_interleave(tiles).tolist(),
            None if torch.equal(index, torch.arange(count)) else index.to(device),
            places.to(device),
            None if len(items) == count else items.to(device),
        )

    def edit(
        self, update: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor, steered: torch.Tensor
    ) -> torch.Tensor:
        """`steered` with `update(h)` for the items that have an adapter.

        Args:
            update (`Callable`): The steered hidden state (tiles, n, d), given the hidden state.
            h (`torch.Tensor`), steered (`torch.Tensor`): (items, tokens, d).
        """
        if not self.owners:
            return steered
        tiles = h if self.index is None else h.index_select(0, self.index)
        edited = update(tiles.reshape(len(self.owners), -1, h.shape[-1])).reshape(tiles.shape)
        if self.index is None:
            return edited
        edited = edited.index_select(0, self.places)
        return edited if self.items is None else steered.index_copy(0, self.items, edited)


class AdapterGroup:
    """
    The adapters of one layer that are computed together.

    Args:
        rows ([`BatchRows`]): The rows of the batch.
        members (`Sequence[tuple[int, SteeringAdapter, float]]`):
            Index in `rows.unique`, adapter and scaling of each. They have the same positions and `batch_key`.
        is_called (`bool`): Whether it is one adapter, which is called.
    """

    def __init__(self, rows: BatchRows, members: Sequence[tuple[int, SteeringAdapter, float]], is_called: bool):
        self.rows, self.is_called = rows, is_called
        self.indices, self.adapters, self.scalings = zip(*members, strict=True)
        self.positions: str = self.adapters[0].positions
        self._prepared: tuple[Tiles, Callable[..., torch.Tensor]] | None = None

    def steer(self, h: torch.Tensor, steered: torch.Tensor, prompt: Prompt | None) -> torch.Tensor:
        """`steered` with the rows of these adapters, all three (rows, tokens, d)."""
        if self.positions == ALL:
            if self._prepared is None:
                tiles = self.rows.tiles(self.indices, h)
                self._prepared = tiles, self._update(tiles)
            tiles, update = self._prepared
            return tiles.edit(update, h, steered)
        if prompt is None or prompt.is_over:
            return steered
        flat, out = (tensor.reshape(-1, 1, h.shape[-1]) for tensor in (h, steered))
        groups = prompt_tokens(self.adapters[0], h, prompt)
        for part, tokens in enumerate(groups):
            tiles = self.rows.tiles(self.indices, h, tokens, (prompt, self.positions, len(groups), part))
            of_part = {"part": part} if len(groups) > 1 else {}
            out = tiles.edit(partial(self._update(tiles), **of_part), flat, out)
        return out.view(h.shape)

    def _update(self, tiles: Tiles) -> Callable[..., torch.Tensor]:
        if self.is_called:
            return partial(self.adapters[0], scaling=self.scalings[0])
        adapters = [self.adapters[owner] for owner in tiles.owners]
        return self.adapters[0].batch_update(adapters, [self.scalings[owner] for owner in tiles.owners])
