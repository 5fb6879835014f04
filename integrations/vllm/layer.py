"""The steering of all requests of a batch at one site of one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from vllm.lora.layers.base import BaseLayerWithLoRA

from .families import Place


class Batch(NamedTuple):
    """
    What the layers compute for the tokens of a batch.

    Attributes:
        columns (`slice`): The columns that are computed.
        constant (`torch.Tensor`): (columns,), 1 in the last column of each slot, otherwise 0.
        activations (`list[tuple[Callable, torch.Tensor]]`): Functions, and the columns that each is applied to,
            (columns,), boolean.
        of_tokens (`torch.Tensor`, *optional*): (tokens or more, columns), boolean, the columns of the adapter of each
            token. `None` if all tokens have the same adapter, whose columns these are.
    """

    columns: slice
    constant: torch.Tensor
    activations: list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]
    of_tokens: torch.Tensor | None


class Slots:
    """
    What the layers of all sites share: the columns of the adapters in vLLM's slots, and the slots of a batch's tokens.

    The layers compute the bottlenecks of slots side by side, as `max_rank + 1` columns for each, and keep for each
    token those of its own adapter. The last column of a slot is the constant 1, whose row of `up` is the steering
    vector.

    Args:
        count (`int`): Number of slots.
        max_rank (`int`): Columns of each slot for a low-rank update.
        max_tokens (`int`): The largest number of tokens in a batch.
        dtype (`torch.dtype`), device (`torch.device`): Of the weights.
        is_eager (`bool`): Whether what is computed may differ from batch to batch. If not, it is the columns of all
            slots.

    Attributes:
        owner (`torch.Tensor`): (columns,), the slot of each column.
        batch ([`Batch`], *optional*): What is computed, `None` if no token has an adapter.
    """

    def __init__(
        self,
        count: int,
        max_rank: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        is_eager: bool = False,
    ):
        self.max_rank, self.dtype, self.device, self.is_eager = max_rank, dtype, device, is_eager
        self.owner = torch.arange(count, device=device).repeat_interleave(max_rank + 1)
        self._constant = torch.zeros(len(self.owner), dtype=dtype, device=device)
        self._constant[max_rank :: max_rank + 1] = 1
        # Name -> the columns that it is applied to.
        self.activations: dict[str, torch.Tensor] = {}
        self._activation_of: list[str | None] = [None] * count
        self._of_tokens = torch.zeros(max_tokens, len(self.owner), dtype=torch.bool, device=device)
        self.batch: Batch | None = self._batch(range(count), self._of_tokens)

    def allow(self, activation: str) -> None:
        """Makes an activation known, from the next forward pass on."""
        if activation not in self.activations:
            self.activations[activation] = torch.zeros(len(self.owner), dtype=torch.bool, device=self.device)
            self.batch = self._batch(range(len(self._activation_of)), self._of_tokens)

    def set_activation(self, slot: int, activation: str | None) -> None:
        """Sets the activation of the adapter in a slot, `None` for the identity, from the next batch on."""
        self._activation_of[slot] = activation
        for name, columns in self.activations.items():
            columns[self.of(slot)] = name == activation

    def set_tokens(self, slots: Sequence[int]) -> None:
        """Sets the slots of the tokens of the next forward passes, -1 for the base model."""
        self._of_tokens[: len(slots)] = torch.tensor(slots, device=self.device).unsqueeze(1) == self.owner
        if self.is_eager:
            used = {slot for slot in slots if slot >= 0}
            of_tokens = self._of_tokens if len({*slots}) > 1 else None
            self.batch = self._batch(range(min(used), max(used) + 1), of_tokens) if used else None

    def of(self, slot: int) -> slice:
        """The columns of a low-rank update in a slot."""
        first = slot * (self.max_rank + 1)
        return slice(first, first + self.max_rank)

    def _batch(self, slots: range, of_tokens: torch.Tensor | None) -> Batch:
        columns = slice(slots[0] * (self.max_rank + 1), (slots[-1] + 1) * (self.max_rank + 1))
        present = {self._activation_of[slot] for slot in slots} if self.is_eager else self.activations
        return Batch(
            columns,
            self._constant[columns],
            [(ACT2FN[name], owned[columns]) for name, owned in self.activations.items() if name in present],
            None if of_tokens is None else of_tokens[:, columns],
        )


class SteeringLayer(BaseLayerWithLoRA):
    """
    `base + act(h @ down.T) @ up.T + vector` for each token, with the weights of its own adapter.

    In a compiled model, the forward pass depends neither on which adapters there are, nor on which a batch uses.

    Args:
        width (`int`): Size `d` of the hidden state.
        slots ([`Slots`]): What the layers share.

    Attributes:
        down (`torch.Tensor`): (columns, d).
        up (`torch.Tensor`): (columns, d).
    """

    def __init__(self, width: int, slots: Slots):
        super().__init__()
        self.slots = slots
        for name in ("down", "up"):
            weight = torch.zeros(len(slots.owner), width, dtype=slots.dtype, device=slots.device)
            self.register_buffer(name, weight, persistent=False)

    # What vLLM's manager calls

    def reset_lora(self, index: int) -> None:
        first, last = self.slots.of(index).start, self.slots.of(index).stop + 1
        self.down[first:last] = 0
        self.up[first:last] = 0

    def set_lora(self, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """Puts an adapter into a slot.

        Args:
            index (`int`): The slot.
            lora_a (`torch.Tensor`): (r, d), `W_down`. `r` is 0 for a vector.
            lora_b (`torch.Tensor`): (d, r + 1), the scaled `W_up` and, in the last column, the scaled vector.
        """
        self.reset_lora(index)
        columns, r = self.slots.of(index), len(lora_a)
        self.down[columns.start : columns.start + r] = lora_a
        self.up[columns.start : columns.start + r] = lora_b[:, :r].T
        self.up[columns.stop] = lora_b[:, r]

    def forward(self, base: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            base (`torch.Tensor`): (tokens, d), what the update is added to.
            other (`torch.Tensor`, *optional*): (tokens, d), the rest of the hidden state that is read.

        Returns:
            `torch.Tensor`: (tokens, d), a new tensor, or `base` if no token has an adapter.
        """
        batch = self.slots.batch
        if batch is None:
            return base
        h = base if other is None else base + other
        z = F.linear(h, self.down[batch.columns], batch.constant)
        for function, columns in batch.activations:
            z = torch.where(columns, function(z), z)
        if batch.of_tokens is not None:
            z = torch.where(batch.of_tokens[: len(z)], z, 0.0)
        return torch.addmm(base, z, self.up[batch.columns])


def attach(layer: SteeringLayer, block: nn.Module, name: str, place: Place) -> None:
    """Makes a layer a child of a block and calls it at a place there."""
    block.add_module(name, layer)
    module = block.get_submodule(place.module)
    if place.is_input:
        module.register_forward_pre_hook(_on_input(layer))
    else:
        module.register_forward_hook(_on_output(layer, is_block=not place.module))


def _on_input(layer: SteeringLayer) -> Callable:
    def hook(module: nn.Module, args: tuple) -> tuple:
        return (layer(args[0]), *args[1:])

    return hook


def _on_output(layer: SteeringLayer, is_block: bool) -> Callable:
    """Blocks return the residual stream as a tensor, or as two whose sum it is; linear layers their output and a bias
    that was not added."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if not isinstance(output, tuple):
            return layer(output)
        hidden, other, *rest = output
        return (layer(hidden, other if is_block else None), other, *rest)

    return hook
