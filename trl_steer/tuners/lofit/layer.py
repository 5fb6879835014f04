"""The two adapters of LoFiT, their common base class, which other tuners of attention heads use too, and the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..steering.adapter import AffineUpdate, SteeringAdapter, TrainingProgress
from ..steering.layer import SteeringLayer
from ..steering.sites import Site
from .config import HeadLayout, HeadSteeringConfig, LofitConfig

INIT_STD = 1e-3
# With `init_weights=False`, so that the adapter changes the model.
RANDOM_STD = 0.2


class HeadAdapter(SteeringAdapter):
    """
    Base class: `x' = x + scaling * (a * x + v)` for each attention head, with `a`, `v` (k,). A subclass implements
    [`coefficients`].

    Args:
        width (`int`): Size `H * k` of the hidden state.
        config ([`HeadSteeringConfig`]): The configuration of one block, see [`HeadSteeringConfig.for_block`].

    Attributes:
        index (`torch.Tensor`, *optional*): (n,), the heads that are steered, if not all.
    """

    starts_at_identity = False
    index: torch.Tensor | None

    def __init__(self, width: int, config: HeadSteeringConfig):
        super().__init__(width, config)
        self.num_heads, self.head_dim, heads = layout_of(config, width)
        self.register_buffer("index", None if heads is None else torch.tensor(heads), persistent=False)

    def coefficients(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`a` and `v`, (n, k), of the heads that are steered; `None` for what the method does not have."""
        raise NotImplementedError

    def merged_coefficients(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """[`coefficients`] as in evaluation."""
        return self.coefficients()

    def forward(
        self, h: torch.Tensor, residual: torch.Tensor | None = None, scaling: float | None = None
    ) -> torch.Tensor:
        steered = h if residual is None else residual
        scaling = self.scaling if scaling is None else scaling
        # Multiplied in the dtype of the adapter, then cast. A copy of the hidden state in that dtype would be kept.
        a, v = (part if part is None else (scaling * self.flat(part)).to(h.dtype) for part in self.coefficients())
        if v is not None:
            steered = steered + v
        return steered if a is None else torch.addcmul(steered, h, a)

    def flat(self, rows: torch.Tensor) -> torch.Tensor:
        """(H * k,) from the rows (n, k) of the heads that are steered, with zeros for the others."""
        if self.index is not None:
            rows = rows.new_zeros(self.num_heads, self.head_dim).index_copy(0, self.index, rows)
        return rows.flatten()

    def own_rows(self, flat: torch.Tensor) -> torch.Tensor:
        """The reverse of [`flat`]."""
        rows = flat.view(self.num_heads, self.head_dim)
        return rows if self.index is None else rows[self.index]

    def merge(self, site: Site, scaling: float) -> AffineUpdate:
        a, v = (part if part is None else scaling * self.flat(part.detach()) for part in self._double_coefficients())
        return AffineUpdate(offset=v, diagonal=a)

    def write_rows(self, tensor: torch.Tensor, parts: Sequence[tuple[float, Any]], which: int) -> None:
        """Writes the weighted sum of `a` (`which=0`) or `v` (`which=1`) of other adapters into a tensor of this."""
        total = torch.zeros(self.num_heads * self.head_dim, dtype=torch.float64, device=tensor.device)
        for weight, part in parts:
            total += weight * part.flat(part._double_coefficients()[which])
        tensor.copy_(self.own_rows(total))

    def _double_coefficients(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        a, v = self.merged_coefficients()
        return None if a is None else a.double(), None if v is None else v.double()


class LofitOffsetAdapter(HeadAdapter):
    """
    `x' = x + scaling * offset` for each head.

    Attributes:
        offset (`nn.Parameter`): (n, k), one row for each head that is steered.
    """

    is_offset = True
    structural_fields = ("phase",)
    size_fields = ("heads",)
    offset: torch.Tensor

    @staticmethod
    def shapes(config: Any, width: int) -> dict[str, tuple[int, ...]]:
        return {"offset": rows_shape(config, width)}

    def reset_parameters(self, identity: bool = True) -> None:
        nn.init.normal_(self.offset, std=INIT_STD if identity else RANDOM_STD)

    def coefficients(self) -> tuple[None, torch.Tensor]:
        return None, self.offset

    @staticmethod
    def summed_fields(configs: Sequence[Any]) -> dict[str, Any]:
        return {"heads": _union([config.heads for config in configs])}

    @torch.no_grad()
    def write_sum(self, parts: Sequence[tuple[float, Any]]) -> None:
        self.write_rows(self.offset, parts, which=1)


class LofitScaleAdapter(HeadAdapter):
    """
    `x' = x + scaling * scale * x` for each head, with the penalty `penalty_weight * sum |scale|`.

    Attributes:
        scale (`nn.Parameter`): (n, k), one row for each head that is steered.
        penalty_weight (`float`): Weight of the penalty.
    """

    structural_fields = ("phase",)
    size_fields = ("heads",)
    setting_fields = ("penalty_weight",)
    scale: torch.Tensor

    def __init__(self, width: int, config: LofitConfig):
        super().__init__(width, config)
        self.penalty_weight = config.penalty_weight

    @staticmethod
    def shapes(config: Any, width: int) -> dict[str, tuple[int, ...]]:
        return {"scale": rows_shape(config, width)}

    def reset_parameters(self, identity: bool = True) -> None:
        nn.init.normal_(self.scale, std=INIT_STD if identity else RANDOM_STD)

    def coefficients(self) -> tuple[torch.Tensor, None]:
        return self.scale, None

    def penalty(self, progress: TrainingProgress) -> torch.Tensor:
        return self.penalty_weight * self.scale.abs().sum()

    summed_fields = staticmethod(LofitOffsetAdapter.summed_fields)

    @torch.no_grad()
    def write_sum(self, parts: Sequence[tuple[float, Any]]) -> None:
        self.write_rows(self.scale, parts, which=0)


class LofitLayer(SteeringLayer):
    """The adapters at the attention heads of one block, `<block>.lofit`."""

    layer_name = "lofit"

    @staticmethod
    def adapter_class(config: LofitConfig) -> type[SteeringAdapter]:
        return LofitOffsetAdapter if config.phase == "offset" else LofitScaleAdapter


def layout_of(config: Any, width: int) -> HeadLayout:
    """The heads that a configuration means; outside of a block, where they are not known, one of size `width`."""
    return config.layout or HeadLayout(1, width)


def rows_shape(config: Any, width: int) -> tuple[int, int]:
    """Shape (n, k) of a tensor with one row for each head that is steered."""
    num_heads, head_dim, heads = layout_of(config, width)
    return (num_heads if heads is None else len(heads), head_dim)


def _union(all_heads: Sequence[dict[int, list[int]] | None]) -> dict[int, list[int]] | None:
    union: dict[int, set[int]] = {}
    for heads in all_heads:
        if heads is None:
            return None
        for block, listed in heads.items():
            union.setdefault(block, set()).update(listed)
    return {block: sorted(union[block]) for block in sorted(union)}
