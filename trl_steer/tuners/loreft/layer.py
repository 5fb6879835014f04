"""The adapter of LoReFT and the layer that holds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..steering.adapter import AffineUpdate, SteeringAdapter
from ..steering.layer import SteeringLayer
from ..steering.sites import Site
from .config import LoReftConfig


class LoReftAdapter(SteeringAdapter):
    """
    `dropout(h + scaling * (act(h @ weight.T + bias) - h @ rotation.T) @ rotation)`.

    In training mode, the parameter behind `rotation` is any matrix, whose rows are orthonormalized when `rotation` is
    read. The first forward pass after an optimizer step, and the change to evaluation mode, replace the parameter by
    the orthonormalized one (not under FSDP2). State dicts hold that one in any case.

    Args:
        width (`int`): Size `d` of the hidden state.
        config ([`LoReftConfig`]): The configuration.

    Attributes:
        rotation (`torch.Tensor`): (r, d), with orthonormal rows. (2, r, d) where weights are not shared.
        weight (`nn.Parameter`): (r, d) or (2, r, d).
        bias (`nn.Parameter`): (r,) or (2, r).

    Raises:
        ValueError: `r` is greater than `d`.
    """

    starts_at_identity = False
    structural_fields = ("activation", "share_weights")
    size_fields = ("r",)
    setting_fields = ("dropout",)
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, width: int, config: LoReftConfig):
        if config.r > width:
            raise ValueError(f"r={config.r} is more than the {width} dimensions of the hidden state.")
        super().__init__(width, config)
        self.parts = 1 if config.share_weights else 2
        self.activation = None if config.activation is None else ACT2FN[config.activation]
        self.dropout = config.dropout
        self._was_sharded = False
        self.register_state_dict_post_hook(_write_rotation)

    @property
    def rotation(self) -> torch.Tensor:
        parameter = self._unconstrained
        # FSDP2 gets its parameter by this name.
        return orthonormal_rows(parameter) if self.training and not self._is_sharded() else parameter

    @rotation.setter
    def rotation(self, value: torch.Tensor) -> None:
        # In place of a parameter, for example the copy in a replica or what pruning computes.
        self.__dict__["rotation"] = value

    @property
    def _unconstrained(self) -> torch.Tensor:
        tensors: dict[str, Any] = self._parameters if "rotation" in self._parameters else self.__dict__
        if "rotation" not in tensors:
            raise AttributeError("rotation")
        return tensors["rotation"]

    @staticmethod
    def shapes(config: Any, width: int) -> dict[str, tuple[int, ...]]:
        parts = () if config.share_weights else (2,)
        matrix = (*parts, config.r, width)
        return {"rotation": matrix, "weight": matrix, "bias": (*parts, config.r)}

    @staticmethod
    def find_problem(name: str, tensor: torch.Tensor) -> str | None:
        if name != "rotation" or _is_orthonormal(tensor, 1e-2):
            return None
        distance = _distance_from_orthonormal(tensor)
        return f"should have orthonormal rows, but max |R R^T - I| is {distance:.2g}"

    @torch.no_grad()
    def reset_parameters(self, identity: bool = True) -> None:
        """As in pyreft: a random rotation, `weight` and `bias` as those of `nn.Linear`. LoReFT never starts at the
        identity, so `identity` changes nothing."""
        for rotation in self._unconstrained.view(-1, *self._unconstrained.shape[-2:]):
            nn.init.orthogonal_(rotation)
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def _orthonormal(self) -> torch.Tensor:
        is_free = self.training or self._is_sharded()
        return orthonormal_rows(self._unconstrained) if is_free else self._unconstrained

    def _is_sharded(self) -> bool:
        """Whether FSDP2 has sharded the parameter. In forward passes it stands for a gathered copy."""
        self._was_sharded = self._was_sharded or isinstance(self._unconstrained, DTensor)
        return self._was_sharded

    def train(self, mode: bool = True) -> LoReftAdapter:
        if self.training and not mode:
            self._orthonormalize()
        self._is_sharded()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> LoReftAdapter:
        super()._apply(fn, recurse)
        self._orthonormalize()  # PEFT creates adapters in the dtype of the base model, which may have rounded the rows
        return self

    def forward(
        self, h: torch.Tensor, residual: torch.Tensor | None = None, scaling: float | None = None, part: int = 0
    ) -> torch.Tensor:
        if self.training:
            self._orthonormalize()
        rotation, weight, bias = self._orthonormal(), self.weight, self.bias
        if self.parts == 2:
            rotation, weight, bias = rotation[part], weight[part], bias[part]
        states = h.to(weight.dtype)
        source = F.linear(states, weight, bias)
        if self.activation is not None:
            source = self.activation(source)
        update = (source - F.linear(states, rotation)) @ rotation
        scaling = self.scaling if scaling is None else scaling
        edited = torch.add(states, update, alpha=scaling).to(h.dtype)
        if self.training and self.dropout:
            edited = F.dropout(edited, self.dropout)
        return edited if residual is None else residual + (edited - h)

    @torch.no_grad()
    def _orthonormalize(self) -> None:
        """Replaces the parameter by its orthonormalized rows after an optimizer step, so that it does not drift away,
        and a run resumed from a folder equals one that was not stopped."""
        parameter = self._unconstrained
        if self._is_sharded() or parameter.is_meta or _is_orthonormal(parameter):
            return  # a shard, or a gathered copy; before it is loaded, it can be anything
        rows = orthonormal_rows(parameter)
        if rows.isfinite().all():
            parameter.copy_(rows)

    def merge(self, site: Site, scaling: float) -> AffineUpdate:
        if self.activation is not None:
            raise ValueError("its activation makes the update nonlinear.")
        rotation = self._orthonormal().data
        left = scaling * rotation.double().mT
        offset = left @ self.bias.data.double().unsqueeze(-1)
        return AffineUpdate(left, self.weight.data - rotation, offset.squeeze(-1))


def orthonormal_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormalizes the rows of a matrix (..., r, d) from first to last: `L^-1 M`, where `L` (r, r) is the Cholesky
    factor of `M M^T`. Computes in float64, and never forms a matrix of size d x d."""
    wide = matrix.double()
    # Without an error: after a divergence the loss becomes NaN, which is reported better.
    factor, _ = torch.linalg.cholesky_ex(wide @ wide.mT)
    return torch.linalg.solve_triangular(factor, wide, upper=False).to(matrix.dtype)


def _distance_from_orthonormal(matrix: torch.Tensor) -> float:
    """`max |M M^T - I|`."""
    matrix = matrix.detach().double()
    gram = matrix @ matrix.mT
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().max().item()


def _is_orthonormal(matrix: torch.Tensor, tolerance: float = 1e-6) -> bool:
    """Whether the rows are orthonormal up to `tolerance` and the rounding of the dtype."""
    return _distance_from_orthonormal(matrix) <= max(tolerance, 8 * torch.finfo(matrix.dtype).eps)


def _write_rotation(adapter: LoReftAdapter, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    key = f"{prefix}rotation"
    if key in state and not state[key].is_meta:
        matrix = state[key].full_tensor() if isinstance(state[key], DTensor) else state[key]
        if not _is_orthonormal(matrix):
            state[key] = orthonormal_rows(matrix).detach().contiguous()


class LoReftLayer(SteeringLayer):
    """The LoReFT adapters of one block, `<block>.loreft`."""

    layer_name = "loreft"

    @staticmethod
    def adapter_class(config: LoReftConfig) -> type[SteeringAdapter]:
        return LoReftAdapter
