"""What every steering adapter has to do, whatever its method: the contract between a tuner and the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from .config import SteeringConfig
from .contexts import ContextStack
from .sites import Site


class Strength(NamedTuple):
    """A strength that an [`adapter_scaling`] context has set for some adapters."""

    adapters: frozenset[SteeringAdapter]
    value: float


STRENGTHS: ContextStack[Strength] = ContextStack("steering_strength")


@torch.compiler.disable  # which cannot trace context variables
def strength_in_context(adapter: SteeringAdapter) -> float:
    """The strength of an adapter here: of the innermost context that sets it, or its own."""
    return next((value for adapters, value in STRENGTHS if adapter in adapters), adapter.scaling)


class AffineUpdate(NamedTuple):
    """
    An update that is an affine function of the hidden state, `h + left @ right @ h + offset`.

    Attributes:
        left (`torch.Tensor`, *optional*): (d, r).
        right (`torch.Tensor`, *optional*): (r, d).
        offset (`torch.Tensor`, *optional*): (d,).
    """

    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    offset: torch.Tensor | None = None


class SteeringAdapter(nn.Module):
    """
    One adapter at one site of one block. It owns all of its weights, reads them as attributes and is always invoked
    through `__call__`, so hooks that bring weights to where they are needed (accelerate's offloading, FSDP2, ZeRO-3)
    see every use, and pruning or parametrizations may stand behind them.

    A method implements [`shapes`], [`reset_parameters`] and [`forward`], and what else it can do.

    Args:
        width (`int`): Size `d` of the hidden state at the site.
        config ([`SteeringConfig`]): The configuration of the adapter.

    Attributes:
        site (`str`): Name of the site.
        scaling (`float`): Strength of the update, saved with the adapter.
        contexts (`int`): How many [`adapter_scaling`] contexts this adapter is in, in whatever thread or task.
        starts_at_identity (`bool`): Whether a fresh adapter is exactly the base model.
        is_offset (`bool`): Whether the update is the same whatever the hidden state is.
        structural_fields (`tuple[str, ...]`):
            Fields of the configuration that must agree where adapters are summed or swapped for each other.
        size_fields (`tuple[str, ...]`): Fields that decide shapes, which must agree where adapters are swapped.
        setting_fields (`tuple[str, ...]`): Fields that are attributes of the same name, and may change at any time.
    """

    starts_at_identity: ClassVar[bool] = True
    is_offset: ClassVar[bool] = False
    structural_fields: ClassVar[tuple[str, ...]] = ()
    size_fields: ClassVar[tuple[str, ...]] = ()
    setting_fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, width: int, config: SteeringConfig):
        super().__init__()
        self.site = config.site
        self.scaling = config.scaling
        self.contexts = 0
        for name, shape in self.shapes(config, width).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @staticmethod
    def shapes(config: Any, width: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of an adapter with this configuration, at a site of this width."""
        raise NotImplementedError

    def reset_parameters(self, identity: bool = True) -> None:
        """Draws the weights anew. With `identity=False` the update must not vanish."""
        raise NotImplementedError

    def forward(
        self, h: torch.Tensor, residual: torch.Tensor | None = None, scaling: float | None = None
    ) -> torch.Tensor:
        """Returns `residual + scaling * update(h)`, never one of its inputs.

        Args:
            h (`torch.Tensor`): (..., d), the hidden state.
            residual (`torch.Tensor`, *optional*): (..., d), what the update is added to, `h` unless given.
            scaling (`float`, *optional*): Strength, `self.scaling` unless given.

        Returns:
            `torch.Tensor`: (..., d), dtype of `h`.
        """
        raise NotImplementedError

    def merge(self, site: Site, scaling: float) -> AffineUpdate:
        """The update in the form that can be merged into linear layers, at the strength `scaling`.

        Raises:
            ValueError: The update has no such form, or none that can be merged at this site.
        """
        raise ValueError(f"{type(self).__name__} is no affine function of the hidden state.")

    @staticmethod
    def summed_fields(configs: Sequence[Any]) -> dict[str, Any]:
        """Fields of the configuration of a sum that differ from those of its first summand.

        Raises:
            ValueError: Adapters of this method have no exact sum.
        """
        raise ValueError("Adapters of this method have no exact sum.")

    def write_sum(self, parts: Sequence[tuple[float, SteeringAdapter]]) -> None:
        """Writes the exact sum of `(weight, adapter)` pairs into this adapter, whose own strength is 1."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in none of the contexts that the original is in."""
        return {**self.__dict__, "contexts": 0}

    def is_offloaded(self) -> bool:
        """Whether some of the weights are on the meta device, to be brought by a hook when they are needed."""
        return any(parameter.is_meta for parameter in self.parameters())

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name}={tuple(parameter.shape)}" for name, parameter in self.named_parameters())
        return f"{self.site}, {sizes}, scaling={self.scaling}"
