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

    The parameter of `rotation` is any matrix, whose rows are orthonormalized where it is read. After each step of the
    optimizer the next forward pass in training mode puts the orthonormal matrix in its place, and state dicts have it
    too.

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
        self.register_state_dict_post_hook(_write_rotation)

    @property
    def rotation(self) -> torch.Tensor:
        return orthonormal_rows(self._unconstrained)

    @rotation.setter
    def rotation(self, value: torch.Tensor) -> None:
        # Whatever takes the parameter's place: a replica's copy of it, or what pruning computes.
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
        if name != "rotation" or _is_orthonormal(tensor, 1e-3):
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

    def forward(
        self, h: torch.Tensor, residual: torch.Tensor | None = None, scaling: float | None = None, part: int = 0
    ) -> torch.Tensor:
        if self.training:
            self._orthonormalize()
        rotation, weight, bias = self.rotation, self.weight, self.bias
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
        """Puts the orthonormal matrix in the place of the parameter that an optimizer's step has left. So it does not
        drift away, and a run that is resumed from a folder goes on as if it had not been stopped."""
        parameter = self._unconstrained
        # Under FSDP2 this would be a gathered copy.
        if not (torch.distributed.is_initialized() or parameter.is_meta or _is_orthonormal(parameter)):
            parameter.copy_(orthonormal_rows(parameter))

    def merge(self, site: Site, scaling: float) -> AffineUpdate:
        if self.activation is not None:
            raise ValueError("its activation makes the update nonlinear.")
        left = scaling * self.rotation.data.double().mT
        return AffineUpdate(left, self.weight.data - self.rotation.data, left @ self.bias.data.double())


def orthonormal_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormalizes the rows of a matrix (..., r, d) from first to last, without anything of size d x d: `L^-1 M`,
    where `L` (r, r) is the Cholesky factor of `M M^T`, computed in float64."""
    wide = matrix.double()
    factor = torch.linalg.cholesky(wide @ wide.mT)
    return torch.linalg.solve_triangular(factor, wide, upper=False).to(matrix.dtype)


def _distance_from_orthonormal(matrix: torch.Tensor) -> float:
    """`max |M M^T - I|`."""
    matrix = matrix.detach().double()
    gram = matrix @ matrix.mT
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().max().item()


def _is_orthonormal(matrix: torch.Tensor, tolerance: float = 1e-6) -> bool:
    """Whether rows are orthonormal within `tolerance`, and what rounding makes of them."""
    return _distance_from_orthonormal(matrix) <= max(tolerance, 8 * torch.finfo(matrix.dtype).eps)


def _write_rotation(adapter: LoReftAdapter, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    key = f"{prefix}rotation"
    if key in state and not state[key].is_meta:
        matrix = state[key].full_tensor() if isinstance(state[key], DTensor) else state[key]
        if not _is_orthonormal(matrix):
            state[key] = orthonormal_rows(matrix).detach()


class LoReftLayer(SteeringLayer):
    """The LoReFT adapters of one block, `<block>.loreft`."""

    layer_name = "loreft"

    @staticmethod
    def adapter_class(config: LoReftConfig) -> type[SteeringAdapter]:
        return LoReftAdapter
