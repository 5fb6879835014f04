"""The steering of all requests of a batch at one site of one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from vllm.lora.layers.base import BaseLayerWithLoRA

from .families import Place


class Slots:
    """
    What the layers of all sites share: the columns of the adapters in vLLM's slots, and the slots of a batch's tokens.

    The layers compute the bottlenecks of all slots side by side, as `slots * (max_rank + 1)` columns, and keep for
    each token those of its own adapter. The last column of each slot is the constant 1, whose row of `up` is the
    steering vector.

    Args:
        count (`int`): Number of slots.
        max_rank (`int`): Columns of each slot for a low-rank update.
        max_tokens (`int`): The largest number of tokens in a batch.
        dtype (`torch.dtype`), device (`torch.device`): Of the weights.

    Attributes:
        owner (`torch.Tensor`): (columns,), the slot of each column.
        constant (`torch.Tensor`): (columns,), 1 in the last column of each slot, otherwise 0.
        activations (`dict[str, torch.Tensor]`): Name -> (columns,), boolean, the columns that it is applied to.
        of_tokens (`torch.Tensor`): (max_tokens, columns), boolean, the columns of the adapter of each token.
    """

    def __init__(self, count: int, max_rank: int, max_tokens: int, dtype: torch.dtype, device: torch.device):
        self.max_rank, self.dtype, self.device = max_rank, dtype, device
        self.owner = torch.arange(count, device=device).repeat_interleave(max_rank + 1)
        self.constant = torch.zeros(len(self.owner), dtype=dtype, device=device)
        self.constant[max_rank :: max_rank + 1] = 1
        self.activations: dict[str, torch.Tensor] = {}
        self.functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self.of_tokens = torch.zeros(max_tokens, len(self.owner), dtype=torch.bool, device=device)

    def allow(self, activation: str) -> None:
        """Makes an activation known, from the next forward pass on."""
        if activation not in self.activations:
            self.functions[activation] = ACT2FN[activation]
            self.activations[activation] = torch.zeros(len(self.owner), dtype=torch.bool, device=self.device)

    def set_activation(self, slot: int, activation: str | None) -> None:
        """Sets the activation of the adapter in a slot, `None` for the identity."""
        for name, columns in self.activations.items():
            columns[self.of(slot)] = name == activation

    def set_tokens(self, slots: Sequence[int]) -> None:
        """Sets the slots of the tokens of the next forward passes, -1 for the base model."""
        self.of_tokens[: len(slots)] = torch.tensor(slots, device=self.device).unsqueeze(1) == self.owner

    def of(self, slot: int) -> slice:
        """The columns of a low-rank update in a slot."""
        first = slot * (self.max_rank + 1)
        return slice(first, first + self.max_rank)


class SteeringLayer(BaseLayerWithLoRA):
    """
    `base + act(h @ down.T) @ up.T + vector` for each token, with the weights of its own adapter.

    The forward pass does not depend on which adapters there are, nor on which of them a batch uses.

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

    def forward(self, h: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """
        Args:
            h (`torch.Tensor`): (tokens, d), the hidden state that is read.
            base (`torch.Tensor`): (tokens, d), what the update is added to.

        Returns:
            `torch.Tensor`: (tokens, d), a new tensor.
        """
        z = F.linear(h, self.down, self.slots.constant)
        for name, columns in self.slots.activations.items():
            z = torch.where(columns, self.slots.functions[name](z), z)
        return torch.addmm(base, torch.where(self.slots.of_tokens[: h.shape[0]], z, 0.0), self.up)


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
        return (layer(args[0], args[0]), *args[1:])

    return hook


def _on_output(layer: SteeringLayer, is_block: bool) -> Callable:
    """Blocks return the residual stream as a tensor, or as two whose sum it is; linear layers their output and a bias
    that was not added."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if not isinstance(output, tuple):
            return layer(output, output)
        hidden, other, *rest = output
        return (layer(hidden + other if is_block else hidden, hidden), other, *rest)

    return hook
