"""The two kinds of adapters of post-block and sublayer steering, and the layer of post-block steering."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..steering.adapter import AffineUpdate, SteeringAdapter
from ..steering.layer import SteeringLayer
from ..steering.ops.low_rank import low_rank_update
from ..steering.ops.stacked import scaled, stack_factors, stacked_low_rank_update
from ..steering.ops.vector import vector_update
from ..steering.sites import Site
from .config import AdditiveSteeringConfig


class LowRankAdapter(SteeringAdapter):
    """
    `h + scaling * dropout(act(h @ down.T)) @ up.T`.

    Args:
        width (`int`): Size `d` of the hidden state.
        config ([`AdditiveSteeringConfig`]): Rank, activation, dropout, scaling and initialization.

    Attributes:
        down (`nn.Parameter`): (r, d).
        up (`nn.Parameter`): (d, r), initialized to zero.
    """

    structural_fields = ("steering_type", "activation")
    size_fields = ("r", "rank_pattern")
    setting_fields = ("dropout",)
    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, width: int, config: AdditiveSteeringConfig):
        super().__init__(width, config)
        self.activation_name = config.activation
        self.activation = None if config.activation is None else ACT2FN[config.activation]
        self.dropout = config.dropout
        self.init_scale = config.init_scale

    @staticmethod
    def shapes(config: Any, width: int) -> dict[str, tuple[int, ...]]:
        return {"down": (config.r, width), "up": (width, config.r)}

    def reset_parameters(self, identity: bool = True) -> None:
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        with torch.no_grad():
            self.down.mul_(self.init_scale)
        if identity:
            nn.init.zeros_(self.up)
        else:
            nn.init.kaiming_uniform_(self.up, a=5**0.5)

    def forward(
        self, h: torch.Tensor, residual: torch.Tensor | None = None, scaling: float | None = None
    ) -> torch.Tensor:
        down, up = self.down, self.up
        if down.is_meta and not h.is_meta:  # PyTorch's CPU matrix product would not raise an error
            raise RuntimeError(
                "The weights of a steering adapter are on the meta device. If the adapter was created with "
                "`low_cpu_mem_usage=True`, load its weights first. If the model is offloaded with "
                "`preload_module_classes`, remove the class of the blocks from it."
            )
        scaling = self.scaling if scaling is None else scaling
        dropout = self.dropout if self.training else 0.0
        if residual is None and self.site in ("post_attn", "post_mlp"):
            # With `residual`, the plain implementation is used: no other layer saves the output of a sublayer for the
            # backward pass, and a block may modify it in place (Falcon).
            residual = h
        return low_rank_update(h, down, up, scaling, self.activation, dropout, residual)

    def batch_key(self) -> Hashable | None:
        down = self.down
        draws = self.training and self.dropout
        return None if draws or down.is_meta else (LowRankAdapter, self.activation_name, down.dtype)

    @staticmethod
    def batch_update(adapters: Sequence[Any], scalings: Sequence[float]) -> Callable[[torch.Tensor], torch.Tensor]:
        down, up = stack_factors([each.down for each in adapters], [each.up for each in adapters], scalings)
        return partial(stacked_low_rank_update, down=down, up=up, activation=adapters[0].activation)

    def merge(self, site: Site, scaling: float) -> AffineUpdate:
        if self.activation is not None:
            raise ValueError("its update is nonlinear, because of the activation.")
        return AffineUpdate(left=scaling * self.up.data.double(), right=self.down.data)

    @staticmethod
    def summed_fields(configs: Sequence[Any]) -> dict[str, Any]:
        return {"r": sum(config.largest_rank for config in configs), "rank_pattern": None}

    @torch.no_grad()
    def write_sum(self, parts: Sequence[tuple[float, Any]]) -> None:
        """Concatenates the factors. In a block where ranks are smaller, or without some of the adapters, the remaining
        factors are zero."""
        self.down.zero_()
        self.up.zero_()
        first = 0
        for weight, part in parts:
            last = first + len(part.down)
            self.down[first:last] = part.down
            self.up[:, first:last] = weight * part.up
            first = last


class VectorAdapter(SteeringAdapter):
    """
    `h + scaling * vector`.

    Args:
        width (`int`): Size `d` of the hidden state.
        config ([`AdditiveSteeringConfig`]): Scaling.

    Attributes:
        vector (`nn.Parameter`): (d,), initialized to zero.
    """

    is_offset = True
    structural_fields = ("steering_type", "activation")
    vector: torch.Tensor

    @staticmethod
    def shapes(config: Any, width: int) -> dict[str, tuple[int, ...]]:
        return {"vector": (width,)}

    def reset_parameters(self, identity: bool = True) -> None:
        if identity:
            nn.init.zeros_(self.vector)
        else:
            nn.init.normal_(self.vector, std=0.2)

    def forward(
        self, h: torch.Tensor, residual: torch.Tensor | None = None, scaling: float | None = None
    ) -> torch.Tensor:
        base, vector = h if residual is None else residual, self.vector
        scaling = self.scaling if scaling is None else scaling
        return vector_update(base, vector, scaling)

    def batch_key(self) -> Hashable | None:
        vector = self.vector
        return None if vector.is_meta else (VectorAdapter, vector.dtype)

    @staticmethod
    def batch_update(adapters: Sequence[Any], scalings: Sequence[float]) -> Callable[[torch.Tensor], torch.Tensor]:
        offsets = scaled(torch.stack([each.vector for each in adapters]), scalings).unsqueeze(1)
        return partial(vector_update, vector=offsets, scaling=1.0)

    def merge(self, site: Site, scaling: float) -> AffineUpdate:
        return AffineUpdate(offset=scaling * self.vector.data.double())

    @staticmethod
    def summed_fields(configs: Sequence[Any]) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def write_sum(self, parts: Sequence[tuple[float, Any]]) -> None:
        self.vector.copy_(sum(weight * part.vector for weight, part in parts))


class PostBlockSteeringLayer(SteeringLayer):
    """The adapters at the output of one block, `<block>.post_block_steering`."""

    layer_name = "post_block_steering"

    @staticmethod
    def adapter_class(config: AdditiveSteeringConfig) -> type[SteeringAdapter]:
        return LowRankAdapter if config.steering_type == "low_rank" else VectorAdapter
