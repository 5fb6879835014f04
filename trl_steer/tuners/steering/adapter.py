"""The base class of steering adapters: the interface between a method and the core."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from .config import SteeringConfig
from .contexts import ContextStack
from .sites import Site


class ScopedScaling(NamedTuple):
    """The scaling that an [`adapter_scaling`] context sets for some adapters."""

    adapters: frozenset[SteeringAdapter]
    value: float


SCALING_STACK: ContextStack[ScopedScaling] = ContextStack("steering_scaling")


@torch.compiler.disable  # torch.compile cannot trace context variables
def current_scaling(adapter: SteeringAdapter) -> float:
    """The scaling set by the innermost [`adapter_scaling`] context of this adapter, or else its own."""
    return next((value for adapters, value in SCALING_STACK if adapter in adapters), adapter.scaling)


class AffineUpdate(NamedTuple):
    """
    An update that is an affine function of the hidden state: `h + M @ h + offset`, where
    `M = left @ right + diag(diagonal)`.

    Attributes:
        left (`torch.Tensor`, *optional*): (d, r).
        right (`torch.Tensor`, *optional*): (r, d).
        offset (`torch.Tensor`, *optional*): (d,).
        diagonal (`torch.Tensor`, *optional*): (d,).
    """

    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    diagonal: torch.Tensor | None = None

    @property
    def is_offset(self) -> bool:
        """Whether `M` is zero."""
        return self.left is None and self.diagonal is None

    def multiply(self, rows: torch.Tensor, transpose: bool = False) -> torch.Tensor:
        """`rows @ M`, or `rows @ M.T`, for rows (..., d)."""
        product = torch.zeros_like(rows)
        if self.left is not None and self.right is not None:
            product += rows @ self.right.mT @ self.left.mT if transpose else rows @ self.left @ self.right
        return product if self.diagonal is None else product + rows * self.diagonal


class TrainingProgress(NamedTuple):
    """
    How far training has come, which the weight of a penalty may depend on.

    Attributes:
        step (`int`): Optimizer steps that were made.
        max_steps (`int`): Optimizer steps of the whole training.
        num_adapters (`int`): Number of blocks with the adapter.
    """

    step: int = 0
    max_steps: int = 1
    num_adapters: int = 1


class SteeringAdapter(nn.Module):
    """
    Base class of adapters: one adapter at one site of one block.

    An adapter owns all of its weights, reads them as attributes and is always invoked through `__call__`. So the hooks
    that load or gather weights (accelerate's offloading, FSDP2, ZeRO-3) run at every use, and pruning and
    parametrizations work.

    A subclass implements [`shapes`], [`reset_parameters`] and [`forward`], and optionally [`merge`],
    [`summed_fields`], [`write_sum`], [`penalty`], and [`batch_key`] with [`batch_update`].

    Args:
        width (`int`): Size `d` of the hidden state at the site.
        config ([`SteeringConfig`]): The configuration of the adapter.

    Attributes:
        site (`str`): Name of the site.
        positions (`str`): Which tokens are edited, see [`SteeringConfig`].
        scaling (`float`): Factor on the update, saved with the adapter.
        contexts (`int`): Number of open [`adapter_scaling`] contexts of this adapter, over all threads and tasks.
        starts_at_identity (`bool`): Whether a model with a new adapter computes exactly what the base model does.
        is_offset (`bool`): Whether the update does not depend on the hidden state.
        structural_fields (`tuple[str, ...]`):
            Fields of the configuration that must be equal for adapters to be summed or hot-swapped.
        size_fields (`tuple[str, ...]`): Fields that determine shapes. They must be equal for a hot swap.
        setting_fields (`tuple[str, ...]`): Fields that are attributes of the same name and may change at any time.
        parts (`int`):
            2 if the first and the last tokens of the prompt are edited by different weights. `forward` then takes
            `part`, 0 or 1, which of them `h` is.
    """

    starts_at_identity: ClassVar[bool] = True
    is_offset: ClassVar[bool] = False
    structural_fields: ClassVar[tuple[str, ...]] = ()
    size_fields: ClassVar[tuple[str, ...]] = ()
    setting_fields: ClassVar[tuple[str, ...]] = ()
    parts: int = 1

    def __init__(self, width: int, config: SteeringConfig):
        super().__init__()
        self.site = config.site
        self.positions = config.positions
        self.scaling = config.scaling
        self.contexts = 0
        for name, shape in self.shapes(config, width).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @staticmethod
    def shapes(config: Any, width: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of an adapter's tensors, given its configuration and the width of the site."""
        raise NotImplementedError

    @staticmethod
    def find_problem(name: str, tensor: torch.Tensor) -> str | None:
        """What is wrong with the values of a tensor to be loaded, beyond shape and finiteness; `None` if nothing."""
        return None

    def reset_parameters(self, identity: bool = True) -> None:
        """Initializes the weights. With `identity=False` the update must not be zero."""
        raise NotImplementedError

    def forward(
        self, h: torch.Tensor, residual: torch.Tensor | None = None, scaling: float | None = None
    ) -> torch.Tensor:
        """Returns `residual + scaling * update(h)` as a new tensor.

        Args:
            h (`torch.Tensor`): (..., d), the hidden state.
            residual (`torch.Tensor`, *optional*): (..., d), what the update is added to. Default: `h`.
            scaling (`float`, *optional*): Factor on the update. Default: `self.scaling`.

        Returns:
            `torch.Tensor`: (..., d), dtype of `h`.
        """
        raise NotImplementedError

    def batch_key(self) -> Hashable | None:
        """What adapters have in common that [`batch_update`] computes together, in a batch in which each row has its
        own adapter (`adapter_names`). Default: `None`, the adapter is called for its own rows."""
        return None

    @staticmethod
    def batch_update(adapters: Sequence[Any], scalings: Sequence[float]) -> Callable[[torch.Tensor], torch.Tensor]:
        """The updates of adapters with the same `batch_key` as one function, with their current weights.

        Args:
            adapters (`Sequence[SteeringAdapter]`): The adapter of each entry. An adapter may have several.
            scalings (`Sequence[float]`): Factor on the update of each entry.

        Returns:
            `Callable`: Maps the hidden state (entries, n, d) to the steered one.
        """
        raise NotImplementedError

    def merge(self, site: Site, scaling: float) -> AffineUpdate:
        """The update, multiplied by `scaling`, in a form that can be merged into linear layers.

        Raises:
            ValueError: The update is not affine, or cannot be merged at this site.
        """
        raise ValueError(f"{type(self).__name__} is not an affine function of the hidden state.")

    @staticmethod
    def summed_fields(configs: Sequence[Any]) -> dict[str, Any]:
        """Configuration fields of the sum of adapters that differ from those of the first one.

        Raises:
            ValueError: Adapters of this method have no exact sum.
        """
        raise ValueError("Adapters of this method have no exact sum.")

    def write_sum(self, parts: Sequence[tuple[float, SteeringAdapter]]) -> None:
        """Sets this adapter, whose scaling is 1, to the exact sum of `(weight, adapter)` pairs."""
        raise NotImplementedError

    def penalty(self, progress: TrainingProgress) -> torch.Tensor | None:
        """What training adds to the loss for this adapter, a scalar. Default: `None`, nothing. See
        [`PenaltyCallback`]."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not in the contexts of the original."""
        return {**self.__dict__, "contexts": 0}

    def is_offloaded(self) -> bool:
        """Whether some weights are on the meta device, where accelerate leaves offloaded weights."""
        return any(parameter.is_meta for parameter in self.parameters())

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name}={tuple(parameter.shape)}" for name, parameter in self.named_parameters())
        return f"{self.site}, {sizes}, scaling={self.scaling}"
